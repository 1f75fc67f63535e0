"""Ports that are plain objects: real shards and a real queue in one process, deaths on demand, and a log of calls."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cluster.refresh.coordinator import RefreshCoordinator, RefreshSettings
from cluster.refresh.encode_queue import EncodePool
from cluster.refresh.ports import Chunk, P, ShardLost, ShardMethod, ShardPort, T, Weights, WorkerLost
from cluster.refresh.shards import ShardGroup
from cluster.refresh.snapshots import IndexIdentity, Snapshots
from indexing.corpus.stores.changes import ChangeLog
from indexing.dense.exact import search_exactly
from indexing.hits import merge
from indexing.indexing_settings import IndexConfig
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import Shard, shard_ranges
from indexing.shard.shard_status import ShardStatus

NUM_PASSAGES, DIM = 23, 4
MAX_PASSAGES = 200  # with those that are added


def vectors_of(version: int, start: int, stop: int) -> np.ndarray:
    """What an encoder of this version makes of these passages: float32 [stop - start, DIM]."""
    return np.random.default_rng(version).normal(size=(MAX_PASSAGES, DIM)).astype(np.float32)[start:stop]


class FakeShard:
    """A real shard whose process can die: it then comes back empty."""

    def __init__(self, number: int, start: int, stop: int, log: list[tuple[Any, ...]]) -> None:
        self.number, self.start, self.stop = number, start, stop
        self.name = f"shard {number}"
        self.log = log
        self.before: Callable[[str, int], None] = lambda method, generation: None
        self.doing = ""
        self.shard = self._empty()

    def _empty(self) -> Shard:
        return Shard(self.number, self.start, stop=self.stop, config=IndexConfig())

    def die(self) -> None:
        """As SIGKILL and a restart."""
        self.shard = self._empty()

    def die_once(self, method: str) -> None:
        """Die instead of doing `method`."""

        def before(called: str, generation: int) -> None:
            if called == method:
                self.before = lambda method, generation: None
                self.die()
                raise ShardLost(f"died in {method}")

        self.before = before

    def call(self, method: ShardMethod[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        name, generation = method.__name__, arguments[0]
        assert isinstance(generation, int)
        self.before(name, generation)
        result = method(self.shard, *arguments, **named)
        self.log.append((name, generation, self.number))
        return result

    def status(self) -> ShardStatus:
        self.before("status", -1)
        return self.shard.status()

    def lacking(self, generation: int) -> str:
        return "" if generation in self.shard.status().generations else self.name

    def restart(self) -> None:
        self.log.append(("restart", -1, self.number))
        self.die()


class FakeWorker:
    """Encodes at once; `before` may raise, or wait."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.before: Callable[[Chunk, Weights], None] = lambda chunk, weights: None
        self.chunks: list[Chunk] = []

    def encode(self, chunk: Chunk, generation: int, weights: Weights, shard: ShardPort) -> None:
        self.before(chunk, weights)
        vectors = vectors_of(weights.version, chunk.start, chunk.stop)
        if chunk.numbers is None:
            shard.call(Shard.stage, generation, weights.version, chunk.start, vectors)
        else:
            numbers = np.array(chunk.numbers)
            shard.call(Shard.stage, generation, weights.version, numbers, vectors[numbers - chunk.start])
        self.chunks.append(chunk)

    def recover(self) -> None:
        """A new process is there at once."""

    def lose(self, times: int) -> None:
        """Die at the next `times` chunks."""
        left = [times]

        def before(chunk: Chunk, weights: Weights) -> None:
            if left[0]:
                left[0] -= 1
                raise WorkerLost("died")

        self.before = before


class World:
    """Shards and workers that outlive coordinators, as in a run."""

    def __init__(self, directory: Path, num_shards: int = 3, num_workers: int = 2) -> None:
        self.directory = directory
        self.log: list[tuple[Any, ...]] = []
        self.events: list[dict[str, Any]] = []
        ranges = shard_ranges(NUM_PASSAGES, num_shards)
        self.shards = [FakeShard(number, *pair, self.log) for number, pair in enumerate(ranges)]
        self.ports: list[ShardPort] = list(self.shards)  # what the coordinator talks to
        self.workers = [FakeWorker(f"worker-{number}") for number in range(num_workers)]
        self.identity = IndexIdentity(
            encoder_fingerprint="encoder", corpus_fingerprint="corpus", factory="Flat", ranges=tuple(ranges)
        )

    def changes(self) -> ChangeLog:
        """The changes of the corpus, as a process sees them."""
        return ChangeLog(self.directory / "corpus", "corpus", NUM_PASSAGES)

    def change(self, added: int = 0, deleted: Sequence[int] = ()) -> int:
        """Another process adds passages to the corpus and deletes some; returns the version."""
        log = self.changes()
        with log.locked(1.0):
            return log.append(added, np.array(deleted, np.int64), np.full(added, -1)).version

    def note(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def named(self, event: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [fields for fields in self.events if fields["event"] == event]

    def coordinator(self, recover: bool = True, keep: int = 2, **changes: Any) -> RefreshCoordinator:
        """A coordinator without threads of its own."""
        numbers: dict[str, Any] = {"chunk_passages": 3, "max_failures": 2, "chunk_timeout_s": 20.0}
        numbers |= {"search_timeout_s": 20.0, "first_generation": 1, "grace_s": 10.0, "snapshot_wait_s": 0.0}
        numbers |= {"snapshot_every": 1, **changes}
        settings = RefreshSettings(**numbers)
        group = ShardGroup(self.ports)
        pool = EncodePool(
            self.workers,
            group,
            events=self.note,
            max_failures=settings.max_failures,
            chunk_timeout_s=settings.chunk_timeout_s,
        )
        log = self.changes()
        snapshots = Snapshots(
            self.directory / "index",
            group,
            identity=self.identity,
            events=self.note,
            keep=keep,
            keep_protected=2,
            log=log,
            write_weights=write_weights,
            read_weights=read_weights,
        )
        coordinator = RefreshCoordinator(
            settings,
            group,
            pool=pool,
            snapshots=snapshots,
            keep_weights=lambda weights: weights,
            events=self.note,
            log=log,
        )
        if recover:
            coordinator.recover(5.0)
        return coordinator

    def calls(self, *methods: str) -> list[tuple[Any, ...]]:
        """The logged calls of these methods, in order."""
        return [call for call in self.log if call[0] in methods]

    def served(self) -> list[dict[int, int]]:
        """Generation and weights version that each shard serves."""
        return [shard.shard.status().generations for shard in self.shards]

    def check_corpus(self, generation: int, versions: int | np.ndarray) -> None:
        """All shards together have exactly the living passages in `generation`, each with the vector of its version."""
        log = self.changes()
        living = np.arange(log.num_numbers())[log.is_living(np.arange(log.num_numbers()))]
        versions = np.broadcast_to(np.asarray(versions), log.num_numbers())
        vectors = np.stack([vectors_of(int(v), n, n + 1)[0] for n, v in enumerate(versions.tolist())])
        hits = merge(
            [shard.shard.search(vectors, len(living), generation=generation) for shard in self.shards], len(living)
        )
        scores, rows = search_exactly(vectors[living], vectors, len(living))
        assert hits.ids.tolist() == living[rows].tolist()
        np.testing.assert_array_equal(hits.scores, scores)
        found = np.full(hits.ids.shape, hits.weights_version) if hits.versions is None else hits.versions
        np.testing.assert_array_equal(found, versions[hits.ids])

    def hidden_found(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """Which of `numbers` a shard returns, from any generation that it serves."""
        found: list[str] = []
        queries = np.eye(DIM, dtype=np.float32)
        for shard in self.shards:
            one = shard.shard
            for generation in one.status().generations:
                with suppress(GenerationGone):
                    ids = one.search(queries, MAX_PASSAGES, generation=generation).ids
                    found += [f"{generation} on {shard.number}: {n}" for n in np.intersect1d(ids, numbers)]
        return found

    def check_corpus_hidden(self, numbers: Sequence[int]) -> None:
        """No shard returns any of `numbers`."""
        assert not self.hidden_found(numbers)
        assert all(shard.shard.status().generations for shard in self.shards)

    def check_contents(self, generation: int, version: int) -> None:
        """Every shard serves `generation`, and its vectors are those of `version`."""
        for shard in self.shards:
            wanted = vectors_of(version, shard.start, shard.stop)
            hits = shard.shard.search(wanted, 1, generation=generation)
            scores = (wanted @ wanted.T).max(axis=1)
            np.testing.assert_allclose(hits.scores[:, 0], scores, rtol=1e-5)
            assert hits.weights_version == version


def weights(version: int, publish_id: int | None = None) -> Weights:
    """Published weights; the publish id follows the version unless it is given."""
    return Weights(version, version + 1 if publish_id is None else publish_id, None)


def write_weights(weights: Weights, path: Path) -> None:
    """As `cluster.service.ray_ports.write_weights`; a fake encoder needs the version alone."""
    path.write_text(json.dumps(weights.version), encoding="utf-8")


def read_weights(version: int, publish_id: int, path: Path) -> Weights:
    """What `write_weights` wrote."""
    assert json.loads(path.read_text(encoding="utf-8")) == version
    return Weights(version, publish_id, None)


def build(coordinator: RefreshCoordinator, version: int) -> None:
    """Publish weights, and make a generation of them."""
    coordinator.publish(weights(version))
    assert coordinator.wait_and_refresh(0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
