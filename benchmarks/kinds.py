"""What does each kind of index cost, and what does it find?

    python -m benchmarks.kinds [--vectors 100000] [--dim 384] [--candidates 200] [--repeats 5]

One shard, one thread, k 20. Vectors are drawn around 1 centre per 100 of them, with noise in a subspace of 32 of the
directions as well as in all of them, so that neighbours exist and no coordinate is special; queries are drawn the same
way and are none of them. Recall@20 against brute force over 256 queries, without and with re-scoring of the candidates
from float16 vectors; bytes a passage likewise; seconds to train and add; median milliseconds of a batch of 16 queries.
Prints a table, then one JSON line by kind: [bytes, recall, recall re-scored, seconds to build, milliseconds].
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import numpy as np

from indexing.dense.exact import recall, search_exactly
from indexing.dense.faiss_build import Index, build_index
from indexing.dense.faiss_library import load_faiss
from indexing.dense.kinds import parse
from indexing.indexing_settings import IndexConfig

K, BATCH, QUERIES = 20, 16, 256


def draw_vectors(count: int, dim: int, num_clusters: int, seed: int) -> np.ndarray:
    """Unit vectors around centres that every seed shares: float32 [count, dim]."""
    shared, own = np.random.default_rng(0), np.random.default_rng(1 + seed)
    centres = shared.standard_normal((num_clusters, dim), np.float32)
    plane = shared.standard_normal((32, dim), np.float32)
    vectors = centres[own.integers(0, num_clusters, count)]
    vectors += 0.2 * own.standard_normal((count, 32), np.float32) @ plane
    vectors += 0.3 * own.standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def kinds_for(count: int, dim: int) -> list[str]:
    """Kinds that fit so many vectors."""
    lists = max(1, int(4 * count**0.5) // 16 * 16)
    parts = next(parts for parts in (48, 32, 16, 8, 4, 2, 1) if dim % parts == 0)
    inverted = [f"IVF{lists},{codec}" for codec in ("Flat", "SQfp16", "SQ8", f"PQ{parts}")]
    rotated = [f"OPQ{parts},IVF{lists},PQ{parts}"]
    return ["Flat", "SQfp16", "SQ8", f"PQ{parts}", *inverted, *rotated, "HNSW32", "HNSW32,SQ8"]


def milliseconds(index: Index, queries: np.ndarray, repeats: int) -> float:
    """Median of a batch."""
    times = []
    for start in range(0, BATCH * (repeats + 1), BATCH):
        begin = time.perf_counter()
        index.search(queries[start : start + BATCH], K)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--ef-search", type=int, default=128)
    parser.add_argument("--training-sample", type=int, default=20_000)
    arguments = parser.parse_args()
    if not 1 <= arguments.repeats < QUERIES // BATCH:
        parser.error(f"--repeats is {arguments.repeats}: allowed are 1 to {QUERIES // BATCH - 1}")
    load_faiss().omp_set_num_threads(1)
    clusters = max(1, arguments.vectors // 100)
    vectors = draw_vectors(arguments.vectors, arguments.dim, clusters, 0)
    queries = draw_vectors(QUERIES, arguments.dim, clusters, 1)
    expected = search_exactly(vectors, queries, K)[1]
    print(
        f"{arguments.vectors:,} x {arguments.dim}, k {K}, {arguments.candidates} candidates, nprobe "
        f"{arguments.nprobe}, ef_search {arguments.ef_search}, trained on {arguments.training_sample:,}"
    )
    print(
        f"{'kind':<24} {'bytes':>7} {'recall':>7} {'again':>7} {'+bytes':>7} {'build s':>8} {'ms':>8} {'ms again':>8}"
    )
    figures = {}
    for factory in kinds_for(arguments.vectors, arguments.dim):
        config = IndexConfig(
            factory=factory,
            nprobe=arguments.nprobe,
            ef_search=arguments.ef_search,
            training_sample=arguments.training_sample,
        )
        begin = time.perf_counter()
        index = build_index(vectors, config)
        seconds = time.perf_counter() - begin
        found, took = recall(index.search(queries, K)[1], expected), milliseconds(index, queries, arguments.repeats)
        size = index.num_bytes / len(vectors)
        line = f"{factory:<24} {size:>7.0f} {found:>7.3f}"
        again = None
        if parse(factory).compressed:
            scored = replace(config, rescore_candidates=arguments.candidates)
            other = Index(index.faiss_index, scored, vectors.astype(np.float16))
            again = recall(other.search(queries, K)[1], expected)
            slower, more = milliseconds(other, queries, arguments.repeats), other.num_bytes / len(vectors) - size
            line += f" {again:>7.3f} {more:>7.0f} {seconds:>8.1f} {took:>8.2f} {slower:>8.2f}"
        else:
            line += f" {'':>7} {'':>7} {seconds:>8.1f} {took:>8.2f}"
        print(line, flush=True)
        figures[factory] = [round(size), round(found, 4), None if again is None else round(again, 4)]
        figures[factory] += [round(seconds, 1), round(took, 2)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
