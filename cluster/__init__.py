"""Ray actors, refresh, placement and the command line: composes `indexing` and `training`."""
