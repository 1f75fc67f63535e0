"""Passages for a batch: search, prefetch, fresh scores, fusion and re-ranking."""
