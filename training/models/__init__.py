"""The retriever's towers, the generators, and the system that trains them as one module."""
