"""Shared parts of several models: adapters, checkpoints and weights."""
