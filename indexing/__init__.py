"""Passages, vectors and FAISS: everything about the index that needs neither Ray nor torch."""
