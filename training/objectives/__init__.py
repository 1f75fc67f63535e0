"""Training objectives as pure functions: tensors in, (loss, statistics) out."""
