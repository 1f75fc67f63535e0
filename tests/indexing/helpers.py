"""Small corpora, token sides and vectors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.passages import Store, TokenSide, write_store


def words_side(name: str, max_tokens: int = 50) -> TokenSide:
    """Tokens are 1 + the bytes of each word, summed; the fingerprint is the name's."""

    def tokenize(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        return [[1 + sum(word.encode()) for word in f"{title} {text}".split()][:max_tokens] for title, text in pairs]

    return TokenSide(name, tokenize, f"words-{name}-{max_tokens}")


def make_passages(num_passages: int, seed: int = 0) -> list[Passage]:
    """Passages of 1 to 30 words."""
    generator = np.random.default_rng(seed)
    texts = [
        " ".join(f"w{word}" for word in generator.integers(0, 99, generator.integers(1, 31)))
        for _ in range(num_passages)
    ]
    return [
        Passage(f"p/{number} é", f"Title {number}" if number % 3 else "", text) for number, text in enumerate(texts)
    ]


def make_store(path: Path, num_passages: int, seed: int = 0) -> Store:
    """A store with the sides retriever and generator."""
    return write_store(path, make_passages(num_passages, seed), [words_side("retriever"), words_side("generator", 8)])


def unit_vectors(num_vectors: int, dim: int, seed: int = 0) -> np.ndarray:
    """float32 [num_vectors, dim] of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((num_vectors, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered_vectors(num_vectors: int, dim: int, seed: int = 0, num_clusters: int = 20) -> np.ndarray:
    """float32 [num_vectors, dim] of length 1 around centres that every seed shares, as an encoder's vectors stand."""
    centres = np.random.default_rng(99).standard_normal((num_clusters, dim))
    generator = np.random.default_rng(seed)
    vectors = centres[generator.integers(0, num_clusters, num_vectors)]
    vectors = (vectors + 0.5 * generator.standard_normal((num_vectors, dim))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
