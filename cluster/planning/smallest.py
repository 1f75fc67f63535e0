"""Finds the smallest placement that holds one stage.

It is found in this order, each number as small as it can be: trainers (as many as configured, more if ZeRO has to
spread their states), shards (each holds its part with the swap copy; one per machine if there are more machines),
refresh workers (encoding takes at most half of the time between two publishes; fewer if the machines are not enough, as
the staleness then shows).
"""

import math
from collections.abc import Callable

from cluster.planning import estimate
from cluster.planning.hardware import GB
from cluster.planning.sizing import (
    SHARED_GPU,
    Counts,
    Machines,
    Work,
    encode_seconds,
    shard_bytes,
    step_seconds,
    trainer_bytes,
    worker_bytes,
)
from indexing.declare import refuse

ENCODING_SHARE = 0.5  # Share of the time between two publishes
MAX_PLANNED = 1024  # Number of machines, GPUs or shards at most


def smallest(work: Work, machines: Machines) -> Counts:
    """Return the smallest placement that fits. Raises ValueError with the numbers if `machines.limit` is not enough."""
    return _smallest_on_cpu(work, machines) if machines.device is None else _smallest_on_gpus(work, machines)


def _smallest_on_cpu(work: Work, machines: Machines) -> Counts:
    """Return trainers in turn, one shard and one refresh worker on each machine."""

    def needed(nodes: int) -> float:
        trainer, _ = trainer_bytes(work, work.trainers, on_gpu=False)
        there = math.ceil(work.trainers / nodes) * trainer
        if not work.uses_index:
            return there
        return there + worker_bytes(work, on_gpu=False) + _on_one_host(work, nodes)

    nodes = _first(lambda number: needed(number) <= machines.host_room, machines.limit)
    if nodes is None:
        what = f"a trainer, a refresh worker and one of {machines.limit} shards"
        raise ValueError(_too_small(what, needed(machines.limit), machines.host_room, "the memory of one machine"))
    helpers = nodes if work.uses_index else 0
    return Counts(trainers=work.trainers, shards=helpers, workers=helpers, nodes=nodes, gpus=0)


def _smallest_on_gpus(work: Work, machines: Machines) -> Counts:
    """Return the placement on GPUs; shards are on GPUs, too, or in the memory of their machines."""
    room, per_node, limit = machines.device_room, machines.gpus_per_node, machines.limit
    if work.trainers > limit:
        raise refuse("plan.gpus", limit, f"must be at least cluster.num_trainers={work.trainers}")
    fitting = _first(lambda number: trainer_bytes(work, number, on_gpu=True)[0] <= room, limit)
    if fitting is None:
        needed = trainer_bytes(work, limit, on_gpu=True)[0]
        raise ValueError(_too_small(f"a trainer among {limit}", needed, room, "the memory of one GPU"))
    trainers = max(fitting, work.trainers)
    if not work.uses_index:
        return Counts(trainers=trainers, shards=0, workers=0, nodes=math.ceil(trainers / per_node), gpus=trainers)
    shards = _first(lambda number: _shard_fits(work, machines, number), MAX_PLANNED)
    if shards is None:
        part = shard_bytes(work, MAX_PLANNED)
        what = f"one of {MAX_PLANNED} shards"
        raise ValueError(_too_small(what, part.at_most, room, "the memory of one GPU or machine"))
    on_gpu = shards * work.replicas if work.index_on_gpu else 0
    if shared := _shared(work, machines, trainers, shards):
        return shared
    left = limit - trainers - on_gpu
    if left < 1:
        one = _size(shard_bytes(work, shards).at_most)
        serving = f" and {on_gpu} serve the index ({one} each with the swap copy)" if on_gpu else ""
        raise ValueError(f"{limit} GPUs (plan.gpus) are not enough: {trainers} train{serving}, none is left to encode")

    interval = _interval(work, step_seconds(work, machines, trainers))
    wanted = math.ceil(encode_seconds(work, machines, 1) / interval) if interval else 1
    workers = min(max(1, wanted), left)
    gpus = trainers + on_gpu + workers
    nodes = max(math.ceil(gpus / per_node), 1 if on_gpu else shards)
    return Counts(trainers=trainers, shards=shards if on_gpu else nodes, workers=workers, nodes=nodes, gpus=gpus)


def _interval(work: Work, step_s: float) -> float:
    """Return the seconds that encoding may take; 0 if nothing is ever published."""
    return work.every_steps * step_s * ENCODING_SHARE


def _shard_fits(work: Work, machines: Machines, shards: int) -> bool:
    """Return True if the shards fit. Shards on GPUs share a host as the GPUs do; those in a host's memory have it for
    themselves, but for a trainer's part on each GPU."""
    one = shard_bytes(work, shards)
    beside = machines.gpus_per_node * estimate.TORCH_PROCESS_BYTES
    if work.index_on_gpu:
        here = min(shards * work.replicas, machines.gpus_per_node)  # GPUs of one machine share its memory
        on_gpu = one.at_most + estimate.CUDA_CONTEXT_BYTES <= machines.device_room
        return on_gpu and here * (one.host_at_most + estimate.PROCESS_BYTES) + beside <= machines.host_room
    return _on_one_host(work, shards) + beside <= machines.host_room


def _on_one_host(work: Work, nodes: int) -> float:
    """Return the bytes of an index in the memory of `nodes` machines on each of them: a replica of as many shards as
    each shard has replicas."""
    return work.replicas * (shard_bytes(work, nodes).at_most + estimate.PROCESS_BYTES)


def _shared(work: Work, machines: Machines, trainers: int, shards: int) -> Counts | None:
    """Return a placement on the GPUs of the trainers alone, each of which has a refresh worker, too, and the shard of a
    GPU index; None if memory or time does not allow it, or several trainers leave GPUs to others."""
    nodes = math.ceil(trainers / machines.gpus_per_node)
    held = trainers // work.replicas if work.index_on_gpu else nodes  # shards, as many as there are places for
    if shards > held or (trainers > 1 and machines.limit > trainers):
        return None
    needed = trainer_bytes(work, trainers, on_gpu=True)[0] + worker_bytes(work, on_gpu=True)
    if work.index_on_gpu:
        needed += shard_bytes(work, held).at_most + estimate.CUDA_CONTEXT_BYTES
    interval = _interval(work, step_seconds(work, machines, trainers, SHARED_GPU[0]))
    seconds = encode_seconds(work, machines, trainers, SHARED_GPU[1])
    fast = machines.limit == trainers or not interval or seconds <= interval
    if needed > machines.device_room or not fast:
        return None
    return Counts(trainers=trainers, shards=held, workers=trainers, nodes=nodes, gpus=trainers, shared=True)


def _first(fits: Callable[[int], bool], limit: int) -> int | None:
    """Return the smallest number from 1 to `limit` that fits, if every larger one fits as well; None if none does."""
    low, high = 1, limit
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:.1f} GB"


def _too_small(what: str, needed: float, room: float, where: str) -> str:
    return (
        f"this stage fits on none of the machines planned for: {what} needs {_size(needed)}, {where} has {_size(room)} "
        "to use (cluster.memory_margin left free). Raise engine.zero_stage or set engine.offload_optimizer, "
        "gradient_checkpointing or lora.rank for the trainer; take a smaller index.factory for the index; or plan for "
        "larger or more machines (plan.gpu, plan.gpus, plan.node_memory_gb)"
    )
