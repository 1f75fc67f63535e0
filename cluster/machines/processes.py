"""Ends processes that do not answer any more.

`ray.kill` asks the process itself before anything else, and for half a minute does nothing to one that has been stopped
(SIGSTOP, a hung driver call). So every actor reports its machine and process once, and a task on that machine ends it.
"""

import os
from dataclasses import dataclass

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Place:
    """One process on one machine of the cluster; `created` tells it from a later one with the same number."""

    node: str
    pid: int
    created: float


def here() -> Place:
    """Return the place of the calling process, an actor."""
    pid = os.getpid()
    return Place(ray.get_runtime_context().get_node_id(), pid, psutil.Process(pid).create_time())


def end(place: Place) -> None:
    """Have the process at `place` killed; returns at once. Nothing happens if it has ended already."""
    strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
    _end_here.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(place)


@ray.remote
def _end_here(place: Place) -> None:
    try:
        process = psutil.Process(place.pid)
        if process.create_time() == place.created:
            process.kill()
    except psutil.NoSuchProcess:
        return
