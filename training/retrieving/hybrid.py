"""Hybrid search asks the dense and the lexical index at once and fuses their hits; it stands between loop and index.

    question texts --> lexical index --+
                                       +--> fused --> (re-ranked) --> the k that are read
    query vectors  --> dense index ----+

A call of `HybridSearch` starts both searches. `result()` waits for the dense hits, then for the lexical ones; the
services bound each wait. The dense hits name the state of the corpus that they belong to (`indexing.hits.CorpusState`).
If the lexical hits belong to another one, they are asked for again, for that state; passages that were deleted between
the two answers are left out: no query is answered from two states of the corpus. If a generation is replaced while its
vectors are fetched, the search starts anew.

With `retrieval.rescore` the candidates of both indexes are first fused by the indexed vectors, to as many hits as are
scored again. `Refusion` then fuses these by the scores of fresh vectors (`training/retrieving/rescore.py`), and a
re-ranker puts the rest in order (`training/retrieving/rerank.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from indexing.attempts import Attempts
from indexing.hits import CorpusState, Hits, chosen, without
from indexing.lexical.lexical import LexicalHits
from indexing.lexical.rank_fusion import Fused, behind, fuse_by_rank, fuse_by_score, normalised, union
from indexing.shard.serving import GenerationGone
from training.retrieving.retrieve import DenseIndex, LexicalService
from training.training_settings import RetrievalConfig

ATTEMPTS = 10  # Number of searches of a batch before a generation that is replaced each time ends the run
FIRST_PAUSE_S = 0.05  # Seconds until a deletion has reached every shard, as a rule; doubled with each further search


class HybridSearch:
    """A `Search` that asks both indexes."""

    def __init__(
        self,
        service: DenseIndex,
        lexical: LexicalService,
        *,
        text_of: Callable[[int], str],
        config: RetrievalConfig,
        weight: Callable[[], float] = lambda: 0.0,
        is_living: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """`text_of` returns the text of a question number. `weight` returns the present weight of lexical scores
        (hybrid=learned); it is called once a search, on every rank. `is_living` tells which passage numbers are in the
        corpus now; None: all."""
        self.service, self.lexical, self.text_of = service, lexical, text_of
        self.config, self.weight, self.is_living = config, weight, is_living
        self.last_weight = 0.0

    def __call__(
        self, numbers: np.ndarray, queries: np.ndarray, k: int, *, num_vectors: int = 0, again: bool = False
    ) -> "PendingFused":
        """Start both searches. A hit comes with its vector if `num_vectors` is not 0 and the index keeps vectors.
        `again` takes the weight of the search before."""
        texts = [self.text_of(int(number)) for number in numbers]
        if self.config.hybrid == "learned" and not again:
            self.last_weight = self.weight()
        return PendingFused(self, texts, queries=queries, k=k, with_vectors=num_vectors > 0)

    def scores(self, numbers: np.ndarray, passages: Sequence[np.ndarray], corpus: CorpusState) -> np.ndarray:
        """Return normalised lexical scores, float32 [batch, k], of passage numbers [batch][up to k] in a state of the
        corpus; 0 at padding."""
        texts = [self.text_of(int(number)) for number in numbers]
        width = max(1, max(len(row) for row in passages))
        ids = np.full((len(passages), width), -1, np.int64)
        for i, row in enumerate(passages):
            ids[i, : len(row)] = row
        found = self.lexical.submit(texts, 1, corpus, ids).result()
        assert found.of is not None
        return normalised(found.of, found.scores[:, 0])


class PendingFused:
    """Two searches under way (`PendingHits`)."""

    def __init__(
        self, search: HybridSearch, texts: list[str], *, queries: np.ndarray, k: int, with_vectors: bool
    ) -> None:
        self._search, self._texts, self._queries, self._k = search, texts, queries, k
        self._with_vectors = with_vectors
        self._candidates = min(search.config.candidates, search.service.num_passages)
        self._depth = max(self._candidates, k)  # length of the dense ranking, whose rest follows the candidates
        self._weight = search.last_weight
        self._dense = search.service.submit(queries, self._depth)
        self._pending_lexical = search.lexical.submit(texts, self._candidates)
        self._hits: Hits | None = None

    def result(self) -> Hits:
        """Return fused hits [batch, k] with `lexical` and `places`; `vectors` of all or None. Raises TimeoutError."""
        if self._hits is None:
            self._hits = self._fuse()
        return self._hits

    def _fuse(self) -> Hits:
        attempts, why = Attempts(first_s=FIRST_PAUSE_S, longest_s=math.inf, most=ATTEMPTS), ""
        lost_in: CorpusState | None = None  # state of the corpus in which the last attempt lost passages
        for attempt in attempts:
            if lost_in is not None:
                self._pending_lexical = self._search.lexical.submit(self._texts, self._candidates, lost_in)
            if attempt:
                self._depth = min(self._depth, self._search.service.num_passages)
                self._dense = self._search.service.submit(self._queries, self._depth)
            dense = self._dense.result()
            lexical = self._pending_lexical.result()
            if lexical.corpus.added != dense.corpus.added or lexical.corpus.hidden < dense.corpus.hidden:
                lexical = self._search.lexical.submit(self._texts, self._candidates, dense.corpus).result()
            try:
                fused = self._of(*self._living(dense, lexical))
            except GenerationGone:
                why, lost_in = "replaced its generation", None
                attempts.skip_pause()
            else:
                if fused is not None:
                    return fused
                why, lost_in = "lost passages", dense.corpus  # a deletion that not every shard knows of yet
        raise TimeoutError(
            f"the index {why} {ATTEMPTS} times while a search was answered: raise refresh.every_steps, or change the "
            "corpus less often"
        )

    def _living(self, dense: Hits, lexical: LexicalHits) -> tuple[Hits, LexicalHits]:
        """Return both without the passages that were deleted before both had answered."""
        living = self._search.is_living
        if living is None:
            return dense, lexical
        gone = (lexical.ids >= 0) & ~living(lexical.ids)
        if gone.any():  # the living ones come first, in their order
            order = np.argsort(gone, axis=1, kind="stable")
            ids = np.take_along_axis(np.where(gone, -1, lexical.ids), order, axis=1)
            scores = np.take_along_axis(np.where(gone, np.float32(0), lexical.scores), order, axis=1)
            lexical = replace(lexical, ids=ids, scores=scores)
        gone = (dense.ids >= 0) & ~living(dense.ids)
        if gone.any():
            order = np.argsort(gone, axis=1, kind="stable")
            dense = without(chosen(dense, order), np.take_along_axis(gone, order, axis=1))
        return dense, lexical

    def _of(self, dense: Hits, lexical: LexicalHits) -> Hits | None:
        """Return fused hits; None if passages that were deleted meanwhile leave too few."""
        config, best = self._search.config, lexical.scores[:, 0]
        shares, first = normalised(lexical.scores, best), dense.ids[:, : self._candidates]
        if config.hybrid == "rrf":
            fused = fuse_by_rank(first, lexical.ids, shares=shares, constant=config.rrf_constant, k=self._k)
        else:
            fused = self._weighted(first, dense, lexical=lexical, shares=shares, best=best)
        fused = behind(fused, dense.ids)
        if (fused.ids < 0).any() and (dense.ids < 0).any():
            return None
        indexed = self._search.service.indexed(fused.ids, dense.generation, self._with_vectors)
        vectors = indexed.vectors if self._with_vectors else None
        uniform = bool((indexed.versions == dense.weights_version).all())
        places = np.stack([fused.dense_places, fused.lexical_places], axis=-1)
        return replace(
            dense,
            ids=fused.ids,
            scores=fused.scores,
            vectors=vectors,
            versions=None if uniform else indexed.versions,
            lexical=fused.lexical,
            places=places,
        )

    def _weighted(
        self, first: np.ndarray, dense: Hits, *, lexical: LexicalHits, shares: np.ndarray, best: np.ndarray
    ) -> Fused:
        """Return every candidate of either index with its score in both. The lexical scores of the `first` dense hits
        are looked up; the dense scores of lexical hits are products with the index's vectors. If the index keeps none,
        such a hit counts as the last dense one, which it cannot exceed in an exhaustive index."""
        pending = self._search.lexical.submit(self._texts, 0, lexical.corpus, first)
        missing = union(first, lexical.ids)
        vectors = self._search.service.indexed(missing, dense.generation).vectors
        scores = dense.scores[:, : self._candidates]
        if vectors is None:
            last = np.where(first < 0, np.inf, scores).min(axis=1, keepdims=True)
            products = np.broadcast_to(last.astype(np.float32), missing.shape)
        else:
            products = np.einsum("bnd,bd->bn", vectors, self._queries, dtype=np.float32)
        found = pending.result()
        assert found.of is not None
        of_dense = first, scores, normalised(found.of, best)
        return fuse_by_score(of_dense, (lexical.ids, products, shares), self._weight, self._k)


class Refusion:
    """Fuses hits anew once their dense scores are fresh; the best of them are chosen by these scores."""

    def __init__(self, config: RetrievalConfig, weight: Callable[[], float]) -> None:
        """`weight` is that of `HybridSearch`; it is called on every rank."""
        self.config, self.weight = config, weight

    def __call__(self, dense: np.ndarray, hits: Hits) -> np.ndarray:
        """Return fused scores, float32 [batch, columns], of fresh inner products `dense` of the same shape; -inf at
        padding. With hybrid=learned they contain the weighted lexical scores. With hybrid=rrf they come from the places
        by these products among all candidates, and from the lexical places that the hits carry."""
        assert hits.lexical is not None
        if self.config.hybrid == "learned":
            fused = dense + np.float32(self.weight()) * hits.lexical
        else:
            assert hits.places is not None
            order = np.lexsort((hits.ids, -dense), axis=-1)
            places = np.empty_like(order)
            np.put_along_axis(places, order, np.arange(1, order.shape[1] + 1)[None], axis=1)
            by_lexical, constant = hits.places[:, :, 1], self.config.rrf_constant
            fused = 1 / (constant + places) + np.where(by_lexical > 0, 1 / (constant + np.maximum(by_lexical, 1)), 0)
        return np.where(hits.ids < 0, -np.inf, fused).astype(np.float32)
