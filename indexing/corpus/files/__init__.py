"""Readers of corpus, question and preference files, and the synthetic world."""
