"""Processes, Ray sessions and events of the machines that a run uses."""
