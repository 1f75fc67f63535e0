"""Estimates the cost of an index, a refresh, a search and a trainer by pure formulas of sizes and rates.

Bytes and seconds are for one shard, one worker or one trainer unless the name says otherwise. A formula from a
publication names it; the others are counted from the code of `indexing/`, and tests compare them with real FAISS
indexes.
"""

from dataclasses import dataclass

from indexing.dense.kinds import FLOAT, Kind
from indexing.shard.serving import MAX_COMMITTED

# Number of times that vectors pass through memory on their way to a shard, in units of a copy (compared with
# benchmarks/scale.py): out of a tensor, into new pages of the object store, into storage, and a check for NaN
STAGE_PASSES = 12
GPU_SCRATCH_BYTES = 256 * 2**20  # indexing/dense/faiss_build.py
PROCESS_BYTES = 0.25e9  # bytes of an actor with numpy and FAISS
TORCH_PROCESS_BYTES = 0.9e9  # bytes of an actor with torch, transformers and DeepSpeed
CUDA_CONTEXT_BYTES = 0.6e9
# bytes of DeepSpeed's two buckets of 2e8 numbers (training/engine/engine_setup.py), in 16 bits
BUCKET_BYTES = 2 * 2 * 2e8


def index_bytes(kind: Kind, num_vectors: int, dim: int, halves: bool = False) -> float:
    """Return the bytes of one generation of one shard. `halves` adds 16-bit vectors, as index.rescore_candidates and
    index.products=bfloat16 need them. The bytes of a kind are those of
    https://github.com/facebookresearch/faiss/wiki/Faiss-indexes."""
    vector = kind.code_bytes(dim) + kind.id_bytes + kind.link_bytes + 2.0 * dim * halves
    return kind.fixed_bytes(dim) + num_vectors * vector


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
    kind: Kind, num_vectors: int, *, dim: int, training_sample: int, on_gpu: bool = False, halves: bool = False
) -> ShardBytes:
    """Return the memory of a shard of `num_vectors`. An exhaustive CPU index stages in its storage; another kind holds
    its vectors in float32, and a copy of its training sample, until it is built."""
    generation = index_bytes(kind, num_vectors, dim, halves)
    if kind.exhaustive and not on_gpu:
        return ShardBytes(generation, 0.0, on_gpu)
    sample = min(training_sample, num_vectors) if kind.sampled else 0
    return ShardBytes(generation, float((num_vectors + sample) * dim * FLOAT), on_gpu)


def stage_seconds(num_vectors: int, dim: int, copy_bytes: float, num_workers: int) -> float:
    """Return the seconds from encoded chunks to staged vectors: each worker sends one chunk after another."""
    return STAGE_PASSES * num_vectors * dim * FLOAT / copy_bytes / num_workers


def build_seconds(work: tuple[float, float], product_flops: float, copy_bytes: float) -> float:
    """Return the seconds of `work` at these rates."""
    return work[0] / product_flops + work[1] / copy_bytes


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
