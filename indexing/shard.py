"""One contiguous range of passages with its own FAISS index, in at most two committed generations and one staged.

Who produces: refresh workers call `stage` with vectors of chunks, in any order, some twice. The coordinator calls
`prepare` when all rows are there (this builds the index), `commit` when every shard has prepared, and `release` when
no request names the previous generation any more. Who consumes: clients call `search`.

What waits on what: `stage`, `prepare`, `abort` and `commit` take turns on the staging lock, which `prepare` holds
while it builds. `search` never takes it: it takes the table lock twice, for the moment of pinning a generation and of
unpinning it, and holds no lock inside FAISS. `release` takes a generation off the table at once and waits, with a
bound, until the last search that pinned it is done; that search's end unblocks it.
"""

import itertools
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexing.build import Index
from indexing.merge import ShardHits
from indexing.settings import IndexConfig
from indexing.snapshot import is_complete, verify, write_once
from indexing.staging import Staging

MAX_COMMITTED = 2
INDEX_FILE = "index.faiss"


class GenerationGone(Exception):
    """The generation asked for is not, or no longer, served; `committed` is the newest that is (-1: none)."""

    def __init__(self, generation: int, committed: int) -> None:
        super().__init__(generation, committed)
        self.generation, self.committed = generation, committed

    def __str__(self) -> str:
        return f"generation {self.generation} is not served, the newest is {self.committed}"


@dataclass(frozen=True)
class ShardStatus:
    """A view of one shard. -1 stands for no generation."""

    shard_number: int
    start: int  # first passage number
    stop: int  # after the last
    committed: int  # newest committed generation
    generations: dict[int, int]  # served generation -> weights version
    staged: int  # generation that is being staged
    staged_weights_version: int
    staged_rows: int
    prepared: bool  # the staged generation could be committed
    in_flight: int  # searches and saves under way


@dataclass
class _Served:
    index: Index
    weights_version: int
    users: int = 0
    released: bool = False


class Shard:
    """Passages `start` to `stop` - 1. Every method may be called from any thread."""

    def __init__(self, shard_number: int, start: int, stop: int, config: IndexConfig, seed: int = 0) -> None:
        if not 0 <= start < stop:
            raise ValueError(f"shard {shard_number} cannot hold passages {start} to {stop - 1}")
        self.shard_number, self.start, self.stop = shard_number, start, stop
        self._config, self._seed = config, seed + shard_number
        self._staging_lock = threading.Lock()
        self._table = threading.Condition()
        self._served: dict[int, _Served] = {}  # guarded by _table
        self._staging: Staging | None = None  # replaced under both locks, filled under _staging_lock

    def stage(self, generation: int, weights_version: int, start: int, vectors: np.ndarray) -> None:
        """Take the vectors of passages `start`, `start` + 1, ...: float32 [n, dim].

        Taking rows again is harmless. A newer generation, or the same one from newer weights, replaces one that was
        not prepared. Rows of a generation that is prepared or committed already are dropped. Raises ValueError for
        rows outside the shard, a wrong dimension, and a generation that was overtaken.
        """
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise ValueError(f"staged vectors have shape {vectors.shape}: needed is [n, dim]")
        if start < self.start or start + len(vectors) > self.stop:
            raise ValueError(
                f"passages {start} to {start + len(vectors) - 1} are not in shard {self.shard_number}, "
                f"which holds {self.start} to {self.stop - 1}"
            )
        with self._staging_lock:
            staging = self._staging_for(generation, weights_version, vectors.shape[1])
            if staging is not None and staging.index is None:
                staging.fill(start, vectors)

    def staged_rows(self, generation: int) -> int:
        """How many different rows of `generation` are staged; all of them once it is prepared or committed."""
        with self._table:
            if generation in self._served:
                return self.stop - self.start
            staging = self._staging
            return staging.num_filled if staging is not None and staging.generation == generation else 0

    def prepare(self, generation: int) -> None:
        """Build the index of a generation whose rows are all staged. Does nothing the second time.

        Raises ValueError when rows are missing, or hold NaN or infinity, naming counts and the first passage number.
        """
        with self._staging_lock:
            staging = self._staging
            if self._is_served(generation) or (staging and staging.generation == generation and staging.index):
                return
            if staging is None or staging.generation != generation:
                raise ValueError(f"generation {generation} is not staged on shard {self.shard_number}")
            staging.build(self._config, self._seed)

    def commit(self, generation: int) -> None:
        """Serve a prepared generation as the newest. Does nothing the second time.

        Raises ValueError when it is not prepared, not newer than what serves, or when two generations serve already.
        """
        with self._staging_lock, self._table:
            if generation in self._served and not self._served[generation].released:
                return
            staging = self._staging
            if staging is None or staging.generation != generation or staging.index is None:
                raise ValueError(f"generation {generation} is not prepared on shard {self.shard_number}")
            if generation <= self._newest():
                raise ValueError(f"generation {generation} is not newer than {self._newest()}")
            self._add(generation, _Served(staging.index, staging.weights_version))
            self._staging = None

    def abort(self, generation: int) -> None:
        """Drop what is staged of `generation`; nothing happens to one that is committed."""
        with self._staging_lock, self._table:
            if self._staging is not None and self._staging.generation == generation:
                self._staging = None

    def release(self, generation: int, timeout_s: float = 60.0) -> None:
        """Stop serving `generation` and free it when the searches under way are done.

        Does nothing for one that is not there. Raises ValueError for the newest one, which nothing would replace, and
        TimeoutError when a search takes longer than `timeout_s` (its end frees the generation then).
        """
        with self._table:
            served = self._served.get(generation)
            if served is None:
                return
            if generation == self._newest():
                raise ValueError(f"generation {generation} is the newest on shard {self.shard_number}: it has to serve")
            served.released = True
            self._free(generation)
            if not self._table.wait_for(lambda: self._served.get(generation) is not served, timeout_s):
                raise TimeoutError(f"generation {generation} still has {served.users} users after {timeout_s:g} s")

    def search(self, queries: np.ndarray, k: int, generation: int | None = None, num_vectors: int = 0) -> ShardHits:
        """The best `k` passages of this shard, or all where it has fewer, from `generation` (None: the newest); with
        the indexed vectors of the first `num_vectors`, where the kind of index keeps them.

        `queries` float32 [batch, dim]. Raises GenerationGone, and ValueError for a wrong shape, NaN or k < 1.
        """
        if k < 1:
            raise ValueError(f"retrieval.k is {k}: allowed is 1 or more")
        with self._pinned(generation) as (number, served):
            scores, rows = served.index.search(queries, min(k, served.index.num_vectors))
            vectors = served.index.vectors(rows[:, :num_vectors]) if num_vectors else None
        ids = np.where(rows < 0, -1, rows + self.start)
        with self._table:
            return ShardHits(ids, scores, number, served.weights_version, self._newest(), vectors)

    def vectors(self, ids: np.ndarray, generation: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Places in `ids` int64 [n] of this shard's passages, and their indexed vectors float32 [found, dim]; None
        where the kind of index keeps none at hand. Raises GenerationGone."""
        with self._pinned(generation) as (_, served):
            places = np.flatnonzero((ids >= self.start) & (ids < self.stop))
            found = served.index.vectors(ids[places] - self.start)
            return None if found is None else (places, found)

    def save(self, generation: int, directory: str | Path) -> Path:
        """Write `generation` to `DIRECTORY/shard-NNNN`, sealed by a manifest, unless it is there; returns that path.

        Raises GenerationGone, OSError with the path where the disk is full, ValueError where another one is there.
        """
        path = Path(directory) / f"shard-{self.shard_number:04d}"
        with self._pinned(generation) as (number, served):
            extra = {
                "kind": "index shard",
                "generation": number,
                "weights_version": served.weights_version,
                "start": self.start,
                "stop": self.stop,
                "factory": self._config.factory,
                "dim": served.index.dim,
            }
            if path.exists():
                if is_complete(path):
                    self._check_saved(path, verify(path, contents=False), number)
                    return path
                shutil.rmtree(path)
            with write_once(path, extra) as temporary:
                served.index.write(temporary / INDEX_FILE)
        return path

    def load(self, generation: int, directory: str | Path) -> int:
        """Serve what `save` wrote to `directory`; returns its weights version. Does nothing for one that serves.

        Raises TornSnapshot where a bit is wrong, ValueError where it is another shard, range, factory or generation.
        """
        path = Path(directory) / f"shard-{self.shard_number:04d}"
        with self._table:
            if generation in self._served and not self._served[generation].released:
                return self._served[generation].weights_version
        extra = verify(path)
        self._check_saved(path, extra, generation)
        index = Index.read(path / INDEX_FILE, self._config)
        if (index.num_vectors, index.dim) != (self.stop - self.start, extra["dim"]):
            raise ValueError(f"{path} holds {index.num_vectors} vectors: needed are {self.stop - self.start}")
        with self._table:
            if generation not in self._served:
                self._add(generation, _Served(index, extra["weights_version"]))
        return extra["weights_version"]

    def status(self) -> ShardStatus:
        """What is served and staged now; never waits for a search, a save or a build."""
        with self._table:
            staging = self._staging
            return ShardStatus(
                shard_number=self.shard_number,
                start=self.start,
                stop=self.stop,
                committed=self._newest(),
                generations={number: one.weights_version for number, one in self._served.items() if not one.released},
                staged=-1 if staging is None else staging.generation,
                staged_weights_version=-1 if staging is None else staging.weights_version,
                staged_rows=0 if staging is None else staging.num_filled,
                prepared=staging is not None and staging.index is not None,
                in_flight=sum(one.users for one in self._served.values()),
            )

    @contextmanager
    def _pinned(self, generation: int | None) -> Iterator[tuple[int, _Served]]:
        """Keep a generation from being freed while the block runs. Raises GenerationGone."""
        with self._table:
            number = self._newest() if generation is None else generation
            served = self._served.get(number)
            if served is None or served.released:
                raise GenerationGone(number, self._newest())
            served.users += 1
        try:
            yield number, served
        finally:
            with self._table:
                served.users -= 1
                if served.released:
                    self._free(number)

    def _free(self, generation: int) -> None:
        """Forget a released generation without users. Call with the table lock held."""
        served = self._served.get(generation)
        if served is not None and served.released and not served.users:
            del self._served[generation]
            self._table.notify_all()

    def _add(self, generation: int, served: _Served) -> None:
        """Put a generation on the table. Call with the table lock held."""
        if len(self._served) >= MAX_COMMITTED:
            raise ValueError(
                f"shard {self.shard_number} serves generations {sorted(self._served)}: release the older one before "
                f"{generation} comes"
            )
        for number, other in self._served.items():
            if other.index.dim != served.index.dim:
                raise ValueError(
                    f"generation {number} has {other.index.dim} dimensions, {generation} {served.index.dim}"
                )
        self._served[generation] = served
        self._table.notify_all()

    def _newest(self) -> int:
        """The newest committed generation, -1 without one. Call with the table lock held."""
        return max((number for number, served in self._served.items() if not served.released), default=-1)

    def _is_served(self, generation: int) -> bool:
        with self._table:
            return generation in self._served and not self._served[generation].released

    def _staging_for(self, generation: int, weights_version: int, dim: int) -> Staging | None:
        """Where rows of this generation go, None where they come too late. Call with the staging lock held."""
        with self._table:
            newest, staging = self._newest(), self._staging
            dims = {served.index.dim for served in self._served.values()}
            committed = self._served.get(generation)
        if committed is not None and committed.weights_version == weights_version:
            return None
        if generation <= newest:
            raise ValueError(
                f"generation {generation} is not newer than {newest}, which shard {self.shard_number} serves"
            )
        key = (generation, weights_version)
        if staging is not None and key <= staging.key:
            if key < staging.key:
                raise ValueError(f"generation, weights version {key} was overtaken by {staging.key}")
            if staging.index is not None:
                return staging
            dims = {staging.dim}
        elif staging is not None and staging.index is not None:
            raise ValueError(
                f"generation {staging.generation} is prepared: commit or abort it before {generation} is staged"
            )
        if dims - {dim}:
            raise ValueError(f"staged vectors have {dim} dimensions: needed are {dims.pop()}")
        if staging is None or key != staging.key:
            staging = Staging(generation, weights_version, self.start, self.stop - self.start, dim)
            with self._table:
                self._staging = staging
        return staging

    def _check_saved(self, path: Path, extra: dict, generation: int) -> None:
        wanted = {
            "kind": "index shard",
            "generation": generation,
            "start": self.start,
            "stop": self.stop,
            "factory": self._config.factory,
        }
        for name, value in wanted.items():
            if extra.get(name) != value:
                raise ValueError(f"{path} has {name} {extra.get(name)!r}: needed is {value!r}")


def shard_ranges(num_passages: int, num_shards: int) -> list[tuple[int, int]]:
    """(start, stop) of each shard: contiguous, sizes equal but for one. Raises ValueError for too many shards."""
    if not 1 <= num_shards <= num_passages:
        raise ValueError(
            f"index.num_shards is {num_shards} for {num_passages} passages: allowed are 1 to {num_passages}"
        )
    bounds = [num_passages * number // num_shards for number in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))
