"""Passages, vectors and indexes. This package knows no Ray and no torch."""
