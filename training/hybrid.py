"""Searching by vectors and by words at once, and choosing among the hits by a re-ranker: between loop and index.

    question texts --> lexical index --+
                                       +--> fused --> (re-ranked) --> the k that are read
    query vectors  --> dense index ----+

Who waits for whom: both searches are started when `HybridSearch` is called, and taken in `result()`, which waits for
the dense hits, then for the lexical ones; each wait is bounded by the service behind it. The dense generation says
which corpus it was built from. Lexical hits of another one are asked for again, for that corpus by name: no query is
answered from two states of the corpus. A generation that goes while its vectors are fetched is searched anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from indexing.fusion import Fused, behind, fuse_by_rank, fuse_by_score, normalised, union
from indexing.lexical import LexicalHits
from indexing.merge import Hits
from indexing.shard import GenerationGone
from training.retrieve import PendingHits
from training.settings import RetrievalConfig

ATTEMPTS = 10  # searches of a batch whose generation goes again and again


class DenseIndex(Protocol):
    """What a search needs of an `IndexService`."""

    num_passages: int

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> PendingHits:
        """As `IndexService.submit`."""
        ...

    def vectors(self, ids: np.ndarray, generation: int) -> np.ndarray | None:
        """As `IndexService.vectors`."""
        ...


class PendingWords(Protocol):
    """A lexical search under way."""

    def result(self) -> LexicalHits:
        """Wait for the hits. Raises TimeoutError that names `index.search_timeout_s`."""
        ...


class LexicalService(Protocol):
    """A lexical index of each state of the corpus that is served."""

    def submit(self, texts: Sequence[str], n: int, corpus: str = "", of: np.ndarray | None = None) -> PendingWords:
        """Start a search of question texts for the best `n` passages in the corpus with this fingerprint (empty: the
        newest), with the scores of the passages `of` int64 [batch, m]. Returns at once."""
        ...


class Search(Protocol):
    """How a batch of questions is searched."""

    def __call__(self, numbers: np.ndarray, queries: np.ndarray, k: int, num_vectors: int = 0) -> PendingHits:
        """Start the search of questions `numbers` with float32 `queries` [batch, dim]."""
        ...


def dense_search(service: DenseIndex) -> Search:
    """By vectors alone."""
    return lambda numbers, queries, k, num_vectors=0: service.submit(queries, k, num_vectors)


class HybridSearch:
    """A `Search` of both indexes."""

    def __init__(
        self,
        service: DenseIndex,
        lexical: LexicalService,
        text_of: Callable[[int], str],
        config: RetrievalConfig,
        weight: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`text_of` a question number; `weight`: of lexical scores as the retriever has it now (hybrid=learned), asked
        for once a search, on every rank."""
        self.service, self.lexical, self.text_of = service, lexical, text_of
        self.config, self.weight = config, weight

    def __call__(self, numbers: np.ndarray, queries: np.ndarray, k: int, num_vectors: int = 0) -> "PendingFused":
        """Start both searches; a hit comes with its vector where `num_vectors` is not 0 and the index keeps them."""
        texts = [self.text_of(int(number)) for number in numbers]
        return PendingFused(self, texts, queries, k, num_vectors > 0)

    def scores(self, numbers: np.ndarray, passages: Sequence[np.ndarray], corpus: str) -> np.ndarray:
        """Normalised lexical scores float32 [batch, k] of passage numbers [batch][up to k], 0 where there are fewer."""
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

    def __init__(self, search: HybridSearch, texts: list[str], queries: np.ndarray, k: int, with_vectors: bool) -> None:
        self._search, self._texts, self._queries, self._k = search, texts, queries, k
        self._with_vectors = with_vectors
        self._candidates = min(search.config.candidates, search.service.num_passages)
        self._depth = max(self._candidates, k)  # of the dense ranking, whose rest stands behind the candidates
        self._weight = search.weight() if search.config.hybrid == "learned" else 0.0
        self._dense = search.service.submit(queries, self._depth)
        self._words = search.lexical.submit(texts, self._candidates)
        self._hits: Hits | None = None

    def result(self) -> Hits:
        """Fused hits [batch, k] with `lexical` and `places`; `vectors` of all or None. Raises TimeoutError."""
        if self._hits is None:
            self._hits = self._fuse()
        return self._hits

    def _fuse(self) -> Hits:
        for _ in range(ATTEMPTS):
            dense = self._dense.result()
            words = self._words.result()
            if dense.corpus and words.corpus != dense.corpus:
                words = self._search.lexical.submit(self._texts, self._candidates, dense.corpus).result()
            try:
                return self._of(dense, words)
            except GenerationGone:
                self._dense = self._search.service.submit(self._queries, self._depth)
        raise TimeoutError(
            f"the index replaced its generation {ATTEMPTS} times while the vectors of a search were fetched: raise "
            "refresh.every_steps"
        )

    def _of(self, dense: Hits, words: LexicalHits) -> Hits:
        config, best = self._search.config, words.scores[:, 0]
        shares, first = normalised(words.scores, best), dense.ids[:, : self._candidates]
        if config.hybrid == "rrf":
            fused = fuse_by_rank(first, words.ids, shares, config.rrf_constant, self._k)
        else:
            fused = self._weighted(first, dense, words, shares, best)
        fused = behind(fused, dense.ids)
        vectors = None
        if self._with_vectors:
            vectors = self._search.service.vectors(fused.ids, dense.generation)
        places = np.stack([fused.dense_places, fused.lexical_places], axis=-1)
        return replace(dense, ids=fused.ids, scores=fused.scores, vectors=vectors, lexical=fused.lexical, places=places)

    def _weighted(
        self, first: np.ndarray, dense: Hits, words: LexicalHits, shares: np.ndarray, best: np.ndarray
    ) -> Fused:
        """Every candidate of either index with its score in both: the lexical ones of the `first` dense hits are looked
        up, the dense ones of lexical hits are products with the index's vectors. Where the index keeps none, such a hit
        counts as the last dense one, which it cannot exceed in an exhaustive index."""
        pending = self._search.lexical.submit(self._texts, 0, words.corpus, first)
        missing = union(first, words.ids)
        vectors = self._search.service.vectors(missing, dense.generation)
        scores = dense.scores[:, : self._candidates]
        if vectors is None:
            products = np.broadcast_to(scores[:, -1:], missing.shape)
        else:
            products = np.einsum("bnd,bd->bn", vectors, self._queries, dtype=np.float32)
        found = pending.result()
        assert found.of is not None
        of_dense = first, scores, normalised(found.of, best)
        return fuse_by_score(of_dense, (words.ids, products, shares), self._weight, self._k)
