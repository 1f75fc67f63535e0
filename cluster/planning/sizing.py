"""Computes what one stage needs and costs on given machines.

`Work` is the work of the stage, `Machines` the hardware, `Counts` the number of processes, and `Costs` the result;
nothing here reads settings.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.planning import estimate
from cluster.planning.hardware import BANDWIDTH_SHARE, CPU_SHARE, Device, Host
from indexing.dense.kinds import parse

if TYPE_CHECKING:
    from training.measuring.sizes import EncoderSize, GeneratorSize

SHARED_GPU = (0.6, 0.2, 0.2)  # Share of a GPU that a trainer shares: trainer, refresh worker, shard
COMMIT_S = 0.05  # Seconds of a commit, which only swaps names
RAY_CALL_S, RAY_SHARD_S = 0.0015, 0.0005  # seconds of one search through Ray, and per shard (benchmarks/search.py)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one stage."""

    passages: int
    tokens: float  # Number of tokens of a passage, mean
    dim: int
    encoder: "EncoderSize"
    reader: "GeneratorSize | None"  # None: the objective has no generator
    trained: int  # Number of parameters that train
    frozen: int  # Number of frozen parameters that trainers hold
    published: int  # Number of parameters of the passage tower
    encodes_passages: bool  # True if the training step encodes passages with gradient
    fused: bool
    uses_index: bool
    factory: str
    halves: bool  # True with 16-bit vectors beside the index: index.rescore_candidates, index.products
    index_on_gpu: bool
    replicas: int  # of each shard
    nprobe: int
    training_sample: int
    batch: int  # Number of questions of a micro-batch and trainer
    accumulation: int
    trainers: int  # Number of trainers that share a step's questions; more if memory requires it
    k: int
    question_tokens: int
    prompt_tokens: float  # Number of tokens of a prompt with one passage
    answer_tokens: int
    checkpointing: tuple[bool, bool]  # of encoder, generator
    cached_passages: int  # encoder.gradient_cache_passages
    loss_chunk: int
    zero_stage: int
    offload: bool
    precision: str  # of training: fp32, bf16, bf16_autocast
    published_bytes: int  # bytes of one published number: 2 or 4
    every_steps: int  # steps between publishes; 0: never
    steps: int
    step_seconds: float  # seconds of a step; 0: estimated
    batch_tokens: int  # Number of tokens of one encoder call of a refresh worker


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The hardware. `device` is None without GPUs; `limit` counts GPUs, or machines without them."""

    device: Device | None
    host: Host
    gpus_per_node: int
    limit: int
    network: float  # bytes per second of each machine
    margin: float  # Share of every memory that is left free
    threads: tuple[int, int] = (1, 1)  # Number of threads of a trainer and of a refresh worker on CPU

    @property
    def host_room(self) -> float:
        """Return the usable bytes of one machine."""
        return self.host.memory_bytes * (1 - self.margin)

    @property
    def device_room(self) -> float:
        """Return the usable bytes of one GPU."""
        assert self.device is not None
        return self.device.memory_bytes * (1 - self.margin)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The numbers of processes and machines."""

    trainers: int
    shards: int
    workers: int
    nodes: int
    gpus: int
    shared: bool = False  # True if trainers share their GPUs with all others

    def layout(self, machines: Machines, on_gpu: int) -> str:
        """Return the processes of each machine in words, machines counted from 1; `on_gpu` shards are on GPUs."""
        if machines.device is None:
            return "machine 1" if self.nodes == 1 else f"machine 1: trainer; machines 1-{self.nodes}: shards, refresh"
        parts, taken = [], 0
        seats = [("train", self.trainers), ("serve", on_gpu), ("refresh", self.workers)]
        if self.shared:
            return (
                "machine 1: one GPU does it all" if self.gpus == 1 else f"each of {self.gpus} GPUs does a part of all"
            )
        for name, number in seats:
            if number:
                first, last = taken // machines.gpus_per_node + 1, (taken + number - 1) // machines.gpus_per_node + 1
                where = f"machine {first}" if first == last else f"machines {first}-{last}"
                parts.append(f"{name} on {number} GPU of {where}")
                taken += number
        if self.shards and not on_gpu:
            parts.append(
                f"shards in the memory of machines 1-{self.nodes}" if self.nodes > 1 else "shards in its memory"
            )
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The needs and costs of a placement. Bytes, seconds, steps, GPU-hours (machine-hours without GPUs)."""

    shard_generation_bytes: float
    shard_serving_bytes: float
    shard_refreshing_bytes: float
    shard_at_most_bytes: float
    shard_host_at_most_bytes: float
    trainer_bytes: float
    trainer_host_bytes: float
    worker_bytes: float
    encode_s: float
    stage_s: float
    build_s: float
    network_s: float
    refresh_s: float
    step_s: float
    staleness_at_commit_steps: float
    staleness_at_most_steps: float
    search_s: float
    # Share of a step that a shard is busy; above 1 it sets the pace, and `step_s` is longer
    search_share_of_step: float
    query_bytes_per_step: float
    hit_bytes_per_step: float
    vector_bytes_per_refresh: float
    published_bytes_per_refresh: float
    hours_per_refresh: float
    hours_per_run: float


def shard_bytes(work: Work, shards: int) -> estimate.ShardBytes:
    """Return the memory of the largest of `shards` shards."""
    kind = parse(work.factory)
    rows = math.ceil(work.passages / max(1, shards))
    return estimate.shard_bytes(
        kind, rows, dim=work.dim, training_sample=work.training_sample, on_gpu=work.index_on_gpu, halves=work.halves
    )


def trainer_bytes(work: Work, ranks: int, on_gpu: bool) -> tuple[float, float]:
    """Return (device, host) bytes of one trainer among `ranks`; on a CPU the first holds everything."""
    device, host = estimate.state_bytes(
        work.trained, work.frozen, stage=work.zero_stage, ranks=ranks, precision=work.precision, offload=work.offload
    )
    value = 4 if work.precision == "fp32" else 2
    encoder, batch, k = work.encoder, work.batch, work.k
    passages = batch * k if work.encodes_passages else 0
    held = min(passages, work.cached_passages) if work.cached_passages else passages
    shape = (encoder.layers, encoder.hidden, encoder.heads, value, work.checkpointing[0])
    device += estimate.activation_bytes(batch * work.question_tokens, work.question_tokens, *shape)
    device += estimate.activation_bytes(held * work.tokens, work.tokens, *shape)
    if work.reader is not None:
        reader = work.reader
        tokens = batch * k * (work.prompt_tokens + work.answer_tokens)
        length = work.prompt_tokens * (k if work.fused and reader.shape.encoder is None else 1)
        device += estimate.activation_bytes(
            tokens,
            length,
            layers=reader.layers,
            hidden=reader.hidden,
            heads=reader.heads,
            value_bytes=value,
            checkpointing=work.checkpointing[1],
        )
        scored = batch * (1 if work.fused else k) * work.answer_tokens
        if work.loss_chunk:
            scored = min(scored, work.loss_chunk)
        device += scored * reader.vocabulary * (4.0 + value)
    buckets = min(estimate.BUCKET_BYTES, 4.0 * work.trained)
    if on_gpu:
        return device + buckets + estimate.CUDA_CONTEXT_BYTES, host + estimate.TORCH_PROCESS_BYTES
    return device + host + buckets + estimate.TORCH_PROCESS_BYTES, 0.0


def worker_bytes(work: Work, on_gpu: bool) -> float:
    """Return the bytes of one refresh worker on its device: the tower, one batch of states and attention of one
    layer."""
    encoder = work.encoder
    layer = work.batch_tokens * (8.0 * encoder.hidden + encoder.heads * work.tokens) * 4
    base = estimate.CUDA_CONTEXT_BYTES if on_gpu else estimate.TORCH_PROCESS_BYTES
    return work.published * 4.0 + layer + base


def step_seconds(work: Work, machines: Machines, ranks: int, share: float = 1.0) -> float:
    """Return the seconds of one optimiser step: forward and twice as much backward (once more forward with
    checkpointing) of what trains; the gradients travel between machines twice (a ring's all-reduce)."""
    if work.step_seconds:
        return work.step_seconds
    flops = work.batch * work.encoder.flops(work.question_tokens) * (4 if work.checkpointing[0] else 3)
    if work.encodes_passages:
        flops += work.batch * work.k * work.encoder.flops(work.tokens) * (4 if work.checkpointing[0] else 3)
    if work.reader is not None:
        once = work.reader.flops(work.prompt_tokens, work.k, work.answer_tokens, work.fused)
        flops += work.batch * once * (4 if work.checkpointing[1] else 3)
    rate = _compute_rate(machines, work.precision != "fp32", machines.threads[0]) * share
    spread = machines.device is not None and ranks > machines.gpus_per_node
    send = 2.0 * work.trained * (2 if work.precision == "bf16" else 4) / machines.network if spread else 0.0
    return flops * work.accumulation / rate + send


def _compute_rate(machines: Machines, half: bool, threads: int) -> float:
    device = machines.device
    if device is None:
        return machines.host.product_flops * min(threads, machines.host.cpus) * CPU_SHARE
    return (device.flops if half else device.fp32_flops) * device.share


def encode_seconds(work: Work, machines: Machines, workers: int, share: float = 1.0) -> float:
    """Return the seconds in which `workers` encode all passages once."""
    rate = _compute_rate(machines, work.published_bytes == 2, machines.threads[1]) * share
    return estimate.encode_seconds(work.passages, work.encoder.flops(work.tokens), rate, max(1, workers))


def shards_here(counts: Counts) -> int:
    """Return the number of shards on the machine that has most of them."""
    return math.ceil(counts.shards / counts.nodes)


def shard_threads(machines: Machines, counts: Counts) -> int:
    """Return the threads of one shard: an even share of its machine's processors that nobody else uses
    (`cluster/planning/placement.py`)."""
    used = 0
    if machines.device is None:
        used = math.ceil(counts.trainers / counts.nodes) * machines.threads[0]
        used += math.ceil(counts.workers / counts.nodes) * machines.threads[1]
    return max(1, (machines.host.cpus - used) // max(1, shards_here(counts)))


def ray_seconds(counts: Counts) -> float:
    """Return the seconds of one search besides the computation of its shards."""
    return RAY_CALL_S + RAY_SHARD_S * counts.shards


def search_seconds(work: Work, machines: Machines, counts: Counts) -> float:
    """Return the seconds of one batch in the slowest shard: shards work side by side, as far as there are processors
    for them."""
    kind = parse(work.factory)
    rows = math.ceil(work.passages / max(1, counts.shards))
    on_gpu = work.index_on_gpu and machines.device is not None
    scan, coarse, read = kind.search_work(rows, dim=work.dim, batch=work.batch, nprobe=work.nprobe, on_gpu=on_gpu)
    if work.index_on_gpu and machines.device is not None:
        device = machines.device
        stored = rows * kind.code_bytes(work.dim) if scan else read
        arithmetic = (scan + coarse) / (device.fp32_flops * device.share)
        return max(stored / (device.bandwidth * BANDWIDTH_SHARE), arithmetic)
    host, threads, here = machines.host, shard_threads(machines, counts), shards_here(counts)
    crowded = max(1.0, here * threads / host.cpus)
    seconds = scan / host.scan_flops + coarse / host.product_flops + read / host.pair_bytes
    stored = rows * kind.code_bytes(work.dim) if scan else read
    return max(seconds / threads * crowded, here * stored / host.bandwidth)


def build_seconds(work: Work, machines: Machines, counts: Counts) -> float:
    """Return the seconds from staged vectors to prepared indexes, all shards beside each other."""
    kind = parse(work.factory)
    rows = math.ceil(work.passages / max(1, counts.shards))
    flops, copied = kind.build_work(rows, work.dim, work.training_sample)
    host, threads, here = machines.host, shard_threads(machines, counts), shards_here(counts)
    crowded = max(1.0, here * threads / host.cpus)
    alone = copied / host.copy_bytes * max(1.0, here / host.cpus)  # one thread of each shard copies
    return flops / host.product_flops / threads * crowded + max(alone, here * 2 * copied / host.bandwidth)


def costs(work: Work, machines: Machines, counts: Counts) -> Costs:
    """Return everything that a placement needs and costs."""
    on_gpu = machines.device is not None
    train_share, encode_share, _ = SHARED_GPU if counts.shared else (1.0, 1.0, 1.0)
    step = step_seconds(work, machines, counts.trainers, train_share)
    device_bytes, host_bytes = trainer_bytes(work, counts.trainers, on_gpu)
    vectors = work.replicas * work.passages * work.dim * 4.0 if work.uses_index else 0.0  # each replica is sent them
    encode = stage = build = network = search = share = 0.0
    one = estimate.ShardBytes(0.0, 0.0, False)
    if work.uses_index:
        one = shard_bytes(work, counts.shards)
        encode = encode_seconds(work, machines, counts.workers, encode_share)
        stage = estimate.stage_seconds(work.passages, work.dim, machines.host.copy_bytes, counts.workers)
        build = build_seconds(work, machines, counts)
        busy = search_seconds(work, machines, counts)
        search = busy + ray_seconds(counts)
        share = busy * counts.trainers * work.accumulation / step
        step *= max(1.0, share)  # every trainer's batches pass every shard, one after another
        if counts.nodes > 1:
            network = vectors * (counts.nodes - 1) / counts.nodes / (counts.nodes * machines.network)
    refresh = max(encode + stage, network) + build + COMMIT_S if work.uses_index else 0.0
    interval = work.every_steps * step
    refreshes = min(work.steps // work.every_steps, work.steps * step / max(refresh, interval)) if interval else 0.0
    units = counts.gpus if on_gpu else counts.nodes
    encoding = (counts.workers * encode_share) if on_gpu else counts.nodes
    return Costs(
        shard_generation_bytes=one.generation,
        shard_serving_bytes=one.serving,
        shard_refreshing_bytes=one.refreshing,
        shard_at_most_bytes=one.at_most,
        shard_host_at_most_bytes=one.host_at_most,
        trainer_bytes=device_bytes,
        trainer_host_bytes=host_bytes,
        worker_bytes=worker_bytes(work, on_gpu) if work.uses_index else 0.0,
        encode_s=encode,
        stage_s=stage,
        build_s=build,
        network_s=network,
        refresh_s=refresh,
        step_s=step,
        staleness_at_commit_steps=refresh / step if refreshes else 0.0,
        staleness_at_most_steps=(refresh + max(interval, refresh)) / step if refreshes else 0.0,
        search_s=search,
        search_share_of_step=share,
        query_bytes_per_step=counts.trainers * work.accumulation * counts.shards * work.batch * work.dim * 4.0,
        hit_bytes_per_step=counts.trainers * work.accumulation * counts.shards * work.batch * work.k * 12.0,
        vector_bytes_per_refresh=vectors,
        published_bytes_per_refresh=float(counts.workers * work.published * work.published_bytes),
        hours_per_refresh=encoding * encode / 3600,
        hours_per_run=units * (work.steps * step + refresh) / 3600,
    )
