"""A Ray of two nodes on one machine that loses one of them, with what ran there. A program of its own: a process can be
connected to one Ray only.

    python -m tests.cluster.survival.two_nodes FOLDER

The driver and the head are on the first node. Prints one JSON line: where the actors were before and after, what the
checker found, and how long its longest search took.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.machines import session

session.set_environment()

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from cluster.config.settings import ClusterConfig  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.service.search import IndexClient  # noqa: E402
from cluster.service.start import IndexServiceHandle  # noqa: E402
from tests.cluster.small_corpus import make_corpus  # noqa: E402
from tests.cluster.survival.checker import Checker, Versions  # noqa: E402
from tests.cluster.survival.conftest import BOUND_S, INDEX, REFRESH, start  # noqa: E402
from tests.cluster.survival.observers import inside, serve  # noqa: E402

STORE_BYTES = 100 * 2**20
# A lost node is noticed by missed health checks; Ray's own choice takes up to half a minute.
QUICKLY = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def main(folder: Path) -> dict[str, Any]:
    """Lose the second node while a client searches and a refresh runs."""
    session._ensure_private_token()
    head = {"num_cpus": 4, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": QUICKLY}
    cluster = start_patiently(head)
    try:
        second = cluster.add_node(num_cpus=4, object_store_memory=STORE_BYTES)
        cluster.wait_for_nodes(60)
        assert cluster.address is not None
        os.environ["RAY_ADDRESS"] = cluster.address
        connection = session.start_or_join("tests", log_to_driver=False)
        try:
            return lose(cluster, second, folder)
        finally:
            connection.stop()
    finally:
        cluster.shutdown()


def start_patiently(head: dict[str, Any]) -> Cluster:
    """The first node, again where a loaded machine was slower than the 30 s that Ray gives itself."""
    for attempt in range(3):
        try:
            return Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:  # Ray raises this very class
            if "timed out during startup" not in str(error) or attempt == 2:
                raise
    raise AssertionError


def lose(cluster: Cluster, second: Any, folder: Path) -> dict[str, Any]:
    corpus = make_corpus(folder)
    placement = plan(ClusterConfig(), REFRESH, INDEX, nodes_of_cluster())
    assert placement.multi_node
    service = start(corpus, folder / "run", placement=placement)
    try:
        client = serve(service, 1, corpus.weights(1))
        before = places(service)
        sockets = {node["RayletSocketName"]: node["NodeID"] for node in ray.nodes()}
        lost = sockets[second.raylet_socket_name]
        address = replace(service.address, search_timeout_s=BOUND_S)
        checker = Checker(IndexClient(address), Versions(corpus.vectors), BOUND_S)
        checker.start()
        cluster.remove_node(second, allow_graceful=False)
        client.publish(2, corpus.weights(2))
        client.wait_for_version(2, 90.0)
        hits = client.submit(corpus.vectors(2)[:3], 9).result()
        checker.finish()
        return {
            "before": before,
            "after": places(service),
            "lost": lost,
            "violations": checker.violations,
            "searches": checker.searches,
            "longest_s": checker.longest_s,
            "weights_version": hits.weights_version,
        }
    finally:
        service.stop()


def places(service: IndexServiceHandle) -> dict[str, str]:
    """The node of each actor."""
    names = (*service.address.shards, *service.workers, service.address.coordinator)
    return {name.partition("-")[2].partition("-")[2]: inside(name, _node) for name in names}


def _node(_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
