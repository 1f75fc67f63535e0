"""Scores the candidates of a stale index again, by the encoders as they are now: `retrieval.rescore`.

The serving generation answers a search of k times `retrieval.rescore` candidates, whatever the age of its weights. The
trainer then encodes the question and every candidate once more, without gradient or dropout, and the generator reads
the best k by these scores. With all passages as candidates this is brute force by fresh encoders. With fewer, a passage
that the old weights rank below them is missed, which only a refresh can mend. In hybrid search the candidates are the
fused ones of both indexes; a re-ranker chooses among the best `reranker.candidates` of those that were scored again
(`training/retrieving/hybrid.py` describes the whole order).

Every method is collective under ZeRO 3: each forward gathers weights from all ranks. Ranks hold different candidates,
so they first agree on a number of forwards; a rank that needs fewer fills up with a passage whose vector is dropped.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from indexing.dense.encode import length_batches
from indexing.hits import Hits, chosen
from training.data import Collator, encode_questions
from training.engine.engine import Engine
from training.models.parts.modes import evaluating
from training.models.system import System
from training.retrieving.retrieve import Rescored

BATCH_TOKENS = 16384  # Number of padded tokens of one forward; without a graph only one layer's activations are kept


class FreshVectors:
    """Encodes stored questions and passages with the trainer's encoders as they are now."""

    def __init__(self, engine: Engine, collator: Collator, batch_tokens: int = BATCH_TOKENS) -> None:
        self.engine, self.collator, self.batch_tokens = engine, collator, batch_tokens

    def questions(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors of question numbers; float32 [n, dim]."""
        return encode_questions(self.engine, self.collator, numbers)

    def passages(self, numbers: np.ndarray) -> np.ndarray:
        """Return the vectors of passage numbers int64 [n], n >= 1, in their order; float32 [n, dim]. Batched by
        length."""
        table, engine = self.collator.passages_for_retriever, self.engine
        table.rows(numbers.max(keepdims=True))  # lets the table notice passages that were added just now
        order: list[np.ndarray] = list(length_batches(table, numbers, self.batch_tokens))
        num_forwards = len(order)
        if engine.world_size > 1:
            num_forwards = max(engine.gather_objects(len(order)))
        blocks: list[np.ndarray] = []
        with torch.no_grad(), evaluating(engine.module):
            for place in range(num_forwards):
                rows = order[place] if place < len(order) else order[0][-1:]
                ids, mask = (torch.from_numpy(array) for array in table.padded(rows, self.collator.pad_id))
                vectors = engine(System.encode_passages, ids.to(engine.device), mask.to(engine.device))
                if place < len(order):
                    blocks.append(vectors.float().cpu().numpy())
        encoded = np.concatenate(order)
        found = np.empty((len(numbers), blocks[0].shape[1]), np.float32)
        places = np.searchsorted(numbers, encoded, sorter=(rising := np.argsort(numbers, kind="stable")))
        found[rising[places]] = np.concatenate(blocks)
        return found


class Rescorer:
    """Chooses the best `k` of a search's candidates (`training.retrieving.retrieve.Rescore`)."""

    def __init__(
        self,
        fresh: FreshVectors,
        k: int,
        *,
        vectors_are_fresh: bool,
        keep_vectors: bool,
        fuse: Callable[[np.ndarray, Hits], np.ndarray] | None = None,
    ) -> None:
        """`vectors_are_fresh`: the passage encoder does not train, so that vectors that come with hits need no
        encoding. `keep_vectors` hands on the vectors of the best k. `fuse` turns fresh inner products into the scores
        that choose, if words are searched as well (`hybrid.Refusion`)."""
        self.fresh, self.k, self.fuse = fresh, k, fuse
        self.vectors_are_fresh, self.keep_vectors = vectors_are_fresh, keep_vectors

    def __call__(self, questions: np.ndarray, candidates: Hits) -> Rescored:
        """Return the best k of `candidates` [batch, k or more] for question numbers [batch]; ids of -1 come last."""
        begin = time.perf_counter()
        queries = self.fresh.questions(questions)
        vectors = self._vectors(candidates)
        scores = pair_scores(queries, vectors, candidates.ids)
        if self.fuse is not None:
            scores = self.fuse(scores, candidates)
        order = np.lexsort((candidates.ids, candidates.ids < 0, -scores), axis=-1)[:, : self.k]
        hits = chosen(replace(candidates, scores=scores, vectors=vectors if self.keep_vectors else None), order)
        overlap = overlap_of(candidates.ids[:, : self.k], hits.ids)
        return Rescored(hits, float(np.mean(overlap)), time.perf_counter() - begin)

    def _vectors(self, candidates: Hits) -> np.ndarray:
        """Return float32 [batch, columns, dim]; all ranks take the same branch."""
        known = candidates.vectors
        if self.vectors_are_fresh:
            lacking = known is None or known.shape[1] < candidates.ids.shape[1]
            if self.fresh.engine.world_size > 1:
                lacking = self.fresh.engine.any_rank(lacking)
            if not lacking:
                assert known is not None
                return known
        return candidate_vectors(self.fresh, candidates.ids)


def candidate_vectors(fresh: FreshVectors, ids: np.ndarray) -> np.ndarray:
    """Return the vectors, float32 [batch, columns, dim], of passage numbers int64 [batch, columns], each encoded once;
    an id of -1 gets the vector of some other passage."""
    numbers, places = np.unique(np.maximum(ids, 0), return_inverse=True)
    return fresh.passages(numbers)[places.reshape(ids.shape)]


def pair_scores(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the inner products, float32 [batch, columns], of queries [batch, dim] and vectors [batch, columns, dim],
    rounded as `indexing/dense/exact.py` does; -inf where there is no passage."""
    scores = np.matmul(vectors.astype(np.float64), queries[:, :, None].astype(np.float64))[:, :, 0]
    return np.where(ids < 0, -np.inf, scores).astype(np.float32)


def overlap_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of the ids [batch, k] of `first` that are among those of `second`, float64 [batch]; -1 is no
    id."""
    found = (first[:, :, None] == second[:, None, :]).any(axis=2) & (first >= 0)
    return found.sum(axis=1) / np.maximum(1, (first >= 0).sum(axis=1))
