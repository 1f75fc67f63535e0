"""Metrics on the console, in JSONL, in W&B and in the report."""
