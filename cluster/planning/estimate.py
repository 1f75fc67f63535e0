"""Estimates the cost of an index, a refresh, a search and a trainer by pure formulas of sizes and rates.

Bytes and seconds are for one shard, one worker or one trainer unless the name says otherwise. A formula from a
publication names it; the others are counted from the code of `indexing/`, and tests compare them with real FAISS
indexes.
"""

import math
import re
from dataclasses import dataclass

from indexing.declare import refuse
from indexing.shard.serving import MAX_COMMITTED

FLOAT, ID = 4, 8  # bytes
SCALAR_BITS = {"SQ8": 8, "SQ6": 6, "SQ4": 4, "SQfp16": 16, "SQbf16": 16}
# Number of FAISS's k-means rounds for the centroids of an IVF, and of vectors per centroid at most
KMEANS_ROUNDS, KMEANS_POINTS = 10, 256
PQ_ROUNDS, PQ_POINTS = 25, 256
# Number of distances per insertion: FAISS's efConstruction of 40, times about 16 neighbours each
HNSW_VISITED = 40 * 16
# Number of times that vectors pass through memory, in units of a copy (compared with benchmarks/scale.py). On their way
# to a shard: out of a tensor, into new pages of the object store, into storage made for them, and a check for NaN. In a
# build: their norms in float64; kinds that are not exhaustive check them again, assign and add them.
STAGE_PASSES, EXHAUSTIVE_PASSES, OTHER_PASSES = 12, 2, 4
GPU_SCRATCH_BYTES = 256 * 2**20  # indexing/dense/faiss_build.py
PROCESS_BYTES = 0.25e9  # bytes of an actor with numpy and FAISS
TORCH_PROCESS_BYTES = 0.9e9  # bytes of an actor with torch, transformers and DeepSpeed
CUDA_CONTEXT_BYTES = 0.6e9
# bytes of DeepSpeed's two buckets of 2e8 numbers (training/engine/engine_setup.py), in 16 bits
BUCKET_BYTES = 2 * 2 * 2e8


@dataclass(frozen=True, kw_only=True)
class IndexKind:
    """The numbers that an index factory stands for."""

    factory: str
    lists: int  # Number of lists of an IVF; 0: none
    code_bytes: float  # bytes of one vector's code
    beside_bytes: float  # bytes per vector for its id in a list, its links in a graph, its numbers for re-scoring
    fixed_bytes: float  # bytes of centroids and codebooks
    links: int  # Number of links of an HNSW graph; 0: none
    sub_quantizers: int  # Number of sub-quantizers of a product quantizer; 0: none
    codewords: int

    @property
    def vector_bytes(self) -> float:
        """Return the bytes of one vector in the index."""
        return self.code_bytes + self.beside_bytes

    @property
    def exhaustive(self) -> bool:
        """Return True if vectors are staged in the storage that is searched (`indexing/shard/waiting.py`)."""
        return self.factory in ("Flat", "SQfp16")


def index_kind(factory: str, dim: int, halves: bool = False) -> IndexKind:
    """Return the numbers of a factory string for vectors of `dim` numbers. `halves` adds 16-bit vectors, as
    index.rescore_candidates and index.products=bfloat16 need them. Raises ValueError for an unknown factory.

    The bytes are those of https://github.com/facebookresearch/faiss/wiki/Faiss-indexes.
    """
    parts = factory.split(",")
    lists = links = sub_quantizers = codewords = 0
    beside, fixed = 2.0 * dim * halves, 0.0
    code: float | None = None
    if re.fullmatch(r"OPQ[1-9]\d*", parts[0]):  # a rotation before everything else
        parts, fixed = parts[1:], dim * dim * FLOAT
    for position, part in enumerate(parts):
        if (found := re.fullmatch(r"IVF([1-9]\d*)(?:_HNSW(\d+))?", part)) and position == 0:
            lists = int(found[1])
            beside += ID
            fixed += lists * (dim * FLOAT + (_graph_bytes(int(found[2])) if found[2] else 0))
        elif (found := re.fullmatch(r"HNSW([1-9]\d*)", part)) and position == 0:
            links = int(found[1])
            beside += _graph_bytes(links)
        elif part == "Flat" and code is None:
            code = dim * FLOAT
        elif part in SCALAR_BITS and code is None:
            code = math.ceil(dim * SCALAR_BITS[part] / 8)
            fixed += 2 * dim * FLOAT
        elif (found := re.fullmatch(r"PQ([1-9]\d*)(?:x(\d+))?(?:np)?", part)) and code is None:
            sub_quantizers, codewords = int(found[1]), 2 ** int(found[2] or 8)
            code = math.ceil(sub_quantizers * int(found[2] or 8) / 8)
            fixed += codewords * dim * FLOAT
        elif (found := re.fullmatch(r"RFlat|Refine\((Flat|SQ\w+)\)", part)) and code is not None:
            beside += dim * FLOAT if found[1] in (None, "Flat") else math.ceil(dim * SCALAR_BITS.get(found[1], 16) / 8)
        else:
            allowed = "must be Flat, SQ4, SQ6, SQ8, SQfp16, SQbf16, PQm or PQmxb, also after IVFn, HNSWm or OPQm, and"
            raise refuse("index.factory", factory, f"{allowed} before RFlat, whose bytes are known")
    if code is None and not links:
        raise refuse("index.factory", factory, f"must have a code behind {parts[0]}, such as {parts[0]},Flat")
    code = dim * FLOAT if code is None else code
    return IndexKind(
        factory=factory,
        lists=lists,
        code_bytes=code,
        beside_bytes=beside,
        fixed_bytes=fixed,
        links=links,
        sub_quantizers=sub_quantizers,
        codewords=codewords,
    )


def _graph_bytes(links: int) -> float:
    """Return the bytes of one vector's links: 2 * links neighbours on the lowest level, links on each level above,
    which 1 / links of the vectors reach; an offset of 8 bytes and a level of 4 (FAISS, impl/HNSW.h)."""
    return 4 * (2 * links + links / (links - 1) if links > 1 else 4) + 12


def index_bytes(kind: IndexKind, num_vectors: int) -> float:
    """Return the bytes of one generation of one shard."""
    return kind.fixed_bytes + num_vectors * kind.vector_bytes


@dataclass(frozen=True)
class ShardBytes:
    """The memory of one shard, without its process, in bytes."""

    generation: float  # bytes of one index
    staging: float  # bytes of the vectors that are staged for the next generation
    on_gpu: bool

    @property
    def serving(self) -> float:
        """Return the bytes between refreshes, on the device of the index."""
        return self.generation

    @property
    def refreshing(self) -> float:
        """Return the usual peak on the device of the index: one generation serves, the next one is complete beside
        it."""
        return 2 * self.generation + (0.0 if self.on_gpu else self.staging)

    @property
    def at_most(self) -> float:
        """Return the highest peak on the device of the index: two generations are open (`MAX_COMMITTED` of a shard),
        because a snapshot of the older one is being written, while the next one is built."""
        scratch = GPU_SCRATCH_BYTES if self.on_gpu else self.staging
        return (MAX_COMMITTED + 1) * self.generation + scratch

    @property
    def host_at_most(self) -> float:
        """Return the highest peak in the host's memory: everything, or for a GPU index the staged vectors and the copy
        of the index that is made there."""
        return self.staging + self.generation if self.on_gpu else self.at_most


def shard_bytes(
    kind: IndexKind, num_vectors: int, *, dim: int, training_sample: int, on_gpu: bool = False
) -> ShardBytes:
    """Return the memory of a shard of `num_vectors`. An exhaustive CPU index stages in its storage; another kind holds
    its vectors in float32, and a copy of its training sample, until it is built."""
    generation = index_bytes(kind, num_vectors)
    if kind.exhaustive and not on_gpu:
        return ShardBytes(generation, 0.0, on_gpu)
    sample = min(training_sample, num_vectors) if kind.lists or kind.sub_quantizers else 0
    return ShardBytes(generation, float((num_vectors + sample) * dim * FLOAT), on_gpu)


def build_work(kind: IndexKind, num_vectors: int, dim: int, training_sample: int) -> tuple[float, float]:
    """Return the floating-point operations of matrix products, and the bytes copied, from staged vectors to a built
    index.

    An IVF trains its centroids by k-means and assigns every vector; a product quantizer trains 256 words and encodes; a
    graph compares each new vector with the candidates of its search.
    """
    sample = min(training_sample, num_vectors)
    flops = 0.0
    if kind.lists:
        flops += 2.0 * dim * kind.lists * (KMEANS_ROUNDS * min(sample, KMEANS_POINTS * kind.lists) + num_vectors)
    if kind.sub_quantizers:
        points = min(sample, PQ_POINTS * kind.codewords)
        flops += 2.0 * dim * kind.codewords * (PQ_ROUNDS * points + num_vectors)
    if kind.links:
        flops += 2.0 * dim * HNSW_VISITED * num_vectors
    passes = EXHAUSTIVE_PASSES if kind.exhaustive else OTHER_PASSES
    return flops, passes * num_vectors * dim * float(FLOAT)


def stage_seconds(num_vectors: int, dim: int, copy_bytes: float, num_workers: int) -> float:
    """Return the seconds from encoded chunks to staged vectors: each worker sends one chunk after another."""
    return STAGE_PASSES * num_vectors * dim * FLOAT / copy_bytes / num_workers


def build_seconds(work: tuple[float, float], product_flops: float, copy_bytes: float) -> float:
    """Return the seconds of `work` at these rates."""
    return work[0] / product_flops + work[1] / copy_bytes


def search_work(
    kind: IndexKind, num_vectors: int, *, dim: int, batch: int, nprobe: int, on_gpu: bool = False
) -> tuple[float, float, float]:
    """Return the cost of `batch` queries for one shard: operations of products of all queries with all vectors;
    operations of coarse products; bytes read by one query after another.

    Flat, and SQfp16 on a GPU, multiply the batch with all vectors; other codes are decoded for each query; an IVF reads
    `nprobe` of its lists for each query; a graph visits about `links` times as many vectors as it answers.
    """
    if kind.factory == "Flat" or (on_gpu and kind.exhaustive):
        return 2.0 * batch * num_vectors * dim, 0.0, 0.0
    read = dim * FLOAT  # decoding takes as long as the saved bytes would
    if kind.sub_quantizers:
        read = kind.sub_quantizers * FLOAT
    if kind.lists:
        visited = num_vectors * min(nprobe, kind.lists) / kind.lists
        return 0.0, 2.0 * batch * kind.lists * dim, batch * visited * read
    if kind.links:
        return 0.0, 0.0, batch * min(num_vectors, HNSW_VISITED) * float(dim * FLOAT)
    return 0.0, 0.0, batch * num_vectors * float(read)


# ---------------------------------------------------------------- encoding


def encode_seconds(num_passages: int, flops_each: float, flops_per_s: float, num_workers: int) -> float:
    """Return the seconds to encode all passages once."""
    return num_passages * flops_each / (flops_per_s * num_workers)


# ---------------------------------------------------------------- training


def state_bytes(
    trained: int, frozen: int, *, stage: int, ranks: int, precision: str, offload: bool
) -> tuple[float, float]:
    """Return (device, host) bytes of weights, gradients and AdamW's state on one of `ranks`.

    bf16: 2 per weight, 2 per gradient, 16 of fp32 gradient, master and moments, as DeepSpeed's
    `estimate_zero2_model_states_mem_needs` and `estimate_zero3_...` count; each stage divides one more of them by the
    ranks (Rajbhandari et al. 2020, arXiv:1910.02054, section 3). fp32 and bf16_autocast: 4, 4 and 8, and 4 more for the
    copy that ZeRO's partitions hold.
    """
    weight, gradient, rest = (2, 2, 16) if precision == "bf16" else (4, 4, 8 if stage == 0 else 12)
    per_rank = [1 / ranks if stage >= needed else 1.0 for needed in (3, 2, 1)]
    device = trained * weight * per_rank[0] + trained * gradient * per_rank[1]
    host = 0.0
    if offload:
        host = trained * rest * per_rank[2]
    else:
        device += trained * rest * per_rank[2]
    return device + frozen * weight * per_rank[0], host


def activation_bytes(
    tokens: float, length: float, layers: int, hidden: int, heads: int, value_bytes: int, checkpointing: bool
) -> float:
    """Return the bytes that a backward pass needs for `tokens` tokens in sequences of `length`.

    34 h + 5 a s bytes per token and layer in 16 bits (Korthikanti et al. 2022, arXiv:2205.05198, equation 2); with
    checkpointing each layer's input and one whole layer.
    """
    whole = (34 * hidden + 5 * heads * length) * value_bytes / 2
    if checkpointing:
        return tokens * (layers * hidden * value_bytes + whole)
    return tokens * layers * whole
