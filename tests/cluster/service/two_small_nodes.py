"""An index and the room of its trainers on a Ray of two nodes, each with 5 CPUs and 2 GPUs (which Ray only counts), and
a third one without any. A program of its own: a process can be connected to one Ray only.

    python -m tests.cluster.service.two_small_nodes FOLDER

Prints one JSON line: for each plan the nodes of its processes, as planned and as they were started, and the message
where there is no room.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from cluster.machines import session

session.set_environment()

import ray  # noqa: E402
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group  # noqa: E402

from cluster.config.settings import ClusterConfig, RefreshConfig  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.service import room  # noqa: E402
from cluster.service.room import hold_trainers, release  # noqa: E402
from cluster.service.start import IndexServiceHandle  # noqa: E402
from indexing.indexing_settings import IndexConfig  # noqa: E402
from tests.cluster.services import start_service  # noqa: E402
from tests.cluster.small_corpus import Corpus, make_corpus  # noqa: E402
from tests.cluster.survival.observers import inside  # noqa: E402
from tests.cluster.survival.two_nodes import STORE_BYTES, start_patiently  # noqa: E402

INDEX, TWO = IndexConfig(num_shards=2, replicas=2), RefreshConfig(num_workers=2)
# What Ray, left to itself, spreads until no node, or fills up until no GPU, has room for a trainer
PLANS = {
    "a trainer of 4 CPUs": (ClusterConfig(threads_per_trainer=4, trainer_gpus=0.0, refresh_gpus=0.0), TWO),
    "a trainer of 2 GPUs": (ClusterConfig(trainer_gpus=2.0, refresh_gpus=1.0), TWO),
    "four trainers that share their GPUs": (ClusterConfig(num_trainers=4), RefreshConfig(num_workers=4)),
}


def main(folder: Path) -> dict[str, Any]:
    session._ensure_private_token()
    size: dict[str, Any] = {"num_cpus": 5, "num_gpus": 2, "object_store_memory": STORE_BYTES}
    cluster = start_patiently(size | {"include_dashboard": False})
    try:
        cluster.add_node(**size)
        nothing: dict[str, Any] = size | {"num_cpus": 0, "num_gpus": 0}  # as a head has it that only leads
        cluster.add_node(**nothing)
        cluster.wait_for_nodes(60)
        assert cluster.address is not None
        os.environ["RAY_ADDRESS"] = cluster.address
        connection = session.start_or_join("tests", log_to_driver=False)
        try:
            corpus = make_corpus(folder)
            found = {name: started(corpus, folder / str(number), name) for number, name in enumerate(PLANS)}
            return found | {"no room": refused()}
        finally:
            connection.stop()
    finally:
        cluster.shutdown()


def started(corpus: Corpus, folder: Path, name: str) -> dict[str, Any]:
    """Start the index beside the room of the trainers, which is free again, and taken again, as Ray Train does it."""
    cluster, refresh = PLANS[name]
    placement = plan(cluster, refresh, INDEX, nodes_of_cluster())
    held = hold_trainers(placement, 30.0)
    try:
        service = start_service(corpus, folder, INDEX, refresh, placement=placement, start_timeout_s=90.0)
    finally:
        release(held)
    try:
        held = hold_trainers(placement, 30.0)
        places = placement_group_table(held)["bundles_to_node_id"]
        release(held)
        shards = [replica for replicas in service.address.by_shard() for replica in replicas]
        return {
            "planned": {seat.name: placement.node_ids(seat) for seat in placement.seats()},
            "trainer": [places[number] for number in sorted(places)],
            "index shard": nodes_of(service, shards),
            "refresh worker": nodes_of(service, service.workers),
        }
    finally:
        service.stop()


def nodes_of(service: IndexServiceHandle, names: Any) -> list[str]:
    """The node of each actor."""
    return [inside(name, _node) for name in names]


def _node(_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def refused() -> str:
    """The message where somebody else holds what the trainers were planned on."""
    cluster, refresh = PLANS["a trainer of 4 CPUs"]
    placement = plan(cluster, refresh, INDEX, nodes_of_cluster())
    taken = placement_group([{"CPU": 3.0}, {"CPU": 2.0}], strategy="STRICT_SPREAD")
    room.SAY_S = 2.0
    try:
        assert taken.wait(30)
        release(hold_trainers(placement, 5.0))
    except TimeoutError as error:
        return str(error)
    finally:
        remove_placement_group(taken)
    return ""


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
