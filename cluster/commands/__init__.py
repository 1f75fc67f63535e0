"""One file per verb of the command line, and what the verbs share."""
