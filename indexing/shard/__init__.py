"""One shard of the index: generations are staged, committed, searched and saved."""
