"""Ray actors, index refresh, placement and the command line. This package composes the other two."""
