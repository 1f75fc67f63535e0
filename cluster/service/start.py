"""An index service: shards, refresh workers and a coordinator, started together and stopped together.

The driver starts and owns them; trainers reach them by name, also while they still start: Ray keeps a call until its
actor runs. `await_ready` waits until every actor answers, bounded by cluster.start_timeout_s.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.config.settings import RefreshConfig
from cluster.planning.placement import PlacementPlan, Seat
from cluster.refresh.coordinator import RefreshSettings
from cluster.refresh.ports import RefreshFailed
from cluster.refresh.snapshots import PREFIX, IndexIdentity, Wish, check_snapshot
from cluster.service.actors import (
    SHARD_THREADS,
    CoordinatorActor,
    CoordinatorSettings,
    RefreshWorkerActor,
    ShardActor,
    WorkerSettings,
)
from cluster.service.fanout import Slowness
from cluster.service.lexical_actor import THREADS, LexicalActor
from cluster.service.ray_ports import NamedActor, get, own_error
from cluster.service.room import await_answers, on_node
from cluster.service.search import IndexAddress, IndexClient
from indexing.attempts import Attempts
from indexing.corpus.stores.changes import ChangeLog
from indexing.corpus.stores.filters import Filter
from indexing.corpus.stores.metadata import count_passing
from indexing.corpus.stores.passages import Store
from indexing.dense.faiss_build import check_config
from indexing.indexing_settings import IndexConfig
from indexing.lexical.lexical import lexical_corpus
from indexing.shard.shard import shard_ranges
from training.reporting.jsonl import read_rows
from training.training_settings import CheckpointConfig, EncoderConfig

SIDE = "retriever"  # whose tokens are encoded
FIRST_GENERATION = 1
COORDINATOR_THREADS = 8
IDLE = Seat(name="coordinator or lexical index", number=1, cpus=0.0, gpus=0.0, threads=0)
CHECKPOINT = CheckpointConfig()
# What the vectors depend on; the rest of the encoder's settings may change between runs.
ENCODER_IDENTITY = ("name", "fresh", "pooling", "normalize", "max_passage_tokens", "max_title_tokens")


@dataclass(frozen=True)
class IndexServiceHandle:
    """An index service, running or starting; may be sent to other processes of the same Ray."""

    address: IndexAddress
    workers: tuple[str, ...]
    complete: bool = (
        True  # False: it serves a snapshot, and lacks the weights to encode what was added to the corpus since
    )

    @property
    def num_passages(self) -> int:
        """Return the number of passages that a search may return."""
        return self.address.num_passages

    def connect(self) -> IndexClient:
        """Return a client for this process."""
        return IndexClient(self.address)

    def stop(self) -> None:
        """End all actors; harmless when they have ended."""
        others = (self.address.lexical,) if self.address.lexical else ()
        for name in (self.address.coordinator, *self.workers, *self.address.shards, *others):
            try:
                ray.kill(ray.get_actor(name, namespace=self.address.namespace), no_restart=True)
            except (ValueError, RayError):
                continue
        _ALIVE.pop(self.address.coordinator, None)
        _ALIVE.pop(self.address.lexical, None)


def start_index_service(
    run_dir: str | Path,
    namespace: str,
    *,
    store: str | Path,
    tokenizer: str | Path,
    encoder: EncoderConfig,
    index: IndexConfig,
    refresh: RefreshConfig,
    placement: PlacementPlan,
    snapshot: str | Path | None = None,
    corpus: str | Path | None = None,
    start_timeout_s: float = 300.0,
    checkpoint: CheckpointConfig = CHECKPOINT,
    wait: bool = True,
    where: Filter | None = None,
    lexical: str | Path | None = None,
) -> IndexServiceHandle:
    """Start the service; it serves `snapshot` if there is one, and otherwise waits for the first publish. With `wait`
    it is ready on return; without, `await_ready` is the caller's to call.

    `run_dir` gets `index/generation-N` and `events.jsonl` and must be seen by all machines, as must `store`. `corpus`
    is the folder of the changes made to the store, now and while the service runs (None: `corpus` in `run_dir`).
    Generations that checkpoints name outlive the pruning, as many as `checkpoint` keeps and two. `where` is the filter
    of all searches of its clients, unless they name another one. `lexical`: the directory of the lexical index of the
    same store, which is searched beside the dense one. Raises ValueError for settings or a snapshot that do not fit,
    TornSnapshot for a damaged one, TimeoutError when the actors do not start."""
    run_dir = Path(run_dir).resolve()
    (run_dir / "index").mkdir(parents=True, exist_ok=True)
    corpus = run_dir / "corpus" if corpus is None else Path(corpus).resolve()
    passages = Store.open(store, verify=False)
    log = ChangeLog(corpus, passages.fingerprint, len(passages))
    identity = _identity_of(passages, encoder, index, lexical)
    check_config(index, min(stop - start for start, stop in identity.ranges))
    initial = None if snapshot is None else (check_snapshot(snapshot, identity, log), str(Path(snapshot).resolve()))

    prefix = f"index-{uuid.uuid4().hex[:8]}"
    address = replace(
        _address(namespace, index, refresh, prefix=prefix, lexical=lexical is not None),
        num_passages=log.num_living() if where is None else count_passing(store, where, corpus),
        events_path=str(run_dir / "events.jsonl"),
        where=where,
    )
    handle = IndexServiceHandle(address, tuple(f"{prefix}-worker-{number}" for number in range(refresh.num_workers)))
    worker = _worker_settings(refresh, encoder, store=store, tokenizer=tokenizer, corpus=corpus, seat=placement.workers)
    coordinator = CoordinatorSettings(
        namespace=namespace,
        shards=tuple(address.by_shard()),
        workers=handle.workers,
        run_dir=str(run_dir),
        identity=identity,
        refresh=refresh_settings(refresh, index, checkpoint, run_dir),
        keep_generations=index.keep_generations,
        keep_protected=checkpoint.keep + 2,
        estimate_slack=refresh.estimate_slack,
        start_timeout_s=start_timeout_s,
        initial=initial,
        corpus=str(corpus),
        num_base=len(passages),
    )
    try:
        if lexical is not None:
            _start_lexical(handle, (str(Path(lexical).resolve()), worker.store, str(corpus), where))
        _start(handle, identity.ranges, index=index, worker=worker, coordinator=coordinator, placement=placement)
        if wait:
            wish = None if initial is None else initial[0]
            timeout_s, version = start_timeout_s, log.version
            complete = await_ready(handle, placement, timeout_s=timeout_s, initial=wish, corpus_version=version)
            return replace(handle, complete=complete)
        return handle
    except BaseException:
        handle.stop()
        raise


def _identity_of(
    passages: Store, encoder: EncoderConfig, index: IndexConfig, lexical: str | Path | None
) -> IndexIdentity:
    """Return the identity of the index that is started. Raises ValueError for a lexical index of another corpus."""
    identity = index_identity(passages, encoder, index)
    if lexical is None:
        return identity
    if lexical_corpus(lexical) != passages.fingerprint:
        raise ValueError(f"lexical index {lexical} was built from another corpus: it cannot serve this run")
    return replace(identity, lexical=Path(lexical).name)


def _address(namespace: str, index: IndexConfig, refresh: RefreshConfig, *, prefix: str, lexical: bool) -> IndexAddress:
    """Return the names of the actors of a service whose corpus is not known yet."""
    return IndexAddress(
        namespace=namespace,
        coordinator=f"{prefix}-coordinator",
        shards=tuple(
            f"{prefix}-shard-{number}" + (f"-replica-{replica}" if index.replicas > 1 else "")
            for replica in range(index.replicas)
            for number in range(index.num_shards)
        ),
        num_passages=0,
        search_timeout_s=index.search_timeout_s,
        hung_after_s=refresh.hung_after_s,
        events_path="",
        replicas=index.replicas,
        slowness=Slowness(index.slow_after_s, index.on_slow),
        lexical=f"{prefix}-lexical" if lexical else "",
    )


def _worker_settings(
    refresh: RefreshConfig,
    encoder: EncoderConfig,
    *,
    store: str | Path,
    tokenizer: str | Path,
    corpus: Path,
    seat: Seat,
) -> WorkerSettings:
    """Return what a refresh worker is started with."""
    return WorkerSettings(
        store=str(Path(store).resolve()),
        side=SIDE,
        encoder=encoder,
        tokenizer=str(Path(tokenizer).resolve()),
        batch_tokens=refresh.batch_tokens,
        precision=refresh.precision,
        threads=seat.threads,
        device=seat.device,
        corpus=str(corpus),
    )


def refresh_settings(
    refresh: RefreshConfig, index: IndexConfig, checkpoint: CheckpointConfig, run_dir: Path
) -> RefreshSettings:
    """Return what the coordinator reads of the settings; generations are numbered on from those on disk."""
    return RefreshSettings(
        chunk_passages=refresh.chunk_passages,
        max_failures=refresh.max_failures,
        chunk_timeout_s=refresh.chunk_timeout_s,
        search_timeout_s=index.search_timeout_s,
        first_generation=_next_number(run_dir),
        grace_s=refresh.grace_s,
        snapshot_wait_s=refresh.snapshot_wait_s,
        snapshot_every=checkpoint.index_every,
    )


def await_ready(
    handle: IndexServiceHandle,
    placement: PlacementPlan,
    *,
    timeout_s: float,
    initial: Wish | None = None,
    corpus_version: int = 0,
) -> bool:
    """Wait until every actor answers, and `initial`, a snapshot that was named at the start, serves and has what was
    added to the corpus since. Returns whether it has that, which it cannot where it was saved without the weights that
    it was encoded with.

    Raises TimeoutError with what Ray has free; TornSnapshot, ValueError or OSError where the snapshot cannot be served.
    """
    deadline = time.monotonic() + timeout_s
    methods = {handle.address.coordinator: "status"} | dict.fromkeys(handle.address.shards, "status")
    methods |= dict.fromkeys(handle.workers, "place")
    methods |= {handle.address.lexical: "load"} if handle.address.lexical else {}
    asked = [NamedActor(name, handle.address.namespace).submit(method) for name, method in methods.items()]
    seats = dict.fromkeys(handle.address.shards, placement.shards) | dict.fromkeys(handle.workers, placement.workers)
    await_answers(asked, [seats.get(name, IDLE) for name in methods], timeout_s, placement)
    if initial is None:
        return True
    _await_start(NamedActor(handle.address.coordinator, handle.address.namespace), deadline - time.monotonic())
    client = handle.connect()
    client.wait_for_version(initial.weights_version, max(0.1, deadline - time.monotonic()))
    return client.wait_for_corpus(corpus_version, timeout_s)


def _await_start(coordinator: NamedActor, timeout_s: float) -> None:
    """Wait until the coordinator has taken over what is to serve; one that is started again is asked again."""
    attempts = Attempts(timeout_s)
    for _ in attempts:
        try:
            get(coordinator.submit("await_start", max(0.1, attempts.left_s)))
            return
        except RayTaskError as error:
            refusal = own_error(error)
            raise TimeoutError(str(refusal)) if isinstance(refusal, RefreshFailed) else refusal from error
        except RayError:  # it is being started again
            continue
    raise TimeoutError(f"the coordinator of the index did not start within {timeout_s:.0f} s")


def index_identity(passages: Store, encoder: EncoderConfig, index: IndexConfig) -> IndexIdentity:
    """Return what an index on disk must share with this run. Raises ValueError for more shards than passages."""
    ranges = shard_ranges(len(passages), index.num_shards)
    fingerprint = encoder_fingerprint(encoder, passages.side_fingerprint(SIDE))
    return IndexIdentity(
        encoder_fingerprint=fingerprint,
        corpus_fingerprint=passages.fingerprint,
        factory=index.factory,
        ranges=tuple(ranges),
    )


def encoder_fingerprint(encoder: EncoderConfig, tokenizer_fingerprint: str) -> str:
    """Hash of what decides a vector besides the weights and the text."""
    settings = {name: value for name, value in asdict(encoder).items() if name in ENCODER_IDENTITY}
    text = json.dumps({**settings, "tokenizer": tokenizer_fingerprint}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _next_number(run_dir: Path) -> int:
    """Return the next number of a generation: numbers only grow, also over resumes and torn directories."""
    names = [path.name.removeprefix(PREFIX) for path in (run_dir / "index").glob(f"{PREFIX}*")]
    numbers = [int(name) for name in names if name.isdigit()]
    kinds = ("refresh_started", "derive_started")
    started = [row for row in read_rows(run_dir / "events.jsonl") if row.get("event") in kinds]
    return max([*numbers, *(int(row["generation"]) for row in started)], default=FIRST_GENERATION - 1) + 1


def _start(
    handle: IndexServiceHandle,
    ranges: Sequence[tuple[int, int]],
    *,
    index: IndexConfig,
    worker: WorkerSettings,
    coordinator: CoordinatorSettings,
    placement: PlacementPlan,
) -> None:
    """Start every actor; they come up while the caller goes on."""
    remote: Any = ray.remote  # its stubs know no concurrency groups
    shard_class = remote(concurrency_groups=SHARD_THREADS)(ShardActor)
    worker_class = remote(max_concurrency=2)(RefreshWorkerActor)  # encoding, and `place`
    coordinator_class = remote(max_concurrency=COORDINATOR_THREADS)(CoordinatorActor)
    nodes = iter(placement.node_ids(placement.shards))  # replicas of a shard follow each other: so they are spread
    shards = [
        shard_class.options(**_options(name, handle, placement.shards, next(nodes))).remote(
            number, start, stop, index, placement.shards.threads, worker.store, worker.corpus
        )
        for number, (names, (start, stop)) in enumerate(zip(handle.address.by_shard(), ranges, strict=True))
        for name in names
    ]
    workers = [
        worker_class.options(**_options(name, handle, placement.workers, node)).remote(worker)
        for name, node in zip(handle.workers, placement.node_ids(placement.workers), strict=True)
    ]
    coordinator_actor = coordinator_class.options(**_options(handle.address.coordinator, handle, IDLE)).remote(
        coordinator
    )
    for one in workers:
        one.warm.remote()
    _keep_alive(handle, [*shards, *workers, coordinator_actor])


def _start_lexical(handle: IndexServiceHandle, parts: tuple[str, str, str, Filter | None]) -> None:
    """Start the actor; `parts`: where index, store and changes lie, and who may be found."""
    remote: Any = ray.remote
    options = _options(handle.address.lexical, handle, IDLE)
    actor = remote(concurrency_groups=THREADS)(LexicalActor).options(**options).remote(*parts)
    actor.load.remote()
    _ALIVE[handle.address.lexical] = [actor]


def _options(name: str, handle: IndexServiceHandle, seat: Seat, node_id: str = "") -> dict[str, Any]:
    """Ray's options of one actor: on its node, restarted for ever, and never outliving the driver."""
    return {
        "name": name,
        "namespace": handle.address.namespace,
        "num_cpus": seat.cpus,
        "num_gpus": seat.gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        **on_node(node_id),
    }


_ALIVE: dict[str, list[ActorHandle]] = {}


def _keep_alive(handle: IndexServiceHandle, actors: list[ActorHandle]) -> None:
    """Ray ends a named actor when its creator drops the last handle: keep them until this process ends."""
    _ALIVE[handle.address.coordinator] = actors
