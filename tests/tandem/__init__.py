"""Tests of the package `tandem`."""
