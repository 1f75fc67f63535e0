"""Which passages a batch reads: searched ahead, scored again, fused with words, re-ranked."""
