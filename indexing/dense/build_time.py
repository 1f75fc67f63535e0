"""Estimates how long this machine builds an index, from one timed product."""

import time
from functools import cache

import numpy as np

from indexing.dense.faiss_library import load_faiss
from indexing.dense.kinds import parse
from indexing.indexing_settings import IndexConfig

QUERIES, VECTORS, DIM = 256, 4096, 64  # of the timed product: 2 * 256 * 4096 * 64 operations, some milliseconds
COPY_BYTES_PER_S = 1e9  # of a pass over vectors in memory on one slow core
MEASURED_FLOPS = 1e10  # work below this takes a second at most, wherever it is done
GPU_FLOPS_PER_S = 1e12  # a tenth of what small GPUs do


def build_seconds(config: IndexConfig, num_vectors: int, dim: int) -> float:
    """Return about how many seconds an index of `num_vectors` vectors takes to build here, from its operations
    (`Kind.build_work`) and the speed of a small search."""
    flops, copied = parse(config.factory).build_work(num_vectors, dim, config.training_sample)
    seconds = copied / COPY_BYTES_PER_S
    if flops < MEASURED_FLOPS:
        return seconds
    return seconds + flops / (GPU_FLOPS_PER_S if config.device == "gpu" else product_flops())


@cache
def product_flops() -> float:
    """Return the floating-point operations a second of FAISS's products in this process, measured once."""
    rng = np.random.default_rng(0)
    queries, vectors = (rng.standard_normal((count, DIM), np.float32) for count in (QUERIES, VECTORS))
    faiss, seconds = load_faiss(), list[float]()
    for _ in range(3):  # the first call also starts FAISS's threads
        begin = time.perf_counter()
        faiss.knn(queries, vectors, 1, faiss.METRIC_INNER_PRODUCT)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * QUERIES * VECTORS * DIM / min(seconds)
