"""The retriever, the generators, and the system that joins them."""
