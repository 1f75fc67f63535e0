"""Searches exactly on CPU in the kinds of index that keep every vector whole (`Flat`, `SQfp16`).

A quick product proposes a few candidates more than `k`; they are scored again, independently of batch and matrix shapes
(`indexing/dense/exact.py`). If the rounding of the quick product could hide a better row, the query is searched again
more exactly, by brute force in the end. So the hits are those of brute force, ties by row, whatever proposes them:
FAISS in float32, or before it a product of 16 bits, which this package knows by its protocol alone (`index.products`).
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from indexing.dense.exact import score_pairs, search_exactly
from indexing.dense.faiss_library import load_faiss, selector, tune_blas
from indexing.hits import best_first

SPARE_CANDIDATES = 16  # Number of candidates proposed beyond k
WIDE_FILTER = 0.5  # Share of rows: if more are allowed, proposals that are not are dropped; if fewer, FAISS skips them


class Proposer(Protocol):
    """A product of the vectors with queries that is quicker than FAISS's, and less exact. Safe from several threads."""

    spare_candidates: int  # Number of candidates to propose beyond k, so that the ceiling seldom reaches the k-th score
    num_bytes: int

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` different rows int64 [batch, count] for float32 `queries` [batch, dim], count <= n; and a
        ceiling, float64 [batch]: no other row has a larger exact score."""
        ...


_make_proposer: Callable[[np.ndarray], Proposer] | None = None


def offer(make_proposer: Callable[[np.ndarray], Proposer] | None) -> None:
    """Let every index that this process makes from now on with `index.products=bfloat16` propose candidates by
    `make_proposer(vectors [n, dim])`; None: none of them."""
    global _make_proposer
    _make_proposer = make_proposer


class Exhaustive:
    """The exact search in one FAISS index. Safe from several threads."""

    def __init__(self, index: Any, stored: np.ndarray, products: str) -> None:
        """Wrap an index; `stored` are its vectors, float32 or float16 [n, dim]."""
        self._index, self._stored = index, stored
        self._largest_norm = _largest_norm(stored)
        make = _make_proposer if products == "bfloat16" else None
        self._proposer = None if make is None else make(stored)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of memory beside the vectors."""
        return 0 if self._proposer is None else self._proposer.num_bytes

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32 [batch, k], falling, and rows int64, equal scores by row, of the `count` >= k rows that
        are `allowed`, bool [n] (None: all)."""
        share = count / len(self._stored)
        only = None if allowed is None or share >= WIDE_FILTER else selector(allowed)
        if self._proposer is None or only is not None:
            return self._search_by_faiss(queries, k, allowed=allowed, count=count, only=only)
        wanted = min(_wanted(k, self._proposer.spare_candidates, allowed, share), len(self._stored))
        rows, ceiling = self._proposer.propose(queries, wanted)
        scores, rows = self._best(queries, k, rows, allowed)
        if wanted < len(self._stored):
            unsure = np.flatnonzero(~(scores[:, -1] > ceiling))
            if len(unsure):
                scores[unsure], rows[unsure] = self._search_by_faiss(
                    queries[unsure], k, allowed=allowed, count=count, only=None
                )
        return scores, rows

    def _search_by_faiss(
        self, queries: np.ndarray, k: int, *, allowed: np.ndarray | None, count: int, only: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search by FAISS. `only` is FAISS's selector of the allowed rows, if others are to be skipped instead of
        dropped."""
        total, dim = self._stored.shape
        skips = only is not None
        reach = count if skips else total  # Number of rows that FAISS may propose
        wanted = _wanted(k, SPARE_CANDIDATES, None if skips else allowed, count / total)
        parameters = load_faiss().SearchParameters(sel=only[0]) if skips else None
        tune_blas(dim)
        proposed, rows = self._index.search(queries, min(wanted, reach), params=parameters)
        if rows.min() < 0:  # scores that overflow float32
            return search_exactly(self._stored, queries, k, allowed)
        scores, rows = self._best(queries, k, rows, None if skips else allowed)
        if wanted >= reach:
            return scores, rows
        # A float32 inner product of dim terms is off by at most dim * 2^-24 * |q| |x| (Higham 2002, section 3.1).
        error = 1.01 * dim * 2.0**-24 * np.linalg.norm(queries, axis=1) * self._largest_norm
        unsure = np.flatnonzero(~(scores[:, -1] > proposed[:, -1] + 2 * error))
        if len(unsure):
            scores[unsure], rows[unsure] = search_exactly(self._stored, queries[unsure], k, allowed)
        return scores, rows

    def _best(
        self, queries: np.ndarray, k: int, rows: np.ndarray, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best k of these rows [batch, any], scored exactly."""
        scores = score_pairs(self._stored, queries, rows)
        if allowed is not None:
            dropped = ~allowed[rows]
            scores[dropped], rows[dropped] = -np.inf, -1
        return best_first(scores, rows, k)


def _wanted(k: int, spare: int, allowed: np.ndarray | None, share: float) -> int:
    """Return the number of rows to propose so that about k + spare are allowed, if `share` of all rows are."""
    return k + spare if allowed is None else math.ceil((k + spare) / share) + SPARE_CANDIDATES


def _largest_norm(vectors: np.ndarray) -> float:
    blocks = (vectors[start : start + 65536].astype(np.float32) for start in range(0, len(vectors), 65536))
    return float(np.sqrt(max(np.einsum("nd,nd->n", block, block, dtype=np.float64).max() for block in blocks)))
