"""Models, objectives and the training loop: everything that needs neither Ray nor FAISS."""
