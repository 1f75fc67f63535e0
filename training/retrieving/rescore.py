"""Candidates of a stale index, scored again by the encoders as they are now: `retrieval.rescore`.

A search of k times `retrieval.rescore` candidates is answered by the generation that serves, whatever the age of its
weights; the trainer then encodes the question and every candidate once more, without gradient or dropout, and the best
k by these scores are what the generator reads. With all passages as candidates this is brute force by fresh encoders;
with fewer, a passage that the old weights rank below them is still missed, which a refresh alone can mend. Where words
are searched, too, the candidates are those of both indexes, fused; a re-ranker chooses among the best
`reranker.candidates` of those that were scored again (`training/retrieving/hybrid.py` has the order as a whole).

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

BATCH_TOKENS = 16384  # padded tokens of one forward; without a graph only one layer's activations are kept


class FreshVectors:
    """Vectors of stored questions and passages by the trainer's encoders as they are now."""

    def __init__(self, engine: Engine, collator: Collator, batch_tokens: int = BATCH_TOKENS) -> None:
        self.engine, self.collator, self.batch_tokens = engine, collator, batch_tokens

    def questions(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of question numbers."""
        return encode_questions(self.engine, self.collator, numbers)

    def passages(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of passage numbers int64 [n], n >= 1, in their order; batched by length."""
        table, engine = self.collator.passages_for_retriever, self.engine
        table.rows(numbers.max(keepdims=True))  # a passage that came only now is taken note of
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
        """`vectors_are_fresh`: the passage encoder does not train, so that vectors which come with hits are its own and
        nothing is encoded again but the question. `keep_vectors`: hand on those of the best k. `fuse`: fresh inner
        products to what the best are chosen by, where words are searched, too (`hybrid.Refusion`)."""
        self.fresh, self.k, self.fuse = fresh, k, fuse
        self.vectors_are_fresh, self.keep_vectors = vectors_are_fresh, keep_vectors

    def __call__(self, questions: np.ndarray, candidates: Hits) -> Rescored:
        """The best k of `candidates` [batch, k or more] for question numbers [batch]; ids of -1 come last."""
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
        """float32 [batch, columns, dim]; all ranks take the same way."""
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
    """float32 [batch, columns, dim] of passage numbers int64 [batch, columns], each encoded once; at an id of -1 some
    other passage's."""
    numbers, places = np.unique(np.maximum(ids, 0), return_inverse=True)
    return fresh.passages(numbers)[places.reshape(ids.shape)]


def pair_scores(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float32 [batch, columns]: inner products of queries [batch, dim] and vectors [batch, columns, dim], as
    `indexing/dense/exact.py` rounds them; -inf where there is no passage."""
    scores = np.matmul(vectors.astype(np.float64), queries[:, :, None].astype(np.float64))[:, :, 0]
    return np.where(ids < 0, -np.inf, scores).astype(np.float32)


def overlap_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [batch]: share of the ids [batch, k] of `first` that are among those of `second`; -1 is no id."""
    found = (first[:, :, None] == second[:, None, :]).any(axis=2) & (first >= 0)
    return found.sum(axis=1) / np.maximum(1, (first >= 0).sum(axis=1))
