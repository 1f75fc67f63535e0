"""Decisions on when the index follows the encoder, and with which passages first."""
