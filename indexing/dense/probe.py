"""Measures a generation of an index: bytes, seconds to build, and recall against exact search.

A shard compares each generation with brute force over the vectors that it was built from, before it frees them. The
queries are the last ones of a search (from an encoder that is a little older than that of the passages), or, before the
first search, some of the shard's vectors with noise added, which are easier to find. `index.probe_queries` bounds the
cost: that many rows of one matrix product over the shard. An exhaustive kind finds everything, and is not measured.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from indexing.dense.exact import recall, search_exactly
from indexing.dense.faiss_build import Index

PROBE_K = 10  # Number of hits that are compared
NOISE = 0.3  # length of the noise added to a vector of length 1


@dataclass(frozen=True)
class Figures:
    """The figures of one generation."""

    bytes_per_passage: float = 0.0  # bytes; 0: not known
    build_s: float = 0.0  # seconds of training and adding; 0: it was read from disk
    recall: float | None = None  # at PROBE_K against exact search; None: not measured


UNKNOWN = Figures()


class RecentQueries:
    """The last `capacity` queries of a shard. Safe from several threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._batches: list[np.ndarray] = []

    def add(self, queries: np.ndarray) -> None:
        """Remember float32 `queries` [batch, dim], and forget the oldest ones."""
        if not self._capacity or not len(queries):
            return
        with self._lock:
            self._batches.append(np.array(queries[-self._capacity :], np.float32))
            while sum(map(len, self._batches[1:])) >= self._capacity:
                self._batches.pop(0)

    def take(self, dim: int) -> np.ndarray:
        """Return the last queries of this dimension: float32 [up to capacity, dim]."""
        with self._lock:
            kept = [batch for batch in self._batches if batch.shape[1] == dim]
        return np.concatenate(kept)[-self._capacity :] if kept else np.empty((0, dim), np.float32)


def probe_recall(
    index: Index, vectors: np.ndarray, *, num_queries: int, recent: np.ndarray | None = None, seed: int = 0
) -> float | None:
    """Return recall@PROBE_K of `index`, which was built from `vectors` [n, dim], on up to `num_queries` queries: the
    last of `recent` [any, dim], else rows of `vectors` with noise. None if `num_queries` is 0."""
    if not num_queries:
        return None
    if index.kind.exhaustive:
        return 1.0
    queries = np.empty((0, vectors.shape[1]), np.float32) if recent is None else recent[-num_queries:]
    if not len(queries):
        generator = np.random.default_rng(seed)
        queries = vectors[generator.integers(0, len(vectors), num_queries)]
        noise = generator.standard_normal(queries.shape).astype(np.float32)
        lengths = np.linalg.norm(queries, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        queries = queries + NOISE * lengths * noise
    k = min(PROBE_K, len(vectors))
    return recall(index.search(queries, k)[1], search_exactly(vectors, queries, k)[1])


def combined(parts: Sequence[tuple[int, Figures]]) -> Figures:
    """Return the figures of a whole index from (passages, figures) of its shards, which build beside each other: the
    longest time, means over the passages. Recall is known if every shard knows it."""
    total = sum(number for number, _ in parts)
    if not total:
        return UNKNOWN
    recalls = [(number, figures.recall) for number, figures in parts if figures.recall is not None]
    return Figures(
        bytes_per_passage=sum(number * figures.bytes_per_passage for number, figures in parts) / total,
        build_s=max(figures.build_s for _, figures in parts),
        recall=sum(n * share for n, share in recalls) / total if len(recalls) == len(parts) else None,
    )
