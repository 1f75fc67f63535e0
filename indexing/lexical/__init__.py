"""BM25 indexes and the fusion of rankings."""
