"""Checks, before a stage starts, that the machines have the memory that it needs.

The needs are those of the verb plan (`cluster/planning/sizing.py`, `cluster/planning/estimate.py`), the placement is
that of the stage. The memory of a machine is Ray's `memory` resource, or the free memory of this one; that of a GPU is
what the driver reports or, on other machines, the size of its kind. Unknown sizes are not checked.
"""

import math
from collections.abc import Callable
from pathlib import Path

from cluster.config.settings import Settings
from cluster.planning import estimate
from cluster.planning.hardware import GB
from cluster.planning.placement import PlacementPlan
from cluster.planning.plan import work_of
from cluster.planning.sizing import Work, shard_bytes, trainer_bytes, worker_bytes


def check_fit(
    settings: Settings, placement: PlacementPlan, num_passages: int, say: Callable[[str], None] = print
) -> None:
    """Refuse a stage that needs more memory than its machines have (ValueError), or only log it: cluster.check_fit."""
    mode, margin = settings.cluster.check_fit, settings.cluster.memory_margin
    if mode == "off":
        return
    on_gpu = placement.trainers.device == "cuda"
    root = Path(settings.run.directory) / settings.run.name
    try:
        work, _ = work_of(settings, root, num_passages, on_gpu)
    except (ValueError, AttributeError, TypeError) as error:  # a configuration that is absent or unusual
        say(f"the memory of {settings.run.name} is not checked: {error}")
        return
    shards = settings.index.num_shards  # those of the placement are their replicas, each with a whole part
    for have, seats in (_on_host(work, placement, shards), _on_gpu(work, placement, shards)):
        needed = sum(number * each for _, number, each in seats)
        if have and needed > have * (1 - margin):
            complaint = _complaint(settings, have, seats)
            if mode == "refuse":
                raise ValueError(complaint)
            say(f"warning: {complaint}")


Seats = list[tuple[str, int, float]]  # name, Number on one machine (or on one GPU), bytes of each


def _on_host(work: Work, placement: PlacementPlan, num_shards: int) -> tuple[float, Seats]:
    """Return the memory of the smallest machine, and the processes on one machine if they are spread evenly."""
    nodes = len(placement.nodes)
    have = min((node.memory_bytes for node in placement.nodes if node.memory_bytes), default=0.0)
    trains, encodes = placement.trainers, placement.workers
    device_bytes, host_bytes = trainer_bytes(work, trains.number, trains.gpus > 0)
    seats = [("trainer", math.ceil(trains.number / nodes), host_bytes if trains.gpus else device_bytes)]
    if work.uses_index:
        one = shard_bytes(work, num_shards)
        of_worker = estimate.TORCH_PROCESS_BYTES if encodes.gpus else worker_bytes(work, on_gpu=False)
        each = one.host_at_most + estimate.PROCESS_BYTES
        seats.append(("index shard", math.ceil(placement.shards.number / nodes), each))
        seats.append(("refresh worker", math.ceil(encodes.number / nodes), of_worker))
    return have, seats


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


def _complaint(settings: Settings, have: float, seats: Seats) -> str:
    parts = " + ".join(f"{number} x {name} of {each / GB:.2f} GB" for name, number, each in seats if number)
    margin = settings.cluster.memory_margin
    return (
        f"{settings.run.name} does not fit: {parts} = {_total(seats) / GB:.2f} GB, and there are {have / GB:.2f} GB, "
        f"of which {margin:.0%} stay free (cluster.memory_margin). `tandem plan` shows what would fit; "
        "cluster.check_fit=warn starts it nevertheless"
    )
