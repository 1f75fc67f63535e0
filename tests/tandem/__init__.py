"""Tests of the package `tandem`. What Ray reads is set before anything imports it, as the package does."""

from cluster.machines import session

session.set_environment()
