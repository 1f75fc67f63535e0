"""What Ray reads is set before anything imports it, as the command line does."""

from cluster.machines import session

session.set_environment()
