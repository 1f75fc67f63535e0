"""Ray shells around plain classes: a constructor stores small settings, a method is one call.

Ray restarts each of them with the same constructor arguments (max_restarts=-1), so these never hold object references
or anything large, and constructors never wait. All belong to the driver, not to the coordinator: a coordinator that
dies leaves shards and workers as they are.

Threads of the coordinator: Ray's own answer `publish`, `status` and `save_generation` (and carry out `encode_again`);
five of ours run for ever, and report an unexpected error as an event instead of ending: the starter (takes over what
the shards serve, then starts the others), the refresh, the corpus, the repair and the snapshots. See
`cluster/refresh/coordinator.py` for what each waits on."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.machines.events import EventLog
from cluster.machines.processes import Place, here
from cluster.refresh.coordinator import CoordinatorStatus, RefreshCoordinator, RefreshSettings
from cluster.refresh.encode_queue import EncodePool
from cluster.refresh.ports import Weights
from cluster.refresh.shards import ShardGroup
from cluster.refresh.snapshots import IndexIdentity, Snapshots, Wish
from cluster.service.ray_ports import (
    NamedActor,
    Patience,
    RayWorker,
    keep_weights,
    ray_shard,
    read_weights,
    write_weights,
)
from indexing.allowance import usable_cpus
from indexing.corpus.stores.changes import ChangeLog
from indexing.corpus.stores.filters import Filter
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.metadata import MetadataColumns
from indexing.dense.encode import encode_numbers
from indexing.dense.exhaustive import offer
from indexing.dense.faiss_build import bad_rows
from indexing.hits import ShardHits, ShardIndexed
from indexing.indexing_settings import IndexConfig
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import Shard
from training.reporting.jsonl import read_rows
from training.training_settings import EncoderConfig

TICK_S = 1.0  # Seconds between two looks at publishes and shards; a publish is noticed at once
CORPUS_S = 0.1  # Seconds between two looks for a change of the corpus
RETRY_S = 2.0  # Seconds after an unexpected error
# A search never queues behind a build, a status behind nothing; nor does what makes a change visible.
SHARD_THREADS = {"search": 4, "build": 6, "change": 2, "status": 2}
NICENESS = 10  # of a refresh worker on CPU, so that training keeps its cores


@dataclass(frozen=True)
class Gone:
    """A shard's answer when it does not serve the generation asked for: an ordinary one, and no reason for a log."""

    committed: int


def _forwarded(method: Callable[..., Any], threads: str) -> Any:
    """Return a method of `ShardActor` that calls `method` of its shard, in a thread of the group `threads`."""

    def forward(self: "ShardActor", *arguments: Any, **named: Any) -> Any:
        return getattr(self._shard, method.__name__)(*arguments, **named)

    forward.__name__ = method.__name__
    return ray.method(concurrency_group=threads)(forward)


class ShardActor:
    """`indexing.shard.shard.Shard` in its own process."""

    def __init__(
        self,
        number: int,
        start: int,
        stop: int,
        config: IndexConfig,
        threads: int,
        store: str | None = None,
        corpus: str | None = None,
    ) -> None:
        """`store`, and `corpus`, the folder of its changes: where the passages' metadata lie, for searches with a
        filter."""
        threads = min(threads, usable_cpus())  # a Ray CPU is a ticket, and there may be more of them
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before FAISS is imported, which reads it once
        if config.products == "bfloat16":
            offer_half_products(threads)
        metadata = (
            None
            if store is None
            else MetadataColumns(store, start, stop=stop, shard=number, num_shards=config.num_shards, corpus=corpus)
        )
        self._shard = Shard(number, start, stop=stop, config=config, metadata=metadata)

    @ray.method(concurrency_group="search")
    def search(
        self,
        queries: np.ndarray,
        k: int,
        generation: int | None,
        num_vectors: int,
        where: Filter | None = None,
    ) -> ShardHits | Gone:
        try:
            return self._shard.search(queries, k, generation=generation, num_vectors=num_vectors, where=where)
        except GenerationGone as gone:
            return Gone(gone.committed)

    @ray.method(concurrency_group="search")
    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool) -> ShardIndexed | Gone:
        try:
            return self._shard.indexed(ids, generation, with_vectors)
        except GenerationGone as gone:
            return Gone(gone.committed)

    @ray.method(concurrency_group="status")
    def place(self) -> Place:
        return here()

    status = _forwarded(Shard.status, "status")
    derive = _forwarded(Shard.derive, "change")
    hide = _forwarded(Shard.hide, "change")
    begin = _forwarded(Shard.begin, "build")
    stage = _forwarded(Shard.stage, "build")
    prepare = _forwarded(Shard.prepare, "build")
    commit = _forwarded(Shard.commit, "build")
    abort = _forwarded(Shard.abort, "build")
    release = _forwarded(Shard.release, "build")
    save = _forwarded(Shard.save, "build")
    load = _forwarded(Shard.load, "build")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of a refresh worker."""

    store: str
    side: str  # whose tokens
    encoder: EncoderConfig
    tokenizer: str  # folder
    batch_tokens: int
    precision: str
    threads: int
    device: str  # cpu | cuda
    corpus: str  # folder of the changes to the store


class RefreshWorkerActor:
    """Encodes ranges of the store with the newest weights that it is asked to use."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._loaded: Any = None  # encoder, token table, padding id
        self._half = False  # whether products are of bfloat16
        self._publish_id = -1
        self._lock = threading.Lock()

    def place(self) -> Place:
        return here()

    def warm(self) -> None:
        """Import, open the store and build the encoder before the first weights come."""
        with self._lock:
            self._load()

    @ray.method(num_returns=2)
    def encode(
        self, start: int, stop: int, weights: Weights, numbers: np.ndarray | None = None
    ) -> tuple[np.ndarray, int]:
        """Vectors float32 [n, dim] of the passages `start` to `stop` - 1, or of `numbers`, and how many there are,
        which says that they are done."""
        with self._lock:
            encoder, table, pad = self._load()
            if weights.publish_id != self._publish_id:
                from training.models.retriever.encoder import load_passage_weights

                load_passage_weights(encoder, ray.get(weights.reference[0], timeout=600))
                self._publish_id = weights.publish_id
            rows = np.arange(start, stop) if numbers is None else numbers
            table.know(rows)
            vectors = encode_numbers(
                table, rows, encode=self._encode, batch_tokens=self._settings.batch_tokens, pad_id=pad
            )
            self._check_finite(rows, vectors, weights.version)
        return vectors, len(vectors)

    def _check_finite(self, numbers: np.ndarray, vectors: np.ndarray, weights_version: int) -> None:
        """Raise ValueError that names a passage whose vector is not finite, before any shard takes it."""
        bad = bad_rows(vectors)
        if len(bad):
            first = int(numbers[bad[0]])
            name = LiveStore.open_with(self._settings.store, self._settings.corpus).ids([first])[0]
            raise ValueError(
                f"the encoder of weights version {weights_version} gives passage {name!r} (number {first}) a vector "
                f"that is not finite, as {len(bad)} of {len(vectors)} passages from {numbers[0]} to {numbers[-1]}"
            )

    def _load(self) -> Any:
        if self._settings.device == "cpu":
            _step_back(self._settings.threads)
        if self._loaded is None:
            from training.engine.engine_setup import processor_multiplies_bf16
            from training.models.retriever.encoder import build_encoder
            from training.models.text.tokenizers import load_tokenizer, pad_id

            settings = self._settings
            has_products = settings.device == "cuda" or processor_multiplies_bf16()
            self._half = settings.precision == "bfloat16" and has_products
            tokenizer = load_tokenizer(settings.tokenizer)
            encoder = build_encoder(replace(settings.encoder, gradient_checkpointing=False), len(tokenizer))
            encoder.length_groups = 1  # batches come sorted by length
            encoder.requires_grad_(False).eval().to(settings.device)
            table = LiveStore.open_with(settings.store, settings.corpus).tokens(settings.side)
            self._loaded = encoder, table, pad_id(tokenizer)
        return self._loaded

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Vectors float32 [n, dim] of token ids and mask [n, tokens]."""
        import torch

        device, encoder = self._settings.device, self._loaded[0]
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self._half):
            vectors = encoder(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        return vectors.float().cpu().numpy()


def offer_half_products(threads: int) -> None:
    """Have this process search by products of bfloat16, where its processor has them."""
    import torch

    from cluster.service.bf16_candidates import HalfProducts
    from training.engine.engine_setup import processor_multiplies_bf16

    torch.set_num_threads(threads)
    if processor_multiplies_bf16():
        offer(HalfProducts)


def _step_back(threads: int) -> None:
    """Let training go first. Both settings are those of the calling thread, and Ray has several."""
    import torch

    torch.set_num_threads(threads)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """Names, paths and numbers: what a restarted coordinator starts from."""

    namespace: str
    shards: tuple[tuple[str, ...], ...]  # names of each shard's replicas, in the order of identity.ranges
    workers: tuple[str, ...]
    run_dir: str
    identity: IndexIdentity
    refresh: RefreshSettings
    keep_generations: int
    keep_protected: int
    estimate_slack: float
    start_timeout_s: float
    initial: tuple[Wish, str] | None  # snapshot to start from, and its directory
    corpus: str  # folder of the changes to the corpus
    num_base: int  # passages of the store that they are made to


class CoordinatorActor:
    """`RefreshCoordinator` with its threads."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        refresh, limit = settings.refresh, settings.refresh.chunk_timeout_s
        patience = Patience(limit, settings.estimate_slack)
        self._events = EventLog(Path(settings.run_dir) / "events.jsonl")
        shards = ShardGroup(
            [
                ray_shard(number, start, stop=stop, names=names, namespace=settings.namespace, patience=patience)
                for number, (names, (start, stop)) in enumerate(
                    zip(settings.shards, settings.identity.ranges, strict=True)
                )
            ]
        )
        log = ChangeLog(settings.corpus, settings.identity.corpus_fingerprint, settings.num_base)
        workers = [RayWorker(NamedActor(name, settings.namespace), limit) for name in settings.workers]
        self._coordinator = RefreshCoordinator(
            refresh,
            shards,
            pool=EncodePool(
                workers, shards, events=self._events, max_failures=refresh.max_failures, chunk_timeout_s=limit
            ),
            snapshots=Snapshots(
                Path(settings.run_dir) / "index",
                shards,
                identity=settings.identity,
                events=self._events,
                keep=settings.keep_generations,
                keep_protected=settings.keep_protected,
                log=log,
                write_weights=lambda weights, path: write_weights(weights, path, limit),
                read_weights=read_weights,
            ),
            keep_weights=lambda weights: keep_weights(weights, limit),
            events=self._events,
            log=log,
        )
        self._place = here()
        self._ready = threading.Event()  # once it is known what serves, or that nothing can
        self._refusal: Exception | None = None  # why nothing can
        self._thread("start", self._start)

    def publish(self, weights: Weights) -> Place:
        self._coordinator.publish(weights)
        return self._place

    def status(self) -> tuple[CoordinatorStatus, Place]:
        status = self._coordinator.status()
        if self._refusal is not None:
            status = replace(status, given_up=f"the index service cannot start: {self._refusal}")
        return status, self._place

    def await_start(self, timeout_s: float) -> None:
        """Wait until what the shards serve is taken over. Raises what kept it from that, and TimeoutError."""
        if not self._ready.wait(timeout_s):
            raise TimeoutError(f"the shards did not load the index within {timeout_s:.0f} s")
        if self._refusal is not None:
            raise self._refusal

    def encode_again(self, numbers: np.ndarray, weights: Weights, adopt: bool = False) -> int:
        return self._coordinator.encode_again(numbers, weights, adopt)

    def keep_newest(self) -> int:
        return self._coordinator.keep_newest() if self._started else -1

    def save_generation(self, generation: int) -> str | None:
        return self._coordinator.save_generation(generation) if self._started else None

    @property
    def _started(self) -> bool:
        return self._ready.is_set() and self._refusal is None

    def _start(self) -> None:
        """Take over, then start the threads."""
        coordinator, settings = self._coordinator, self._settings
        past = [row.get("event") for row in read_rows(self._events.path)]
        coordinator.remember(past.count("refresh_committed"), past.count("refresh_failed"))
        try:
            coordinator.recover(settings.start_timeout_s, settings.initial)
        except Exception as error:  # the edge of a thread: clients read it in the status
            self._refusal = error
            self._events("index_not_started", why=str(error))
            return
        finally:
            self._ready.set()
        self._thread("refresh", lambda: self._for_ever(lambda: coordinator.wait_and_refresh(TICK_S), 0.0))
        self._thread("corpus", lambda: self._for_ever(self._follow, CORPUS_S))
        self._thread("repair", lambda: self._for_ever(coordinator.tick, TICK_S))
        self._thread("snapshots", lambda: self._for_ever(coordinator.snapshots.work, TICK_S / 4))

    def _follow(self) -> None:
        self._coordinator.follow_corpus()
        self._coordinator.live.note(Path(self._settings.corpus))

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
