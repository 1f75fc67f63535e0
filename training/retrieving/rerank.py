"""Re-ranks candidates without gradient: the k with the largest p(z|q) are read.

A cross-encoder costs too much for gradient on every candidate. It scores them all once, in evaluation mode. Only the
best k are scored again, with gradient, in the step. Collective under ZeRO 3: every trainer calls equally often.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from indexing.hits import COLUMNS, Hits, chosen
from training.data import Collator
from training.models.model_inputs import RetrievalBatch


class Select(Protocol):
    """Puts hits into another order."""

    def __call__(self, numbers: np.ndarray, hits: Hits) -> Hits:
        """Return the hits of questions `numbers`, the best ones first."""
        ...


class Reranking:
    """A `Select` that orders hits by the scores of the system, re-ranker included."""

    def __init__(
        self, score: Callable[[RetrievalBatch], torch.Tensor], collator: Collator, candidates: int, batch_size: int
    ) -> None:
        """`score` returns the scores [batch, k] of a batch, without gradient and dropout. `candidates` is the number of
        leading hits that are put in order; the others stay behind them as they are. `batch_size` questions are scored
        at a time."""
        self.score, self.collator, self.candidates, self.batch_size = score, collator, candidates, batch_size

    def __call__(self, numbers: np.ndarray, hits: Hits) -> Hits:
        """Return the same hits, the first `candidates` by falling score."""
        width = min(self.candidates, hits.ids.shape[1])
        parts = []
        for start in range(0, len(numbers), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self._scores(numbers[part], _of(hits, part, width)))
        return reordered(hits, np.argsort(-np.concatenate(parts), axis=1, kind="stable"))

    def _scores(self, numbers: np.ndarray, hits: Hits) -> np.ndarray:
        """Return float32 [batch, width]; -inf where there is no hit."""
        passages = [row[row >= 0] for row in hits.ids]
        batch = self.collator(numbers, passages, with_answers=False, vectors=hits.vectors, lexical=hits.lexical)
        scores = self.score(batch).float().cpu().numpy()
        missing = hits.ids.shape[1] - scores.shape[1]
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        return np.where(hits.ids >= 0, scores, -np.inf)


def reordered(hits: Hits, order: np.ndarray) -> Hits:
    """Return `hits` with their first columns, and everything that belongs to them, in `order` int64 [batch, width]."""
    behind = np.arange(order.shape[1], hits.ids.shape[1])
    return chosen(hits, np.hstack([order, np.broadcast_to(behind, (len(order), len(behind)))]))


def _of(hits: Hits, part: slice, width: int) -> Hits:
    """Return the first `width` hits of some questions."""
    rows = replace(hits, **{name: None if vars(hits)[name] is None else vars(hits)[name][part] for name in COLUMNS})
    return chosen(rows, np.broadcast_to(np.arange(width), (len(rows.ids), width)))
