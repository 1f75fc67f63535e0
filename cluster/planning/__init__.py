"""Plans the placement of a run on its machines, its cost and its memory."""
