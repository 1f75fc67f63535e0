"""Batches of every kind of stage."""
