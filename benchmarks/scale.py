"""What do a refresh and a search cost at 100,000, a million and four million passages, and does `plan` know it before?

    python -m benchmarks.scale [--sizes 100000,1000000] [--factories Flat,IVF] [--shards 1,2,4] [--repeats 15]

Vectors of 384 float32 numbers around random centres are made in blocks from a seed and go the way of a refresh:
`RefreshCoordinator`, its queue, `RayShard` ports, real `ShardActor` processes of one thread each; only the encoder is
left out (its place is taken by the block maker, whose time is counted apart). Two generations are built, the second
beside the first, while a client searches on as a training loop does (16 queries, k 20). Sizes above 2 million build one
generation only. IVF has 4 * sqrt(rows of a shard) lists and visits a 64th of them.

Printed: staging and building, the slowest shard's commit, the search (median, and the longest while a generation was
built), memory of a shard beyond that of one with a single passage, each with measured / planned, where planned is what
the formulas of `cluster/planning/estimate.py` say from a probe of this machine made right before; then the growth
exponents log(cost ratio) / log(size ratio). A search that had no answer while a generation was built is `blocked`. The
last line is JSON.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cluster.machines import session

session.set_environment()

import ray  # noqa: E402

from cluster.config.settings import RefreshConfig  # noqa: E402
from cluster.machines.events import EventLog  # noqa: E402
from cluster.planning import estimate  # noqa: E402
from cluster.planning.hardware import Host, this_host  # noqa: E402
from cluster.planning.sizing import RAY_CALL_S, RAY_SHARD_S  # noqa: E402
from cluster.refresh.coordinator import RefreshCoordinator  # noqa: E402
from cluster.refresh.encode_queue import EncodePool  # noqa: E402
from cluster.refresh.ports import Chunk, P, ShardMethod, ShardPort, T, Weights  # noqa: E402
from cluster.refresh.shards import ShardGroup  # noqa: E402
from cluster.refresh.snapshots import IndexIdentity, Snapshots  # noqa: E402
from cluster.service.actors import SHARD_THREADS, ShardActor  # noqa: E402
from cluster.service.ray_ports import NamedActor, Patience, RayShard  # noqa: E402
from cluster.service.search import IndexAddress, IndexClient  # noqa: E402
from cluster.service.start import refresh_settings  # noqa: E402
from indexing.corpus.stores.changes import ChangeLog  # noqa: E402
from indexing.dense.kinds import parse  # noqa: E402
from indexing.indexing_settings import IndexConfig  # noqa: E402
from indexing.shard.shard import Shard, shard_ranges  # noqa: E402
from training.training_settings import CheckpointConfig  # noqa: E402

DIM, BATCH, K, CENTRES = 384, 16, 20, 1000
CHUNK = 20_000  # passages a chunk
NAMESPACE = "benchmark"
ONE_GENERATION_ABOVE = 2_000_000
SAMPLE = 100_000


def make_block(start: int, stop: int, version: int) -> np.ndarray:
    """Unit vectors of these passages under one version of the weights: float32 [stop - start, DIM]."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIM), np.float32)
    chance = np.random.default_rng((version, start))
    vectors = chance.standard_normal((stop - start, DIM), np.float32)
    vectors *= 0.7
    vectors += centres[chance.integers(0, CENTRES, stop - start)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


class BlockWorker:
    """A `WorkerPort` whose encoder is `make_block`."""

    name = "blocks"

    def __init__(self) -> None:
        self.making_s = self.making_cpu_s = 0.0

    def encode(self, chunk: Chunk, generation: int, weights: Weights, shard: ShardPort) -> None:
        begin, spent = time.perf_counter(), time.thread_time()
        vectors = make_block(chunk.start, chunk.stop, weights.version)
        self.making_s += time.perf_counter() - begin
        self.making_cpu_s += time.thread_time() - spent
        reference: Any = ray.put(vectors)
        shard.call(Shard.stage, generation, weights.version, chunk.start, reference)

    def recover(self) -> None:
        raise AssertionError("this worker is never lost")


class TimedShard(RayShard):
    """Notes how long its calls take."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seconds: dict[str, list[float]] = {}  # by the name of the method

    def call(self, method: ShardMethod[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        begin = time.perf_counter()
        answer = super().call(method, *arguments, **named)
        self.seconds.setdefault(method.__name__, []).append(time.perf_counter() - begin)
        return answer


class Processors:
    """Seconds of processor time of this process and of the shards, without those of making vectors."""

    def __init__(self, pids: Sequence[int], worker: BlockWorker) -> None:
        self._processes, self._worker = [psutil.Process(pid) for pid in pids], worker

    def now(self) -> float:
        times = [one.cpu_times() for one in self._processes]
        return time.process_time() - self._worker.making_cpu_s + sum(one.user + one.system for one in times)


class Memory:
    """The largest memory of its own that a process had, sampled, in bytes; pages that it shares do not count."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._stop = threading.Event()
        self.idle = [self._own(process) for process in self._processes]
        self.peak = list(self.idle)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _own(process: psutil.Process) -> int:
        used = process.memory_info()
        return used.rss - used.shared

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = [max(peak, self._own(one)) for peak, one in zip(self.peak, self._processes, strict=True)]

    def now(self) -> int:
        """Of the shard with most, beyond idle."""
        return max(self._own(one) - idle for one, idle in zip(self._processes, self.idle, strict=True))

    def stop(self) -> int:
        """The largest peak beyond idle."""
        self._stop.set()
        self._thread.join()
        return max(peak - idle for peak, idle in zip(self.peak, self.idle, strict=True))


class Searching:
    """Searches one batch after another until it is stopped, as a training loop would."""

    def __init__(self, client: IndexClient, queries: np.ndarray) -> None:
        self._client, self._queries = client, queries
        self._stop = threading.Event()
        self.seconds: list[float] = []
        self.blocked = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            begin = time.perf_counter()
            try:
                self._client.submit(self._queries, K).result()
            except TimeoutError:
                self.blocked += 1
            self.seconds.append(time.perf_counter() - begin)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class Row:
    """One size, factory and number of shards: measured, and what was planned."""

    passages: int
    factory: str
    shards: int
    refresh_s: float  # of the last generation, without making its vectors
    refresh_cpu_s: float  # processor seconds of the first generation, with which no search ran
    search_cpu_ms: float  # mean, of all shards and the client
    build_s: float  # of that, `prepare` of the slowest shard
    commit_ms: float
    search_ms: float
    longest_search_ms: float
    blocked: int
    serving_bytes: float  # of the largest shard
    peak_bytes: float
    plan_refresh_s: float
    plan_search_ms: float
    plan_serving_bytes: float
    plan_peak_bytes: float

    def ratios(self) -> dict[str, float]:
        """Measured / planned; time in processor seconds of both, so that other work on the machine does not count."""
        pairs = {
            "refresh": (self.refresh_cpu_s, self.plan_refresh_s),
            "search": (self.search_cpu_ms, self.plan_search_ms),
            "serving": (self.serving_bytes, self.plan_serving_bytes),
            "peak": (self.peak_bytes, self.plan_peak_bytes),
        }
        return {name: round(measured / planned, 2) for name, (measured, planned) in pairs.items()}


def factory_of(kind: str, rows: int) -> tuple[str, int]:
    """The factory string for a shard of so many rows, and nprobe."""
    if not kind.startswith("IVF"):
        return kind, 1
    lists = round(4 * math.sqrt(rows))
    return kind.replace("IVF", f"IVF{lists}", 1) + ("" if "," in kind else ",Flat"), max(1, lists // 64)


def planned(kind: str, passages: int, num_shards: int, host: Host, generations: int) -> dict[str, float]:
    """What the formulas say of this machine, with shards of one thread."""
    rows = math.ceil(passages / num_shards)
    factory, nprobe = factory_of(kind, rows)
    index = parse(factory)
    one = estimate.shard_bytes(index, rows, dim=DIM, training_sample=SAMPLE)
    stage = estimate.stage_seconds(passages, DIM, host.copy_bytes, 1)
    build = estimate.build_seconds(index.build_work(rows, DIM, SAMPLE), host.product_flops, host.copy_bytes)
    scan, coarse, read = index.search_work(rows, dim=DIM, batch=BATCH, nprobe=nprobe)
    search = scan / host.scan_flops + coarse / host.product_flops + read / host.pair_bytes
    return {
        "plan_refresh_s": stage + num_shards * build,
        "plan_search_ms": 1000 * (num_shards * search + RAY_CALL_S + num_shards * RAY_SHARD_S),
        "plan_serving_bytes": one.serving * min(generations, 2),
        "plan_peak_bytes": one.refreshing if generations == 2 else one.generation + one.staging,
    }


def start_shard(name: str, number: int, start: int, stop: int, config: IndexConfig) -> Any:
    """A shard actor of one thread."""
    remote = ray.remote(concurrency_groups=SHARD_THREADS)(ShardActor)  # pyright: ignore[reportCallIssue]
    return remote.options(name=name, namespace=NAMESPACE, num_cpus=0).remote(number, start, stop, config, 1)


def cost_of_libraries() -> tuple[int, float]:
    """Memory, and seconds of a processor, that a shard takes for FAISS and the like: of one with a single passage."""
    actor = start_shard("one", 0, 0, 1, IndexConfig())
    pid = ray.get([actor.place.remote()])[0].pid
    memory, times = Memory([pid]), psutil.Process(pid).cpu_times()
    ray.get(actor.stage.remote(1, 0, 0, make_block(0, 1, 0)))
    ray.get(actor.prepare.remote(1))
    ray.get(actor.commit.remote(1))
    ray.get(actor.search.remote(make_block(0, BATCH, 0), 1, None, 0))
    after = psutil.Process(pid).cpu_times()
    used = memory.stop()
    ray.kill(actor)
    return used, after.user + after.system - times.user - times.system


def measure(passages: int, kind: str, num_shards: int, repeats: int, folder: Path, libraries: tuple[int, float]) -> Row:
    """Build one or two generations and search."""
    generations = 1 if passages > ONE_GENERATION_ABOVE else 2
    ranges = shard_ranges(passages, num_shards)
    factory, nprobe = factory_of(kind, ranges[0][1])
    config = IndexConfig(factory=factory, num_shards=num_shards, nprobe=nprobe, training_sample=SAMPLE)
    names = tuple(f"shard-{passages}-{kind}-{num_shards}-{number}" for number in range(num_shards))
    actors = [start_shard(name, n, *bounds, config) for n, (name, bounds) in enumerate(zip(names, ranges, strict=True))]
    pids = [place.pid for place in ray.get([actor.place.remote() for actor in actors])]
    shards = [
        TimedShard(n, start, stop=stop, actor=NamedActor(name, NAMESPACE), patience=Patience(3600.0, 4.0))
        for n, (name, (start, stop)) in enumerate(zip(names, ranges, strict=True))
    ]
    events = EventLog(folder / "events.jsonl")
    worker, group = BlockWorker(), ShardGroup(shards)
    log = ChangeLog(folder / "corpus", "", passages)  # of a corpus that nobody changes
    coordinator = RefreshCoordinator(
        refresh_settings(
            RefreshConfig(chunk_passages=CHUNK, max_failures=0, chunk_timeout_s=3600.0),
            IndexConfig(search_timeout_s=3600.0),
            CheckpointConfig(),
            folder,
        ),
        group,
        pool=EncodePool([worker], shards, events=events, max_failures=0, chunk_timeout_s=3600.0),
        snapshots=Snapshots(
            folder / "index",
            group,
            identity=IndexIdentity(
                encoder_fingerprint="", corpus_fingerprint="", factory=factory, ranges=tuple(ranges)
            ),
            events=events,
            keep=1,
            keep_protected=1,
            log=log,
        ),
        keep_weights=lambda weights: weights,
        events=events,
        log=log,
    )
    client = IndexClient(
        IndexAddress(
            namespace=NAMESPACE,
            coordinator="none",
            shards=names,
            num_passages=passages,
            search_timeout_s=600.0,
            hung_after_s=40.0,
            events_path=str(folder / "events.jsonl"),
        )
    )
    queries = make_block(0, BATCH, 99)
    memory, searching, processors, spent = Memory(pids), None, Processors(pids, worker), 0.0
    seconds = 0.0
    try:
        for version in range(1, generations + 1):
            if version == 2:
                searching = Searching(client, queries)
            worker.making_s = 0.0
            coordinator.publish(Weights(version, version, None))
            begin, before = time.perf_counter(), processors.now()
            coordinator.wait_and_refresh(1.0)
            seconds = time.perf_counter() - begin - worker.making_s
            spent = processors.now() - before if version == 1 else spent
            assert coordinator.status().weights_version == version, coordinator.status().given_up
        if searching is not None:
            searching.stop()
        serving, peak = memory.now(), memory.stop()
        host = this_host(DIM, BATCH, 2.0)
        times: list[float] = []
        asking, batches = 0.0, [make_block(0, BATCH, 1000 + number) for number in range(repeats + 2)]
        for number, asked in enumerate(batches, start=-2):
            if number == 0:
                asking = processors.now()
            begin = time.perf_counter()
            client.submit(asked, K).result()
            if number >= 0:
                times.append(1000 * (time.perf_counter() - begin))
        asking = 1000 * (processors.now() - asking) / repeats
    finally:
        for actor in actors:
            ray.kill(actor)
    return Row(
        passages=passages,
        factory=factory,
        shards=num_shards,
        refresh_s=seconds,
        refresh_cpu_s=spent - num_shards * libraries[1],
        search_cpu_ms=asking,
        build_s=max(shard.seconds["prepare"][-1] for shard in shards),
        commit_ms=1000 * max(max(shard.seconds["commit"]) for shard in shards),
        search_ms=statistics.median(times),
        longest_search_ms=1000 * max(searching.seconds, default=0.0) if searching is not None else 0.0,
        blocked=searching.blocked if searching is not None else 0,
        serving_bytes=serving - libraries[0],
        peak_bytes=peak - libraries[0],
        **planned(kind, passages, num_shards, host, generations),
    )


def exponents(rows: Sequence[Row]) -> dict[str, float]:
    """log(cost ratio) / log(size ratio) from each size to the next, one shard, in processor seconds; 1: linear."""
    found: dict[str, float] = {}
    for kind in dict.fromkeys(row.factory.partition("IVF")[0] or "IVF" for row in rows):
        line = [row for row in rows if row.shards == 1 and (row.factory.partition("IVF")[0] or "IVF") == kind]
        line.sort(key=lambda row: row.passages)
        for small, large in itertools.pairwise(line):
            step = math.log(large.passages / small.passages)
            sizes = f"{kind}_{small.passages // 1000}k_to_{large.passages // 1000}k"
            found[f"refresh_{sizes}"] = round(math.log(large.refresh_cpu_s / small.refresh_cpu_s) / step, 2)
            found[f"search_{sizes}"] = round(math.log(large.search_cpu_ms / small.search_cpu_ms) / step, 2)
    return found


def show(row: Row) -> str:
    ratio = row.ratios()
    return (
        f"{row.passages:>9,} {row.factory:<14} {row.shards:>6} {row.refresh_s:>8.2f} {row.build_s:>8.2f} "
        f"{row.commit_ms:>9.1f} {row.search_ms:>9.1f} {row.longest_search_ms:>10.1f} {row.blocked:>7} "
        f"{row.serving_bytes / 1e6:>10.0f} {row.peak_bytes / 1e6:>8.0f}   "
        f"{ratio['refresh']:>7.2f} {ratio['search']:>6.2f} {ratio['serving']:>7.2f} {ratio['peak']:>5.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100000,1000000")
    parser.add_argument("--factories", default="Flat,IVF")
    parser.add_argument("--shards", default="1,2,4")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    sizes, numbers = ([int(part) for part in text.split(",")] for text in (arguments.sizes, arguments.shards))
    connection = session.start_or_join(NAMESPACE, object_store_bytes=2**29, log_to_driver=False)
    print(f"{BATCH} queries x {DIM}, k {K}, shards of one thread, {os.cpu_count()} processors")
    print(
        f"{'passages':>9} {'factory':<14} {'shards':>6} {'refresh s':>8} "
        f"{'build s':>7} {'commit ms':>9} {'search ms':>9} "
        f"{'longest ms':>10} {'blocked':>7} {'serving MB':>10} {'peak MB':>8}   measured / planned: refresh search "
        f"serving peak"
    )
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            libraries = cost_of_libraries()
            for kind in arguments.factories.split(","):
                for size in sizes:
                    for number in numbers if kind == "Flat" and size <= ONE_GENERATION_ABOVE else numbers[:1]:
                        place = Path(folder) / f"{size}-{kind}-{number}"
                        place.mkdir()
                        rows.append(measure(size, kind, number, arguments.repeats, place, libraries))
                        print(show(rows[-1]), flush=True)
    finally:
        connection.stop()
    summary = {
        "exponents": exponents(rows),
        "largest_commit_ms": round(max(row.commit_ms for row in rows), 1),
        "blocked": sum(row.blocked for row in rows),
        "ratios": {f"{row.factory}_{row.passages // 1000}k_{row.shards}": row.ratios() for row in rows},
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
