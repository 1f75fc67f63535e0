"""Memory-mapped stores of passages, questions and metadata, and the log of changes."""
