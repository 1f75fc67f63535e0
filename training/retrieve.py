"""What the training loop asks of an index: hits for query vectors now, and a newer index later.

The loop produces query vectors and encoder weights; the service (Ray actors in a run, a plain object in a test)
answers searches and rebuilds itself. `submit` and `publish` return at once; the only calls that wait are
`PendingHits.result`, `wait_for_version` and `save_generation`, and each wait is bounded.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from indexing.merge import Hits

if TYPE_CHECKING:
    from training.hybrid import LexicalService, Search
    from training.rerank import Select


@dataclass(frozen=True)
class IndexStatus:
    """A cheap, possibly slightly old, view of the index for the metrics."""

    generation: int
    weights_version: int
    generations_committed: int  # in this run
    refresh_seconds: float  # of the newest committed generation
    refresh_passages_per_s: float
    failures: int


class PendingHits(Protocol):
    """A search under way."""

    def result(self) -> Hits:
        """Wait for the hits. Raises TimeoutError that names `index.search_timeout_s`."""
        ...


class IndexService(Protocol):
    """A sharded index that follows the encoder."""

    num_passages: int
    lexical: "LexicalService | None"  # where retrieval.hybrid asks for one

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> PendingHits:
        """Start a search of float32 `queries` [batch, dim]; every query is answered by one generation. The first
        `num_vectors` hits come with their vectors, where the kind of index keeps them."""
        ...

    def vectors(self, ids: np.ndarray, generation: int) -> np.ndarray | None:
        """float32 [..., dim]: the indexed vectors of passages `ids` int64 [...] in `generation`, zeros for -1; None
        where the kind of index keeps none. Raises GenerationGone, and TimeoutError as a search does."""
        ...

    def publish(self, weights_version: int, weights: dict[str, np.ndarray]) -> None:
        """Hand out the passage encoder's weights of optimiser step `weights_version`; returns at once."""
        ...

    def wait_for_version(
        self, weights_version: int, timeout_s: float, told: Callable[[int], None] = lambda _: None
    ) -> None:
        """Wait until a generation of that version or a newer one serves; `told` hears how many passages were encoded
        since. Raises TimeoutError after `timeout_s` without a further passage."""
        ...

    def save_generation(self, generation: int, timeout_s: float) -> str:
        """Make sure that `generation` is on disk; returns its directory."""
        ...

    def status(self) -> IndexStatus:
        """The newest known state; never waits."""
        ...


@dataclass(frozen=True)
class Searched:
    """One batch of questions with its hits."""

    number: int  # of the batch in the stream
    questions: np.ndarray  # int64 [batch]: question numbers
    hits: Hits
    wait_s: float  # that training stood still for the search


@dataclass
class _InFlight:
    number: int
    questions: np.ndarray
    pending: PendingHits


@dataclass
class _Known:
    """Hits that a checkpoint remembers, so that a resume trains on what the interrupted run would have."""

    hits: Hits

    def result(self) -> Hits:
        return self.hits


class Prefetcher:
    """Searches `depth` batches ahead: while one batch trains, the shards answer the next ones.

    `next()` hands out the oldest search, waiting for it if it must, and submits further ones first with the encoder as
    it is now; the shards work while the caller trains. With depth 0 it searches when asked. `with_vectors`: hits bring
    their indexed vectors along, for a passage encoder that does not change.
    """

    def __init__(
        self,
        service: IndexService,
        batch_of: Callable[[int], np.ndarray],
        encode_questions: Callable[[np.ndarray], np.ndarray],
        k: int,
        depth: int,
        start: int = 0,
        with_vectors: bool = False,
        search: "Search | None" = None,
        select: "Select | None" = None,
    ) -> None:
        """`search` starts the search of question numbers with vectors and k; None: the service's own, whatever the
        numbers are. `select` puts the hits of a batch in another order when the batch is handed out."""
        self.num_vectors = k if with_vectors else 0
        self.search = search or (lambda _, queries, k, num_vectors=0: service.submit(queries, k, num_vectors))
        self.select = select
        self.service, self.batch_of, self.encode_questions = service, batch_of, encode_questions
        self.k, self.depth = k, depth
        self.position = start  # number of the next batch to search
        self._queue: deque[_InFlight] = deque()

    def next(self) -> Searched:
        """The next batch with its hits."""
        if not self._queue:
            self._submit()
        first = self._queue.popleft()
        begin = time.perf_counter()
        hits = first.pending.result()
        wait_s = time.perf_counter() - begin
        while len(self._queue) < self.depth:
            self._submit()
        if self.select is not None:
            hits = self.select(first.questions, hits)
        return Searched(first.number, first.questions, hits, wait_s)

    def _submit(self) -> None:
        questions = self.batch_of(self.position)
        pending = self.search(questions, self.encode_questions(questions), self.k, self.num_vectors)
        self._queue.append(_InFlight(self.position, questions, pending))
        self.position += 1

    def state(self) -> list[Hits]:
        """Hits of the batches searched ahead, in order; waits for them."""
        for item in self._queue:
            item.pending = _Known(item.pending.result())
        return [item.pending.result() for item in self._queue]

    def restore(self, ahead: list[Hits]) -> None:
        """Take over the hits of another prefetcher's `state()` as the next batches."""
        for hits in ahead:
            self._queue.append(_InFlight(self.position, self.batch_of(self.position), _Known(hits)))
            self.position += 1
