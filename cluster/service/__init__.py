"""The index service on Ray: actors, ports, fan-out and search."""
