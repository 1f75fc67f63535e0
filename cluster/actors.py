"""Ray shells around plain classes: a constructor stores small settings, a method is one call.

Ray restarts each of them with the same constructor arguments (max_restarts=-1), so these never hold object references
or anything large, and constructors never wait. All belong to the driver, not to the coordinator: a coordinator that
dies leaves shards and workers as they are.

Threads of the coordinator: Ray's own answer `publish`, `status` and `save_generation`; four of ours run for ever, and
report an unexpected error as an event instead of ending: the starter (takes over what the shards serve, then starts the
others), the refresh, the repair and the snapshots. See `cluster/refresh.py` for what each waits on.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.chunks import EncodePool
from cluster.events import EventLog
from cluster.handles import NamedActor, RayShard, RayWorker, keep_weights
from cluster.ports import Weights
from cluster.processes import Place, here
from cluster.refresh import CoordinatorStatus, RefreshCoordinator, RefreshSettings
from cluster.shards import ShardGroup
from cluster.snapshots import IndexIdentity, Snapshots, Wish
from indexing.encode import encode_range
from indexing.merge import ShardHits
from indexing.settings import IndexConfig
from indexing.shard import GenerationGone, Shard, ShardStatus
from indexing.store import Store
from training.jsonl import read_rows
from training.settings import EncoderConfig

TICK_S = 1.0
RETRY_S = 2.0  # after an unexpected error
SHARD_THREADS = {"search": 4, "build": 4, "status": 2}  # a search never queues behind a build, a status behind nothing
NICENESS = 10  # of a refresh worker on CPU, so that training keeps its cores


@dataclass(frozen=True)
class Gone:
    """A shard's answer when it does not serve the generation asked for: an ordinary one, and no reason for a log."""

    committed: int


class ShardActor:
    """`indexing.shard.Shard` in its own process."""

    def __init__(self, number: int, start: int, stop: int, config: IndexConfig, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before FAISS is imported, which reads it once
        self._shard = Shard(number, start, stop, config)

    @ray.method(concurrency_group="search")
    def search(self, queries: np.ndarray, k: int, generation: int | None, num_vectors: int) -> ShardHits | Gone:
        try:
            return self._shard.search(queries, k, generation, num_vectors)
        except GenerationGone as gone:
            return Gone(gone.committed)

    @ray.method(concurrency_group="search")
    def vectors(self, ids: np.ndarray, generation: int) -> tuple[np.ndarray, np.ndarray] | Gone | None:
        try:
            return self._shard.vectors(ids, generation)
        except GenerationGone as gone:
            return Gone(gone.committed)

    @ray.method(concurrency_group="status")
    def status(self) -> ShardStatus:
        return self._shard.status()

    @ray.method(concurrency_group="status")
    def place(self) -> Place:
        return here()

    @ray.method(concurrency_group="build")
    def stage(self, generation: int, weights_version: int, start: int, vectors: np.ndarray) -> None:
        self._shard.stage(generation, weights_version, start, vectors)

    @ray.method(concurrency_group="build")
    def prepare(self, generation: int) -> None:
        self._shard.prepare(generation)

    @ray.method(concurrency_group="build")
    def commit(self, generation: int) -> None:
        self._shard.commit(generation)

    @ray.method(concurrency_group="build")
    def abort(self, generation: int) -> None:
        self._shard.abort(generation)

    @ray.method(concurrency_group="build")
    def release(self, generation: int) -> None:
        self._shard.release(generation)

    @ray.method(concurrency_group="build")
    def save(self, generation: int, directory: str) -> None:
        self._shard.save(generation, directory)

    @ray.method(concurrency_group="build")
    def load(self, generation: int, directory: str) -> None:
        self._shard.load(generation, directory)


@dataclass(frozen=True)
class WorkerSettings:
    """What a refresh worker encodes with."""

    store: str
    side: str  # whose tokens
    encoder: EncoderConfig
    tokenizer: str  # folder
    batch_tokens: int
    precision: str
    threads: int
    device: str  # cpu | cuda


class RefreshWorkerActor:
    """Encodes ranges of the store with the newest weights that it is asked to use."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._loaded: Any = None  # encoder, token table, padding id
        self._publish_id = -1
        self._lock = threading.Lock()

    def place(self) -> Place:
        return here()

    def warm(self) -> None:
        """Import, open the store and build the encoder before the first weights come."""
        with self._lock:
            self._load()

    @ray.method(num_returns=2)
    def encode(self, start: int, stop: int, weights: Weights) -> tuple[np.ndarray, int]:
        """Vectors float32 [stop - start, dim] of these passages, and their number, which says that they are done."""
        with self._lock:
            encoder, table, pad = self._load()
            if weights.publish_id != self._publish_id:
                from training.models.encoder import load_passage_weights

                load_passage_weights(encoder, ray.get(weights.reference[0], timeout=600))
                self._publish_id = weights.publish_id
            vectors = encode_range(table, start, stop, self._encode, self._settings.batch_tokens, pad)
        return vectors, len(vectors)

    def _load(self) -> Any:
        if self._settings.device == "cpu":
            _step_back(self._settings.threads)
        if self._loaded is None:
            from training.models.encoder import build_encoder
            from training.models.tokenizers import load_tokenizer, pad_id

            settings = self._settings
            tokenizer = load_tokenizer(settings.tokenizer)
            encoder = build_encoder(replace(settings.encoder, gradient_checkpointing=False), len(tokenizer))
            encoder.length_groups = 1  # batches come sorted by length
            encoder.requires_grad_(False).eval().to(settings.device)
            table = Store.open(settings.store, verify=False).tokens(settings.side)
            self._loaded = encoder, table, pad_id(tokenizer)
        return self._loaded

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Vectors float32 [n, dim] of token ids and mask [n, tokens]."""
        import torch

        device, encoder = self._settings.device, self._loaded[0]
        half = self._settings.precision == "bfloat16" and device == "cuda"
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            vectors = encoder(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        return vectors.float().cpu().numpy()


def _step_back(threads: int) -> None:
    """Let training go first. Both settings are those of the calling thread, and Ray has several."""
    import torch

    torch.set_num_threads(threads)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


@dataclass(frozen=True)
class CoordinatorSettings:
    """Names, paths and numbers: what a restarted coordinator starts from."""

    namespace: str
    shards: tuple[str, ...]  # actor names, in the order of identity.ranges
    workers: tuple[str, ...]
    run_dir: str
    identity: IndexIdentity
    refresh: RefreshSettings
    keep_generations: int
    keep_protected: int
    start_timeout_s: float
    initial: tuple[Wish, str] | None  # snapshot to start from, and its directory


class CoordinatorActor:
    """`RefreshCoordinator` with its threads."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        refresh, limit = settings.refresh, settings.refresh.chunk_timeout_s
        self._events = EventLog(Path(settings.run_dir) / "events.jsonl")
        shards = ShardGroup(
            [
                RayShard(number, *settings.identity.ranges[number], NamedActor(name, settings.namespace), limit)
                for number, name in enumerate(settings.shards)
            ]
        )
        workers = [RayWorker(NamedActor(name, settings.namespace), limit) for name in settings.workers]
        self._coordinator = RefreshCoordinator(
            refresh,
            shards,
            EncodePool(workers, shards, self._events, refresh.max_failures, limit),
            Snapshots(
                Path(settings.run_dir) / "index",
                shards,
                settings.identity,
                self._events,
                settings.keep_generations,
                settings.keep_protected,
            ),
            lambda weights: keep_weights(weights, limit),
            self._events,
        )
        self._place = here()
        self._start_error = ""
        self._started = False
        self._thread("start", self._start)

    def publish(self, weights: Weights) -> Place:
        self._coordinator.publish(weights)
        return self._place

    def status(self) -> tuple[CoordinatorStatus, Place]:
        status = self._coordinator.status()
        return (replace(status, given_up=self._start_error) if self._start_error else status), self._place

    def save_generation(self, generation: int) -> str | None:
        return self._coordinator.save_generation(generation) if self._started else None

    def _start(self) -> None:
        """Take over, then start the threads."""
        coordinator, settings = self._coordinator, self._settings
        past = [row.get("event") for row in read_rows(self._events.path)]
        coordinator.remember(past.count("refresh_committed"), past.count("refresh_failed"))
        try:
            coordinator.recover(settings.start_timeout_s, settings.initial)
        except Exception as error:  # the edge of a thread: clients read it in the status
            self._start_error = f"the index service cannot start: {error}"
            self._events("index_not_started", why=str(error))
            return
        self._started = True
        self._thread("refresh", lambda: self._for_ever(lambda: coordinator.wait_and_refresh(TICK_S), 0.0))
        self._thread("repair", lambda: self._for_ever(coordinator.tick, TICK_S))
        self._thread("snapshots", lambda: self._for_ever(coordinator.snapshots.work, TICK_S / 4))

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=name, daemon=True).start()

    def _for_ever(self, step: Callable[[], object], pause_s: float) -> None:
        while True:
            try:
                step()
            except Exception as error:  # a thread that ends would be a silent end of all refreshes
                self._events("coordinator_error", why=f"{type(error).__name__}: {error}")
                time.sleep(RETRY_S)
            time.sleep(pause_s)
