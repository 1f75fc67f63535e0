"""What a stage trains on: questions with their hits, examples cut from the corpus, judged and sampled answers."""
