"""Placement of a run on its machines, its cost and whether it fits."""
