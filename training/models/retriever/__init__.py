"""Encoders of questions and passages, and the re-ranker."""
