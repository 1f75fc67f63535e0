"""Makes FAISS indexes as the settings ask for them, fills those that need no training, and moves them to a GPU."""

from typing import Any

import numpy as np

from indexing.declare import refuse
from indexing.dense.faiss_library import check_gpu, gpu_resources, inner_of, load_faiss, whole_vectors
from indexing.dense.kinds import EXHAUSTIVE, Kind
from indexing.indexing_settings import IndexConfig

OPQ_ITERATIONS = 20  # Number of iterations of a rotation, and of its codes after each; FAISS's default is 50


def empty_index(kind: Kind, dim: int, config: IndexConfig, seed: int) -> Any:
    """Return a FAISS index on CPU that is neither trained nor filled; everything that it trains is drawn with
    `seed`."""
    faiss = load_faiss()
    index = new_index(dim, kind.factory)
    inner = inner_of(index)
    clusterings = [inner.cp] if kind.lists else []
    if kind.rotated:
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.niter = OPQ_ITERATIONS
        codec = faiss.ProductQuantizer(dim, kind.parts, kind.bits)
        rotation.pq = codec
        index.referenced_objects = [codec]  # the rotation holds only its address
        clusterings.append(codec.cp)
    if kind.parts:
        inner.do_polysemous_training = False  # an order of the codes that no search here uses
        clusterings.append(inner.pq.cp)
    for clustering in clusterings:
        clustering.seed = seed + 1
        clustering.min_points_per_centroid = 1  # no warning on the console
    if kind.links:
        index.hnsw.efConstruction = config.ef_construction
    return index


def new_index(dim: int, factory: str) -> Any:
    """Return FAISS's index of this kind, for inner products. Raises ValueError if FAISS cannot make it."""
    faiss = load_faiss()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        allowed = f"must be a kind that FAISS can make for {dim} dimensions: {str(error).splitlines()[0][:200]}"
        raise refuse("index.factory", factory, allowed) from error


def exhaustive_on_cpu(vectors: np.ndarray, factory: str) -> Any:
    """Return a Flat or SQfp16 index of `vectors` [n, dim]."""
    index = empty_exhaustive(vectors.shape[1], factory)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def empty_exhaustive(dim: int, factory: str) -> Any:
    """Return a CPU index of an exhaustive kind (neither is trained on vectors), without any vectors."""
    index = new_index(dim, factory)
    index.train(np.zeros((1, dim), np.float32))
    return index


def exhaustive_on_gpu(vectors: np.ndarray, factory: str) -> Any:
    """Return a Flat or SQfp16 index of `vectors` [n, dim] in a GPU's memory."""
    faiss = load_faiss()
    options = faiss.GpuIndexFlatConfig()
    options.device = 0  # the first that CUDA_VISIBLE_DEVICES leaves visible
    options.useFloat16 = factory == "SQfp16"
    index = faiss.GpuIndexFlatIP(gpu_resources(), vectors.shape[1], options)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def vectors_in(index: Any, kind: Kind) -> np.ndarray | None:
    """Return the whole vectors that a CPU index keeps in the order of their rows: [n, dim], float32 or float16; None
    for other kinds."""
    if not kind.in_order:
        return None
    return whole_vectors(load_faiss().downcast_index(index.storage) if kind.links else index)


def memory_of(index: Any, kind: Kind) -> int:
    """Return the bytes of codes, lists, codebooks and links."""
    size = (kind.code_bytes(index.d) + kind.id_bytes) * index.ntotal + kind.fixed_bytes(index.d)
    if kind.links:
        graph = index.hnsw
        size += 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
    return size


def to_gpu(index: Any, factory: str) -> Any:
    """Return the GPU copy of a CPU index."""
    check_gpu()
    if factory in EXHAUSTIVE:
        return exhaustive_on_gpu(whole_vectors(index), factory)
    return load_faiss().index_cpu_to_gpu(gpu_resources(), 0, index)
