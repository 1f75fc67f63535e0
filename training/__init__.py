"""Models, objectives and the training loop. This package knows no Ray and no FAISS."""
