"""Serves one shard of the passages with a FAISS index: a few committed generations, and the staged rows of the next.

A shard owns a contiguous range of the base corpus, and every so many-th of the passages added to it later. A generation
is either built (`begin`, all its rows are staged, `prepare` builds a new big index) or derived from another one
(`derive`, only the rows in which it differs are staged; it shares the big index, see `indexing/shard/generation.py`).
One of each may be staged at the same time. Either is then prepared, committed or aborted, and released, by its number.

Who produces: refresh workers call `stage` with vectors of chunks, in any order, some twice. The coordinator calls
`begin` or `derive`, `prepare` when all rows are there, `commit` when every shard has prepared, `release` when no
request names the generation before any more, and `hide` when passages were deleted: no generation returns them from
then on, be it old or new. Who consumes: clients call `search`.

What waits on what: what concerns a generation that is built takes turns on the staging lock, which `prepare` holds
while it builds; what concerns one that is derived, on the delta lock. `search` takes neither: it takes the table lock
twice, for the moment of pinning a generation and of unpinning it, and holds no lock inside FAISS. Who waits for
searches: `indexing/shard/serving.py`.
"""

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.snapshot import is_complete, verify
from indexing.corpus.stores.filters import Filter
from indexing.corpus.stores.metadata import MetadataColumns
from indexing.declare import refuse
from indexing.dense.probe import UNKNOWN, RecentQueries
from indexing.hits import CorpusState, ShardHits, ShardIndexed
from indexing.indexing_settings import IndexConfig
from indexing.shard.generation import Generation, Passes
from indexing.shard.long_steps import DISK_BYTES_PER_S, LongSteps
from indexing.shard.reshard import fits, load_range
from indexing.shard.serving import GenerationGone, ServingTable
from indexing.shard.shard_files import SHARD_PREFIX, check_saved, read_generation, write_generation
from indexing.shard.shard_status import ShardStatus
from indexing.shard.staging import Staging


class NotBegun(Exception):
    """Raised if rows come for a generation whose passages this shard does not know: it came back empty since."""


class Shard:
    """Serves passages `start` to `stop` - 1 of the base corpus, and some added ones. Every method may be called from
    any thread."""

    def __init__(
        self,
        shard_number: int,
        start: int,
        stop: int,
        config: IndexConfig,
        *,
        seed: int = 0,
        metadata: MetadataColumns | None = None,
    ) -> None:
        """Make an empty shard. `metadata` is that of its passages, for searches with a filter."""
        if not 0 <= start < stop:
            raise ValueError(f"shard {shard_number} cannot hold passages {start} to {stop - 1}")
        self.shard_number, self.start, self.stop = shard_number, start, stop
        self._config, self._seed, self._metadata = config, seed + shard_number, metadata
        self._recent = RecentQueries(config.probe_queries)
        self._steps = LongSteps()
        self._staging_lock, self._delta_lock = threading.Lock(), threading.Lock()
        self._serving = ServingTable(shard_number)
        self._table = self._serving.lock
        self._staging: Staging | None = None  # replaced under _table and, to be filled, under _staging_lock
        self._deriving: Staging | None = None  # likewise, under _delta_lock

    def begin(
        self, generation: int, weights_version: int, numbers: np.ndarray | None = None, corpus_version: int = 0
    ) -> None:
        """Say which passages a generation that is to be built will have: int64, sorted; None: `start` to `stop` - 1.

        Harmless when repeated. Without this call a generation is one of all passages of the base. Raises ValueError for
        a generation that was overtaken.
        """
        with self._staging_lock:
            self._open_staging(generation, weights_version, 0, (numbers, corpus_version))

    def derive(
        self,
        generation: int,
        origin: int,
        numbers: np.ndarray,
        weights_version: int | None = None,
        corpus_version: int | None = None,
    ) -> None:
        """Begin a generation that is `origin` (served, or staged and prepared) but for the passages `numbers` (int64,
        sorted; may be none): new ones are added, others replace what they were. What `stage` then brings, each with its
        own weights version, is put into the delta; the big index is shared.

        `weights_version` and `corpus_version` are those that the generation as a whole goes by; None: the origin's.
        Takes the place of an older one that was not committed. Raises GenerationGone where the origin is not here, and
        ValueError for a generation that is not newer than what serves.
        """
        with self._delta_lock, self._table:
            if generation in self._serving.served:
                return
            newest = self._serving.newest()
            if generation <= newest:
                raise ValueError(f"generation {generation} is not newer than {newest}")
            found = self._find(origin)
            if found is None:
                raise GenerationGone(origin, newest)
            weights = found.weights_version if weights_version is None else weights_version
            corpus = found.corpus_version if corpus_version is None else corpus_version
            self._deriving = Staging(
                generation,
                weights,
                corpus_version=corpus,
                start=self.start,
                numbers=numbers,
                config=self._config,
                dim=found.dim,
                origin=found,
                source=origin,
            )

    def stage(self, generation: int, weights_version: int, start: int | np.ndarray, vectors: np.ndarray) -> None:
        """Take the vectors of passages `start`, `start` + 1, ..., or of the passage numbers `start` (int64 [n]):
        float32 [n, dim], encoded with weights of `weights_version`.

        Taking rows again is harmless. A newer generation, or the same one from newer weights, replaces one that was
        not prepared. Rows of a generation that is prepared or committed already are dropped. Raises ValueError for
        rows outside the shard, a wrong dimension, and a generation that was overtaken, NotBegun for passages beyond the
        base before `begin` or `derive` was called.
        """
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise ValueError(f"staged vectors have shape {vectors.shape}: needed is [n, dim]")
        numbers = np.arange(start, start + len(vectors)) if isinstance(start, int) else np.asarray(start, np.int64)
        with self._delta_lock:
            deriving = self._deriving
            if deriving is not None and deriving.generation == generation:
                if deriving.built is None:
                    self._check_dim(deriving.dim, vectors)
                    deriving.fill(numbers, vectors, weights_version)
                return
        with self._staging_lock:
            staging = self._staging
            begun = staging is not None and staging.generation == generation
            if not begun and not isinstance(start, int) and not self._is_served(generation):
                raise NotBegun(f"shard {self.shard_number} does not know the passages of generation {generation}")
            if isinstance(start, int) and (start < self.start or start + len(vectors) > self.stop):
                raise ValueError(
                    f"passages {start} to {start + len(vectors) - 1} are not in shard {self.shard_number}, "
                    f"which holds {self.start} to {self.stop - 1}"
                )
            staging = self._open_staging(generation, weights_version, vectors.shape[1])
            if staging is not None and staging.built is None:
                staging.fill(numbers, vectors, weights_version)

    def staged_rows(self, generation: int) -> int:
        """Return the number of different rows of `generation` that are staged; all once it is prepared or committed."""
        with self._table:
            served = self._serving.served.get(generation)
            if served is not None:
                return served.generation.base.num_rows
            for staging in (self._staging, self._deriving):
                if staging is not None and staging.generation == generation:
                    return staging.num_filled
            return 0

    def prepare(self, generation: int) -> None:
        """Build the index of a generation whose rows are all staged. Does nothing the second time.

        Raises ValueError when rows are missing, or hold NaN or infinity, naming counts and the first passage number.
        """
        if self._is_served(generation):
            return
        with self._delta_lock:
            deriving = self._deriving
            if deriving is not None and deriving.generation == generation:
                if deriving.built is None:
                    deriving.build(self._seed)
                return
        with self._staging_lock:
            staging = self._staging
            if staging is None or staging.generation != generation:
                raise ValueError(f"generation {generation} is not staged on shard {self.shard_number}")
            if staging.built is None:
                with self._steps.under_way("prepare", generation, staging.expected_s):
                    staging.build(self._seed, self._recent.take(staging.dim))

    def commit(self, generation: int) -> None:
        """Serve a prepared generation as the newest. Does nothing the second time.

        Raises ValueError when it is not prepared, not newer than what serves, or when two big indexes serve already.
        """
        with self._table:
            if self._serving.is_open(generation):
                return
            ready = [one for one in (self._staging, self._deriving) if one is not None and one.generation == generation]
            if not ready or ready[0].built is None:
                raise ValueError(f"generation {generation} is not prepared on shard {self.shard_number}")
            if generation <= self._serving.newest():
                raise ValueError(f"generation {generation} is not newer than {self._serving.newest()}")
            self._serving.add(generation, ready[0].built)
            self._drop(generation, ready[0].source)

    def abort(self, generation: int) -> None:
        """Drop what is staged of `generation`; nothing happens to one that is committed."""
        with self._table:
            self._drop(generation)

    def release(self, generation: int, timeout_s: float = 60.0) -> None:
        """Stop serving `generation` and free it when the searches under way are done.

        Does nothing for one that is not there. Raises ValueError for the newest one, which nothing would replace, and
        TimeoutError when a search takes longer than `timeout_s` (its end frees the generation then).
        """
        self._serving.release(generation, timeout_s)

    def hide(self, corpus_version: int, numbers: np.ndarray, timeout_s: float = 60.0) -> None:
        """Return none of `numbers` (int64, sorted: everything that was deleted up to this version) any more, from
        whichever generation; searches that began before are over when this returns.

        An older version than one that is known changes nothing. Raises TimeoutError when a search under way takes
        longer than `timeout_s`; it is the last that may return them.
        """
        self._serving.hide(corpus_version, numbers, timeout_s)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        generation: int | None = None,
        num_vectors: int = 0,
        where: Filter | None = None,
    ) -> ShardHits:
        """Return the best `k` passages of this shard, or all if it has fewer, from `generation` (None: the newest),
        with the indexed vectors of the first `num_vectors` if the kind of index keeps them. `where` leaves the
        passages that pass the filter.

        `queries` float32 [batch, dim]. Raises GenerationGone, and ValueError for a wrong shape, NaN, k < 1, or a filter
        that asks for a field that no passage has.
        """
        if k < 1:
            raise refuse("retrieval.k", k, "must be at least 1")
        passes = None if where is None else self._passes(where)
        with self._serving.pinned(generation) as (number, found), self._serving.counted() as hidden:
            view = found.view(where, passes)
            scores, ids, vectors, versions = found.search(queries, k, num_vectors, view)
        self._recent.add(queries)
        num_allowed = -1 if where is None else view.num_rows
        with self._table:
            return ShardHits(
                ids=ids,
                scores=scores,
                generation=number,
                weights_version=found.weights_version,
                committed=self._serving.newest(),
                vectors=vectors,
                versions=versions,
                num_living=found.num_living,
                num_allowed=num_allowed,
                corpus=CorpusState(found.corpus_version, hidden),
            )

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> ShardIndexed:
        """Return what this shard has of the passages `ids` int64 [n] in `generation`. Raises GenerationGone."""
        with self._serving.pinned(generation) as (_, found):
            return found.indexed(ids, with_vectors)

    def save(self, generation: int, directory: str | Path, earlier: str | Path | None = None) -> Path:
        """Write `generation` to `DIRECTORY/shard-NNNN`, sealed by a manifest, unless it is there; returns that path.

        `earlier`: the directory of another generation on disk; where that shares its big index with this one, it is
        linked instead of written again. Raises GenerationGone, OSError with the path where the disk is full, or while
        this shard still writes another one, ValueError where another one is there.
        """
        name, place = f"{SHARD_PREFIX}{self.shard_number:04d}", self._place()
        path = Path(directory) / name
        with self._serving.pinned(generation) as (number, found):
            if is_complete(path):
                check_saved(path, verify(path, contents=False), generation=number, **place)
                return path
            other = None if earlier is None else Path(earlier) / name
            place["num_shards"] = self._config.num_shards
            with self._steps.under_way(
                "save", number, found.figures.bytes_per_passage * found.num_living / DISK_BYTES_PER_S, alone=True
            ):
                if path.exists():
                    shutil.rmtree(path)
                write_generation(path, number, generation=found, place=place, earlier=other)
        return path

    def load(self, generation: int, directory: str | Path) -> int:
        """Serve what `save` wrote to `directory`, also that of another number of shards (`indexing/shard/reshard.py`);
        returns its weights version. Does nothing for one that serves.

        Raises TornSnapshot where a bit is wrong, ValueError where it is another range, factory or generation.
        """
        path = Path(directory) / f"{SHARD_PREFIX}{self.shard_number:04d}"
        with self._table:
            if self._serving.is_open(generation):
                return self._serving.served[generation].generation.weights_version
        fitting = fits(
            directory, self.shard_number, start=self.start, stop=self.stop, num_shards=self._config.num_shards
        )
        num_bytes = sum(file.stat().st_size for file in (path if fitting else Path(directory)).rglob("*"))
        with self._steps.under_way("load", generation, num_bytes / DISK_BYTES_PER_S):
            if fitting:
                check_saved(path, verify(path, contents=False), generation=generation, **self._place())
                found, _ = read_generation(path, self._config)
            else:
                bounds = self.start, self.stop
                found = load_range(directory, self.shard_number, *bounds, generation, self._config, self._seed)
        with self._table:
            if generation not in self._serving.served:
                self._serving.add(generation, found)
        return found.weights_version

    def status(self) -> ShardStatus:
        """Return what is served and staged now; never waits for a search, a save or a build."""
        with self._table:
            staging, deriving, newest = self._staging, self._deriving, self._serving.newest()
            open_ones = self._serving.open_ones()
            serving = open_ones.get(newest)
            return ShardStatus(
                shard_number=self.shard_number,
                start=self.start,
                stop=self.stop,
                committed=newest,
                generations={number: one.weights_version for number, one in open_ones.items()},
                in_flight=sum(one.users for one in self._serving.served.values()),
                building=None if staging is None else staging.status(),
                deriving=None if deriving is None else deriving.status(),
                corpora={number: one.corpus_version for number, one in open_ones.items()},
                hidden=self._serving.hidden_version,
                num_living=0 if serving is None else serving.num_living,
                oldest_version=-1 if serving is None else serving.oldest_version,
                figures=UNKNOWN if serving is None else serving.figures,
                steps=self._steps.now(),
            )

    def _passes(self, where: Filter) -> Passes:
        """Return a function that tells which passages pass. The base corpus is filtered here, before the search is
        counted, so that `hide` does not wait for it. Raises ValueError."""
        metadata = self._metadata
        if metadata is None:
            raise refuse("retrieval.where", where, f"must be empty: shard {self.shard_number} knows no metadata")
        metadata.mask(where)
        return lambda numbers: metadata.passes(where, numbers)

    def _place(self) -> dict[str, Any]:
        """Return the facts by which a saved shard is recognised as this one."""
        return {"start": self.start, "stop": self.stop, "factory": self._config.factory}

    def _drop(self, generation: int, source: int | None = None) -> None:
        """Forget what is staged of `generation`, and of `source`, which it was derived from. Call with the table lock
        held."""
        if self._staging is not None and self._staging.generation in (generation, source):
            self._staging = None
        if self._deriving is not None and self._deriving.generation == generation:
            self._deriving = None

    def _is_served(self, generation: int) -> bool:
        with self._table:
            return self._serving.is_open(generation)

    def _find(self, generation: int) -> Generation | None:
        """Return a generation that is served, or staged and prepared. Call with the table lock held."""
        if self._serving.is_open(generation):
            return self._serving.served[generation].generation
        staging = self._staging
        return staging.built if staging is not None and staging.generation == generation else None

    def _check_dim(self, dim: int, vectors: np.ndarray) -> None:
        if dim not in (0, vectors.shape[1]):
            raise ValueError(f"staged vectors have {vectors.shape[1]} dimensions: needed are {dim}")

    def _open_staging(
        self,
        generation: int,
        weights_version: int,
        dim: int,
        wanted: tuple[np.ndarray | None, int] | None = None,
    ) -> Staging | None:
        """Return the staging of a generation that is built, None if rows come too late. `dim`: of the rows that are
        there, 0 for none; `wanted`: passages and corpus version, if they are known. Call with the staging lock
        held."""
        with self._table:
            staging, committed = self._staging, self._serving.served.get(generation)
            served = list(self._serving.open_ones().values())
            dims = {one.dim for one in served} - {0}
            built = max((one.base.generation for one in served), default=-1)
        if committed is not None and committed.generation.weights_version == weights_version:
            return None
        if generation <= built:
            raise ValueError(
                f"generation {generation} is not newer than {built}, which shard {self.shard_number} serves"
            )
        key = (generation, weights_version)
        if staging is not None and key <= staging.key:
            if key < staging.key:
                raise ValueError(f"generation, weights version {key} was overtaken by {staging.key}")
            if staging.built is not None:
                return staging
            dims = {staging.dim} - {0}
        elif staging is not None and staging.built is not None:
            raise ValueError(
                f"generation {staging.generation} is prepared: commit or abort it before {generation} is staged"
            )
        if dim and dims - {dim}:
            raise ValueError(f"staged vectors have {dim} dimensions: needed are {dims.pop()}")
        if staging is None or key != staging.key or (wanted is not None and staging.corpus_version != wanted[1]):
            numbers, corpus_version = wanted if wanted is not None else (None, 0)
            rows = self.stop - self.start if numbers is None else numbers
            staging = Staging(
                generation,
                weights_version,
                corpus_version=corpus_version,
                start=self.start,
                numbers=rows,
                config=self._config,
                dim=dim,
            )
            with self._table:
                self._staging = staging
        return staging


def shard_ranges(num_passages: int, num_shards: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each shard, contiguous and of sizes equal but for one. Raises ValueError for too many."""
    if not 1 <= num_shards <= num_passages:
        raise refuse("index.num_shards", num_shards, f"must be 1 to {num_passages}, the number of passages")
    bounds = [num_passages * number // num_shards for number in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))
