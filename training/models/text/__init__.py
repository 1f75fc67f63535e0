"""Text to token rows: tokenisers, prompts and packing."""
