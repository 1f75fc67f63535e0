"""Waits, within a bound, until the cluster has room for what was planned on it, and says meanwhile what it waits for.

Ray itself keeps a process for which there is no room for ever, without a word. Actors of the index are started at once,
on the nodes of the plan. Ray Train asks for the room of all trainers later, on nodes of the plan, too: `hold_trainers`
keeps it free until then, so that nothing else is started in it.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.planning.placement import PlacementPlan, Seat

SAY_S = 20.0  # Seconds between two sentences that say what is waited for
LOOK_S = 1  # Seconds between two looks, so that a signal is answered
NODE_LABEL = "ray.io/node-id"  # https://docs.ray.io/en/latest/ray-core/scheduling/labels.html
MOST_NODES = 8  # that a sentence lists


def on_node(node_id: str) -> dict[str, Any]:
    """Return Ray's options for an actor of this node ("": any); it goes to another one when the node is lost."""
    if not node_id:
        return {}
    # An actor that asks for nothing at all is put anywhere; so each asks for a byte.
    return {"memory": 1, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=True)}


def node_labels(placement: PlacementPlan) -> list[dict[str, str]] | None:
    """Return the label of each trainer's node, as Ray Train takes them; None where any node will do, as when one of
    them is lost."""
    ids = placement.node_ids(placement.trainers)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [{NODE_LABEL: one} for one in ids] if alive.issuperset(ids) else None


def hold_trainers(placement: PlacementPlan, timeout_s: float) -> PlacementGroup:
    """Wait for the room of all trainers and keep it, until `release`. Raises TimeoutError that says what is missing."""
    seat = placement.trainers
    bundle = {"CPU": seat.cpus} | ({"GPU": seat.gpus} if seat.gpus else {})
    labels: Any = node_labels(placement)
    group = placement_group([bundle] * seat.number, bundle_label_selector=labels)
    begin = latest = time.monotonic()
    try:
        while not group.wait(LOOK_S):
            now = time.monotonic()
            if now - begin > timeout_s:
                raise TimeoutError(
                    f"there was no room for the trainers within {timeout_s:g} s (cluster.start_timeout_s): "
                    f"{missing([seat] * seat.number)}\n{placement}"
                )
            if now - latest >= SAY_S:
                latest = now
                print(f"waits {now - begin:.0f} s for room: {missing([seat] * seat.number)}", flush=True)
    except BaseException:
        release(group)
        raise
    return group


def release(group: PlacementGroup) -> None:
    """Free what `hold_trainers` holds; harmless when it is free."""
    remove_placement_group(group)


def await_answers(answers: list[Any], seats: Sequence[Seat], timeout_s: float, placement: PlacementPlan) -> None:
    """Wait for the first answer of each actor of the index; `seats` says what each of them holds. Raises TimeoutError
    that says which are missing, and what an actor raised."""
    begin, left = time.monotonic(), timeout_s
    while True:
        ready, late = ray.wait(answers, num_returns=len(answers), timeout=min(SAY_S, max(0.0, left)))
        if not late:
            ray.get(ready)
            return
        what = missing([seats[answers.index(one)] for one in late])
        left = timeout_s - (time.monotonic() - begin)
        if left <= 0:
            raise TimeoutError(
                f"{len(late)} of {len(answers)} actors of the index service did not start within {timeout_s:g} s "
                f"(cluster.start_timeout_s): {what}\n{placement}"
            )
        print(f"waits {timeout_s - left:.0f} s for the index service to start: {what}", flush=True)


def missing(seats: Iterable[Seat]) -> str:
    """Return the processes that are waited for, one for each of `seats`, and what each node has free."""
    wanted = Counter(f"{seat.name} of {seat.cpus:g} CPU and {seat.gpus:g} GPU" for seat in seats)
    return f"{', '.join(f'{number} x {what}' for what, number in wanted.items())}; free: {_free()}"


def _free() -> str:
    from ray._private.state import available_resources_per_node  # the public functions add all nodes up

    available = available_resources_per_node()
    free = [
        f"{one.get('CPU', 0.0):g} CPU and {one.get('GPU', 0.0):g} GPU on {node['NodeManagerAddress']}"
        for node in ray.nodes()
        if node["Alive"]
        for one in [available.get(node["NodeID"], {})]
    ]
    more = f", and {len(free) - MOST_NODES} more nodes" if len(free) > MOST_NODES else ""
    return ", ".join(free[:MOST_NODES]) + more
