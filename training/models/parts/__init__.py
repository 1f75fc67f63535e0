"""What several models share: adapters, checkpoints and weights."""
