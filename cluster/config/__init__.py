"""Declares settings, reads YAML files and overrides, and checks them."""
