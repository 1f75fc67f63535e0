"""Stores of passages, questions and preferences, made once before a run."""
