"""One training stage on the cluster."""
