"""Index generations: encoded, built, committed, repaired and saved. This room knows no Ray."""
