"""When the index follows the encoder, and which passages first."""
