"""Checks, before a stage starts, that the machines have the memory that it needs.

The needs are those of the verb plan (`cluster/planning/sizing.py`, `cluster/planning/estimate.py`), the placement is
that of the stage. The memory of a machine is Ray's `memory` resource, or the free memory of this one; that of a GPU is
what the driver reports or, on other machines, the size of its kind. Unknown sizes are not checked.
"""

from collections.abc import Callable
from pathlib import Path

from cluster.config.settings import Settings
from cluster.planning import estimate
from cluster.planning.hardware import GB, planned_host
from cluster.planning.placement import PlacementPlan
from cluster.planning.plan import duration, work_of
from cluster.planning.sizing import SHARED_GPU, Machines, Work, encode_seconds, shard_bytes, trainer_bytes, worker_bytes


def check_fit(
    settings: Settings, placement: PlacementPlan, num_passages: int, say: Callable[[str], None] = print
) -> None:
    """Refuse a stage that needs more memory than its machines have (ValueError), or only log it: cluster.check_fit. Log
    how long a refresh takes that has no GPU beside trainers that have some."""
    mode, margin = settings.cluster.check_fit, settings.cluster.memory_margin
    on_gpu = placement.trainers.device == "cuda"
    slow = on_gpu and not placement.workers.gpus
    if mode == "off" and not slow:
        return
    root = Path(settings.run.directory) / settings.run.name
    try:
        work, _ = work_of(settings, root, num_passages, on_gpu)
    except (ValueError, AttributeError, TypeError) as error:  # a configuration that is absent or unusual
        say(f"the memory of {settings.run.name} is not checked: {error}")
        return
    if slow and work.uses_index:
        say(_on_cpu(work, placement))
    if mode == "off":
        return
    shards = settings.index.num_shards  # those of the placement are their replicas, each with a whole part
    way_out = "cluster.refresh_gpus=0 encodes on CPU; " if 0 < placement.workers.gpus < 1 else ""
    for hint, (have, seats) in (("", _on_host(work, placement, shards)), (way_out, _on_gpu(work, placement, shards))):
        needed = sum(number * each for _, number, each in seats)
        if have and needed > have * (1 - margin):
            complaint = _complaint(settings, have, seats, hint)
            if mode == "refuse":
                raise ValueError(complaint)
            say(f"warning: {complaint}")


Seats = list[tuple[str, int, float]]  # name, Number on one machine (or on one GPU), bytes of each


def _on_cpu(work: Work, placement: PlacementPlan) -> str:
    """Return the sentence that says how long refreshes take which have no GPU beside trainers that have some."""
    seat = placement.workers
    cpus = min(int(node.cpus) for node in placement.nodes)
    host, threads = planned_host(max(1, cpus), 0.0), (1, seat.threads)
    machines = Machines(device=None, host=host, gpus_per_node=0, limit=1, network=1.0, margin=0.0, threads=threads)
    lasts = duration(encode_seconds(work, machines, seat.number))
    return (
        f"refresh workers encode on CPU ({seat.number} x {seat.threads} threads): a refresh of {work.passages:,} "
        f"passages takes about {lasts}. cluster.trainer_gpus={SHARED_GPU[0]} and "
        f"cluster.refresh_gpus={SHARED_GPU[1]} let a trainer and a worker share a GPU"
    )


def _on_host(work: Work, placement: PlacementPlan, num_shards: int) -> tuple[float, Seats]:
    """Return the memory of the machine that its processes fill most, and these processes."""
    trains, encodes = placement.trainers, placement.workers
    device_bytes, host_bytes = trainer_bytes(work, trains.number, trains.gpus > 0)
    each = {trains: host_bytes if trains.gpus else device_bytes}
    if work.uses_index:
        each[placement.shards] = shard_bytes(work, num_shards).host_at_most + estimate.PROCESS_BYTES
        each[encodes] = estimate.TORCH_PROCESS_BYTES if encodes.gpus else worker_bytes(work, on_gpu=False)
    nodes: list[tuple[float, Seats]] = [
        (node.memory_bytes, [(seat.name, seat.places.count(number), size) for seat, size in each.items()])
        for number, node in enumerate(placement.nodes)
        if node.memory_bytes
    ]
    return max(nodes, key=lambda node: _total(node[1]) / node[0], default=(0.0, []))


def _on_gpu(work: Work, placement: PlacementPlan, num_shards: int) -> tuple[float, Seats]:
    """Return the memory of the smallest GPU, and the processes on the fullest one: those with a part of a GPU may share
    it."""
    have = min((node.gpu_memory_bytes for node in placement.nodes if node.gpu_memory_bytes), default=0.0)
    trains = placement.trainers
    device_bytes, _ = trainer_bytes(work, trains.number, on_gpu=True)
    each = {"trainer": device_bytes}
    if work.uses_index:
        on_gpu = shard_bytes(work, num_shards).at_most + estimate.CUDA_CONTEXT_BYTES
        each |= {"index shard": on_gpu, "refresh worker": worker_bytes(work, on_gpu=True)}
    fullest: Seats = []
    for seat in placement.seats():
        if seat.gpus >= 1 and seat.name in each:  # it has one or more GPUs for itself
            alone: Seats = [(seat.name, 1, each[seat.name])]
            fullest = max(fullest, alone, key=_total)
    shared: Seats = []
    free = 1.0
    parts = [seat for seat in placement.seats() if 0 < seat.gpus < 1 and seat.name in each]
    # the largest per share of a GPU first: the worst company
    for seat in sorted(parts, key=lambda seat: each[seat.name] / seat.gpus, reverse=True):
        number = min(seat.number, int(free / seat.gpus + 1e-6))
        free -= number * seat.gpus
        shared.append((seat.name, number, each[seat.name]))
    return have, max(fullest, shared, key=_total)


def _total(seats: Seats) -> float:
    return sum(number * each for _, number, each in seats)


def _complaint(settings: Settings, have: float, seats: Seats, hint: str) -> str:
    parts = " + ".join(f"{number} x {name} of {each / GB:.2f} GB" for name, number, each in seats if number)
    margin = settings.cluster.memory_margin
    return (
        f"{settings.run.name} does not fit: {parts} = {_total(seats) / GB:.2f} GB, and there are {have / GB:.2f} GB, "
        f"of which {margin:.0%} stay free (cluster.memory_margin). `tandem plan` shows what would fit; {hint}"
        "cluster.check_fit=warn starts it nevertheless"
    )
