"""What does a search cost through Ray shards, against one raw FAISS call?

    python -m benchmarks.search [--sizes 25000,200000] [--shards 2] [--threads 1] [--repeats 30]

Raw: `IndexFlatIP.search` in this process, FAISS's BLAS threshold tuned; the faster of one OpenMP thread and of shards x
threads. Sharded: `IndexClient.submit(...).result()` over shard actors with `threads` each: calls, search, exact
re-scoring, merge. Halves: the same with `index.products=bfloat16`, where the processor has such products. All answer
the same batches of 16 queries, k 20, 384 dimensions, taking turns; medians count, in milliseconds. Prints a table, then
one JSON line; `ratio_to_raw_200k` is sharded / raw time at 200,000 vectors (1: as fast; 2: half as fast),
`halves_to_raw_200k` that of halves. A million vectors (`--sizes 1000000`) take 5.4 GB, in all ways together.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from cluster.machines import session

session.set_environment()

import ray  # noqa: E402

from cluster.service.actors import SHARD_THREADS, ShardActor  # noqa: E402
from cluster.service.search import IndexAddress, IndexClient  # noqa: E402
from indexing.dense.faiss_library import load_faiss  # noqa: E402
from indexing.indexing_settings import IndexConfig  # noqa: E402
from indexing.shard.shard import shard_ranges  # noqa: E402
from training.engine.engine_setup import processor_multiplies_bf16  # noqa: E402

DIM, BATCH, K = 384, 16, 20
SIZES = "25000,200000"
BLOCK = 25_000  # vectors staged at a time
NAMESPACE = "benchmark"


def random_vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors: float32 [count, DIM]."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def start_shards(
    vectors: np.ndarray, num_shards: int, threads: int, products: str = "float32"
) -> tuple[IndexClient, list]:
    """Shard actors that serve `vectors`, and a client of them."""
    names = tuple(f"shards-{products}-{len(vectors)}-{number}" for number in range(num_shards))
    remote = ray.remote(concurrency_groups=SHARD_THREADS)(ShardActor)  # pyright: ignore[reportCallIssue]
    actors = []
    for number, (start, stop) in enumerate(shard_ranges(len(vectors), num_shards)):
        options = {"name": names[number], "namespace": NAMESPACE, "num_cpus": 0}
        actor = remote.options(**options).remote(number, start, stop, IndexConfig(products=products), threads)
        for begin in range(start, stop, BLOCK):
            ray.get(actor.stage.remote(1, 0, begin, vectors[begin : min(begin + BLOCK, stop)]))
        ray.get(actor.prepare.remote(1))
        ray.get(actor.commit.remote(1))
        actors.append(actor)
    return IndexClient(
        IndexAddress(
            namespace=NAMESPACE,
            coordinator="none",
            shards=names,
            num_passages=len(vectors),
            search_timeout_s=60.0,
            hung_after_s=40.0,
            events_path="/dev/null",
        )
    ), actors


def measure(vectors: np.ndarray, num_shards: int, threads: int, repeats: int) -> dict[str, float]:
    """Median of each way and 99th percentile of the sharded one, milliseconds a batch."""
    faiss = load_faiss()
    faiss.cvar.distance_compute_blas_threshold = 20
    raw = faiss.IndexFlatIP(DIM)
    raw.add(vectors)
    client, actors = start_shards(vectors, num_shards, threads)

    def raw_search(num_threads: int, queries: np.ndarray) -> object:
        faiss.omp_set_num_threads(num_threads)
        return raw.search(queries, K)

    ways: dict[str, Callable[[np.ndarray], object]] = {
        "raw 1": partial(raw_search, 1),
        "raw n": partial(raw_search, num_shards * threads),
        "sharded": lambda queries: client.submit(queries, K).result(),
    }
    half_actors = []
    if processor_multiplies_bf16():
        half_client, half_actors = start_shards(vectors, num_shards, threads, "bfloat16")
        ways["halves"] = lambda queries: half_client.submit(queries, K).result()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, repeats):
        queries = random_vectors(BATCH, 1000 + repeat)
        for name, way in ways.items():
            begin = time.perf_counter()
            way(queries)
            if repeat >= 0:
                times[name].append(1000 * (time.perf_counter() - begin))
    for actor in [*actors, *half_actors]:
        ray.kill(actor)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["raw"] = min(medians["raw 1"], medians["raw n"])
    return medians | {"p99": float(np.percentile(times["sharded"], 99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    connection = session.start_or_join(NAMESPACE, object_store_bytes=2**29, log_to_driver=False)
    print(f"{BATCH} queries x {DIM}, k {K}, {arguments.shards} shards x {arguments.threads} threads; ms a batch")
    print(
        f"{'vectors':>10} {'raw 1':>8} {'raw n':>8} {'sharded':>8} {'p99':>8} {'sharded / raw':>14}"
        f" {'halves':>8} {'halves / raw':>13}"
    )
    ratios = {}
    try:
        for size in map(int, arguments.sizes.split(",")):
            row = measure(random_vectors(size, 0), arguments.shards, arguments.threads, arguments.repeats)
            ratio = ratios[f"ratio_to_raw_{size // 1000}k"] = row["sharded"] / row["raw"]
            columns = " ".join(f"{row[name]:>8.2f}" for name in ("raw 1", "raw n", "sharded", "p99"))
            line = f"{size:>10,} {columns} {ratio:>14.2f}"
            if "halves" in row:
                ratio = ratios[f"halves_to_raw_{size // 1000}k"] = row["halves"] / row["raw"]
                line += f" {row['halves']:>8.2f} {ratio:>13.2f}"
            print(line)
    finally:
        connection.stop()
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
