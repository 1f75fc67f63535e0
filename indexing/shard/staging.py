"""Holds the next generation of one shard while its rows arrive. No locks: `indexing/shard/shard.py` holds one around
every call."""

from dataclasses import dataclass

import numpy as np

from indexing.dense.build_time import build_seconds
from indexing.dense.faiss_build import bad_rows
from indexing.indexing_settings import IndexConfig
from indexing.shard.generation import Generation, build_base
from indexing.shard.waiting import WaitingVectors


@dataclass(frozen=True, kw_only=True)
class StagingStatus:
    """A view of a generation that is being staged."""

    generation: int
    weights_version: int
    corpus_version: int
    rows: int  # Number of different rows that are staged
    wanted: int  # Number of rows that the generation will have
    prepared: bool  # the generation could be committed


class Staging:
    """Vectors of the passages of one generation, or of those in which it differs from another one (`origin`), and
    exactly which have arrived."""

    def __init__(
        self,
        generation: int,
        weights_version: int,
        *,
        corpus_version: int,
        start: int,
        numbers: np.ndarray | int,
        config: IndexConfig,
        dim: int = 0,
        origin: Generation | None = None,
        source: int = -1,
    ) -> None:
        """`numbers`: the passages, sorted, or how many from `start` on. `dim`: 0 where it is not known yet. `source`:
        number of the generation that `origin` is."""
        self.generation, self.weights_version, self.corpus_version = generation, weights_version, corpus_version
        self.start, self.numbers = start, None if isinstance(numbers, int) else numbers
        self.num_rows = numbers if isinstance(numbers, int) else len(numbers)
        self.dim, self.origin, self.source = dim, origin, source
        self.num_filled = 0  # different rows that have arrived
        self.built: Generation | None = None  # once `build` has run
        self._config = config
        self._vectors = self._room() if dim else None
        self._versions = np.zeros(0 if origin is None else self.num_rows, np.int64)
        self._filled = np.zeros(self.num_rows, bool)
        self._broken = np.zeros(self.num_rows, bool)  # arrived with NaN or infinity

    @property
    def key(self) -> tuple[int, int]:
        """Return the order of attempts: the generation, then the weights version."""
        return self.generation, self.weights_version

    def status(self) -> StagingStatus:
        """Return how far the staging is."""
        return StagingStatus(
            generation=self.generation,
            weights_version=self.weights_version,
            corpus_version=self.corpus_version,
            rows=self.num_filled,
            wanted=self.num_rows,
            prepared=self.built is not None,
        )

    def fill(self, numbers: np.ndarray, vectors: np.ndarray, version: int) -> None:
        """Take vectors of passages; rows that came before are replaced, and passages that do not belong here
        dropped."""
        if not self.dim:
            self.dim = vectors.shape[1]
            self._vectors = self._room()
        if not self.num_rows or self._vectors is None:
            return
        if self.numbers is None:
            rows = numbers - self.start
            here = (rows >= 0) & (rows < self.num_rows)
        else:
            rows = np.minimum(np.searchsorted(self.numbers, numbers), self.num_rows - 1)
            here = self.numbers[rows] == numbers
        if not here.all():
            rows, vectors = rows[here], vectors[here]
        if isinstance(self._vectors, WaitingVectors):
            self._vectors.put(rows, vectors)
        else:
            self._vectors[rows] = vectors
        self._broken[rows] = False
        self._broken[rows[bad_rows(vectors)]] = True
        self._filled[rows] = True
        if self.origin is not None:
            self._versions[rows] = version
        self.num_filled = int(np.count_nonzero(self._filled))

    @property
    def expected_s(self) -> float:
        """Return about how many seconds `build` takes."""
        return build_seconds(self._config, max(self.num_rows, 1), max(self.dim, 1)) if self.origin is None else 0.0

    def build(self, seed: int, recent: np.ndarray | None = None) -> None:
        """Build the generation, measure a new big index with the `recent` queries [any, dim], and let the vectors go.
        Raises ValueError for missing rows and numbers that are not finite."""
        if missing := self.num_rows - self.num_filled:
            raise ValueError(
                f"generation {self.generation} has {self.num_filled} of {self.num_rows} rows, {missing} are missing: "
                f"first passage {self._number(int(self._filled.argmin()))}"
            )
        if self._broken.any():
            raise ValueError(
                f"generation {self.generation} has {int(self._broken.sum())} vectors that are not finite, "
                f"first passage {self._number(int(self._broken.argmax()))}"
            )
        version, corpus = self.weights_version, self.corpus_version
        if self.origin is None:
            waiting = self._vectors if isinstance(self._vectors, WaitingVectors) else self._waiting()
            base = build_base(
                waiting,
                self.start,
                numbers=self.numbers,
                generation=self.generation,
                weights_version=version,
                corpus_version=corpus,
                seed=seed,
                recent=recent,
            )
            self.built = Generation(base, None, version, corpus)
        else:
            assert self.numbers is not None
            delta = self._vectors if isinstance(self._vectors, np.ndarray) else np.empty((0, self.dim), np.float32)
            self.built = self.origin.derive(
                self.numbers,
                delta,
                versions=self._versions,
                weights_version=version,
                corpus_version=corpus,
                config=self._config,
            )
        self._vectors = None

    def _room(self) -> "WaitingVectors | np.ndarray":
        """Return memory for vectors: of a whole generation where its big index will be, of a delta beside it."""
        return self._waiting() if self.origin is None else np.empty((self.num_rows, self.dim), np.float32)

    def _waiting(self) -> WaitingVectors:
        return WaitingVectors(self.num_rows, self.dim, self._config)

    def _number(self, row: int) -> int:
        return self.start + row if self.numbers is None else int(self.numbers[row])
