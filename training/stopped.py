"""The end of a stage before its last step."""


class Stopped(Exception):
    """The stage was asked to stop. Every rank raises it at the same point, between two batches; nothing is lost."""
