"""Vector indexes: encoding a corpus, FAISS kinds, exact search and its checks."""
