"""The interface of training to an index, which answers searches now and follows the encoder later.

The loop produces query vectors and encoder weights; the service (Ray actors in a run, a plain object in a test) answers
searches and rebuilds itself. `submit` and `publish` return at once; only `PendingHits.result`, `wait_for_version` and
`save_generation` wait, and each wait is bounded.

With `retrieval.rescore` the prefetcher has the candidates of a search scored again when it hands the batch out, not
when it submits the search: the weights are then those of the step that trains on the batch, so that the passages stand
in the order that the loss gives them. The search runs ahead of the training; only the encoding of its candidates does
not.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from indexing.dense.probe import UNKNOWN, Figures
from indexing.hits import CorpusState, Hits, Indexed, chosen, without
from indexing.lexical.lexical import LexicalHits

if TYPE_CHECKING:
    from training.retrieving.rerank import Select


@dataclass(frozen=True, kw_only=True)
class IndexStatus:
    """A cheap and possibly slightly old view of the index, for the metrics."""

    generation: int
    weights_version: int
    generations_committed: int  # Number of generations of this run
    refresh_seconds: float  # Seconds that the newest committed generation took
    refresh_passages_per_s: float
    failures: int
    slow: int = 0  # Number of searches of this process that met a slow shard (index.slow_after_s)
    hedged: int = 0  # Number of them for which a replica was asked
    refused: int = 0  # Number of them that were refused
    # Weights version of the passage that was encoded longest ago; None: all have `weights_version`
    oldest_version: int | None = None
    figures: Figures = UNKNOWN  # figures of the serving generation, as far as they are known
    doing: str = ""  # what a shard is at that takes as long as its index is large

    @property
    def oldest(self) -> int:
        """Return the weights version of the passage that was encoded longest ago."""
        return self.weights_version if self.oldest_version is None else self.oldest_version


class PendingLexical(Protocol):
    """A lexical search under way."""

    def result(self) -> LexicalHits:
        """Wait for the hits. Raises TimeoutError, which names `index.search_timeout_s`."""
        ...


class LexicalService(Protocol):
    """A lexical index of a corpus that may change."""

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> PendingLexical:
        """Start a search of question texts for the best `n` passages, with the scores of the passages `of` int64
        [batch, m]; returns at once. `wanted` is the state of the corpus to search; None: that of the search before, or
        the newest."""
        ...


class PendingHits(Protocol):
    """A search under way."""

    def result(self) -> Hits:
        """Wait for the hits. Raises TimeoutError, which names `index.search_timeout_s`."""
        ...


class Search(Protocol):
    """A function that searches a batch of questions."""

    def __call__(
        self, numbers: np.ndarray, queries: np.ndarray, k: int, *, num_vectors: int = 0, again: bool = False
    ) -> PendingHits:
        """Start the search of questions `numbers` with float32 `queries` [batch, dim]. `again` says that other trainers
        do not make this search at the same time, so that nothing collective may be part of it."""
        ...


class DenseIndex(Protocol):
    """The part of an index service that a search needs."""

    @property
    def num_passages(self) -> int:
        """Number of passages that a search may find."""
        ...

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> PendingHits:
        """Start a search of float32 `queries` [batch, dim]; one generation answers every query. The first `num_vectors`
        hits come with their vectors if the kind of index keeps them."""
        ...

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        """Return vectors and versions of passages `ids` int64 [...] in `generation`. Raises GenerationGone, and
        TimeoutError as a search does."""
        ...


class IndexService(DenseIndex, Protocol):
    """A sharded index that follows the encoder."""

    @property
    def lexical(self) -> LexicalService | None:
        """The lexical index; None unless `retrieval.hybrid` asks for one."""
        ...

    def publish(self, weights_version: int, weights: dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
        """Hand out the passage encoder's weights of optimiser step `weights_version`; returns at once. `only` are the
        rising numbers of the passages to encode with them, while the others keep their vectors; None: all."""
        ...

    def wait_for_version(
        self,
        weights_version: int,
        timeout_s: float,
        report: Callable[[int, str], None] = lambda encoded, doing: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait until a generation of that version or a newer one serves, or `stop` returns true; `report` gets the
        number of passages encoded since, and what is done with them (empty: they are encoded). Raises TimeoutError
        after `timeout_s` without progress."""
        ...

    def keep_newest(self) -> int:
        """Return the number of the newest generation on disk, which is kept for a checkpoint that names it; -1 if there
        is none, or if the service does not answer at once."""
        ...

    def save_generation(self, generation: int, timeout_s: float) -> str:
        """Make sure that `generation` is on disk; returns its directory."""
        ...

    def status(self) -> IndexStatus:
        """Return the newest known state; never waits."""
        ...


def dense_search(service: DenseIndex) -> Search:
    """Return a search by vectors alone."""
    return lambda numbers, queries, k, num_vectors=0, again=False: service.submit(queries, k, num_vectors)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """One batch of questions with its hits."""

    number: int  # number of the batch in the stream
    questions: np.ndarray  # int64 [batch]: question numbers
    hits: Hits
    wait_s: float  # Seconds that training waited for the search
    rescore_s: float = 0.0  # Seconds that training waited for scoring candidates again
    rescore_overlap: float | None = None  # Share of the index's k best that fresh scores leave among the k best


@dataclass(frozen=True)
class Rescored:
    """The best hits of a batch after their candidates were scored again."""

    hits: Hits
    overlap: float  # Share of the k best before that are among the k best after, mean over the batch
    seconds: float


Rescore = Callable[[np.ndarray, Hits], Rescored]  # question numbers and their candidates


@dataclass
class _InFlight:
    number: int
    questions: np.ndarray
    pending: PendingHits
    queries: np.ndarray | None  # None if a checkpoint remembered the hits


@dataclass
class _Known:
    """Hits that a checkpoint remembers, so that a resume trains on what the interrupted run would have."""

    hits: Hits

    def result(self) -> Hits:
        return self.hits


class Prefetcher:
    """Searches `depth` batches ahead: while one batch trains, the shards answer the next ones.

    `next()` hands out the oldest search, waiting for it if it must. Before that it submits further ones, with the
    encoder as it is now, so that the shards work while the caller trains. With depth 0 it searches when asked.
    `with_vectors` brings the indexed vectors of hits along, for a passage encoder that does not change.
    """

    def __init__(
        self,
        service: IndexService,
        batch_of: Callable[[int], np.ndarray],
        *,
        encode_questions: Callable[[np.ndarray], np.ndarray],
        k: int,
        depth: int,
        start: int = 0,
        with_vectors: bool = False,
        search: Search | None = None,
        is_living: Callable[[np.ndarray], np.ndarray] | None = None,
        rescore: Rescore | None = None,
        select: "Select | None" = None,
    ) -> None:
        """`search` starts the search of question numbers with vectors and k; None: the service's search by vectors
        alone. `is_living` tells which passage numbers are in the corpus; a batch is searched again if one of its hits
        was deleted meanwhile. When a batch is handed out, `rescore` chooses among the k candidates, and `select` puts
        the chosen ones in another order; both may be collective."""
        self.num_vectors = k if with_vectors else 0
        self.search = search or dense_search(service)
        self.is_living, self.select = is_living, select
        self.service, self.batch_of, self.encode_questions = service, batch_of, encode_questions
        self.k, self.depth, self.rescore = k, depth, rescore
        self.position = start  # number of the next batch to search
        self._queue: deque[_InFlight] = deque()

    def next(self) -> Searched:
        """Return the next batch with its hits."""
        if not self._queue:
            self._submit()
        first = self._queue.popleft()
        begin = time.perf_counter()
        hits = first.pending.result()
        if self.is_living is not None:
            hits = self._living(first, hits, self.is_living)
        wait_s = time.perf_counter() - begin
        while len(self._queue) < self.depth:
            self._submit()
        seconds, overlap = 0.0, None  # the shards search the next batches meanwhile
        if self.rescore is not None:
            again = self.rescore(first.questions, hits)
            hits, seconds, overlap = again.hits, again.seconds, again.overlap
        if self.select is not None:
            hits = self.select(first.questions, hits)
        return Searched(
            number=first.number,
            questions=first.questions,
            hits=hits,
            wait_s=wait_s,
            rescore_s=seconds,
            rescore_overlap=overlap,
        )

    def _submit(self) -> None:
        questions = self.batch_of(self.position)
        queries = self.encode_questions(questions)
        pending = self.search(questions, queries, self._depth(), num_vectors=self.num_vectors)
        self._queue.append(_InFlight(self.position, questions, pending, queries))
        self.position += 1

    def _living(self, item: _InFlight, hits: Hits, is_living: Callable[[np.ndarray], np.ndarray]) -> Hits:
        """Return `hits` unless one of them was deleted since. Then return the hits of another search with the same
        vectors (encoding is a collective, which other trainers do not join), or `hits` without the deleted ones if the
        vectors are not known."""
        living = (hits.ids < 0) | is_living(hits.ids)
        if living.all():
            return hits
        if item.queries is not None:
            return self.search(
                item.questions, item.queries, self._depth(), num_vectors=self.num_vectors, again=True
            ).result()
        order = np.argsort(~living, axis=1, kind="stable")
        return without(chosen(hits, order), ~np.take_along_axis(living, order, axis=1))

    def _depth(self) -> int:
        """Return `k`, or the number of all passages if so many were deleted that fewer are left."""
        return min(self.k, self.service.num_passages)

    def state(self) -> list[Hits]:
        """Return the hits of the batches searched ahead, in order; waits for them."""
        for item in self._queue:
            item.pending = _Known(item.pending.result())
        return [item.pending.result() for item in self._queue]

    def restore(self, ahead: list[Hits]) -> None:
        """Take over the hits of another prefetcher's `state()` as the next batches."""
        for hits in ahead:
            self._queue.append(_InFlight(self.position, self.batch_of(self.position), _Known(hits), None))
            self.position += 1
