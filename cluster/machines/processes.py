"""Ending a process that does not answer any more.

`ray.kill` asks the process itself before anything else, and does nothing to one that has been stopped (SIGSTOP, a hung
driver call) for half a minute. So every actor says once where it lives, and is ended there by a task on its machine.
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
    """The calling process, an actor."""
    pid = os.getpid()
    return Place(ray.get_runtime_context().get_node_id(), pid, psutil.Process(pid).create_time())


def end(place: Place) -> None:
    """Have the process at `place` killed; returns at once. Nothing happens when it has ended already."""
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
