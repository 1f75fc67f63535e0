"""Where measurements go: console, JSONL, W&B, plots and the report."""
