"""Who sits where: a pure function of settings and nodes."""

import re
from dataclasses import replace

import pytest

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.planning.placement import Node, plan
from indexing.indexing_settings import IndexConfig

CLUSTER, REFRESH, INDEX = ClusterConfig(), RefreshConfig(), IndexConfig()


def test_a_laptop_with_two_cores_holds_everything() -> None:
    seats = plan(CLUSTER, REFRESH, INDEX, [Node(4, 0)])
    assert (seats.trainers.number, seats.trainers.cpus, seats.trainers.gpus) == (1, 1, 0)
    assert (seats.shards.number, seats.shards.cpus, seats.shards.device) == (2, 0, "cpu")
    assert (seats.workers.number, seats.workers.cpus, seats.workers.device) == (1, 0, "cpu")
    assert seats.workers.threads == REFRESH.threads
    assert not seats.multi_node
    assert "1 x trainer: 1 CPU each, on CPU" in str(seats)


def test_tickets_where_enough_are_left() -> None:
    seats = plan(CLUSTER, REFRESH, INDEX, [Node(16, 0)])
    assert (seats.shards.cpus, seats.workers.cpus) == (1, 1)
    assert seats.shards.threads == 7  # (16 - trainer - worker) over two shards
    seats = plan(CLUSTER, REFRESH, replace(INDEX, replicas=3), [Node(16, 0)])
    assert (seats.shards.number, seats.shards.threads) == (6, 2)


def test_helpers_go_without_a_ticket_where_one_would_keep_the_trainers_out() -> None:
    nodes = [Node(2, 1), Node(2, 1), Node(6, 0)]
    seats = plan(replace(CLUSTER, num_trainers=2, threads_per_trainer=2, trainer_gpus=0.0), REFRESH, INDEX, nodes)
    assert (seats.shards.cpus, seats.workers.cpus) == (1, 1)
    seats = plan(replace(CLUSTER, num_trainers=1, threads_per_trainer=2), REFRESH, replace(INDEX, num_shards=9), nodes)
    assert (seats.shards.cpus, seats.workers.cpus) == (0, 0)


@pytest.mark.parametrize(
    ("nodes", "cluster", "refresh", "index", "gpus"),
    [
        ([Node(8, 1)], CLUSTER, REFRESH, INDEX, (1, 0, 0)),  # nothing is left for the worker: it encodes on CPU
        ([Node(8, 2)], CLUSTER, REFRESH, INDEX, (1, 0, 1)),
        ([Node(8, 1)], replace(CLUSTER, trainer_gpus=0.7), REFRESH, INDEX, (0.7, 0, 0.3)),
        ([Node(8, 4)], CLUSTER, replace(REFRESH, num_workers=2), replace(INDEX, device="gpu", num_shards=1), (1, 1, 1)),
        ([Node(8, 2)], replace(CLUSTER, num_trainers=1), replace(REFRESH, num_workers=4), INDEX, (1, 0, 0.25)),
        ([Node(8, 4), Node(8, 4)], replace(CLUSTER, num_trainers=6), replace(REFRESH, num_workers=2), INDEX, (1, 0, 1)),
        ([Node(8, 8)], replace(CLUSTER, refresh_gpus=0.0), REFRESH, INDEX, (1, 0, 0)),
    ],
)
def test_gpus(
    nodes: list[Node], cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, gpus: tuple[float, ...]
) -> None:
    seats = plan(cluster, refresh, index, nodes)
    assert tuple(seat.gpus for seat in seats.seats()) == pytest.approx(gpus)


@pytest.mark.parametrize(
    ("nodes", "cluster", "refresh", "index", "message"),
    [
        ([Node(2, 0)], replace(CLUSTER, num_trainers=3), REFRESH, INDEX, "it wants 3 CPU and 0 GPU"),
        ([Node(8, 1)], replace(CLUSTER, num_trainers=2), REFRESH, INDEX, "trainer 2 of 2 (1 CPU, 1 GPU)"),
        (
            [Node(8, 1)],
            CLUSTER,
            REFRESH,
            replace(INDEX, device="gpu"),
            "and 3 GPU, and no node has room for index shard 1",
        ),
        ([Node(2, 1)] * 4, replace(CLUSTER, trainer_gpus=2.0), REFRESH, INDEX, "no node has room for trainer 1 of 1"),
        ([Node(8, 0)], replace(CLUSTER, trainer_gpus=1.0), REFRESH, INDEX, "1 node(s) with 8 CPU and 0 GPU"),
        ([Node(2, 0)], replace(CLUSTER, threads_per_trainer=4), REFRESH, INDEX, "it wants 4 CPU"),
        ([Node(8, 4)], replace(CLUSTER, trainer_gpus=1.5), REFRESH, INDEX, "cluster.trainer_gpus=1.5"),
        (
            [Node(8, 4)],
            replace(CLUSTER, shard_gpus=0.0),
            REFRESH,
            replace(INDEX, device="gpu"),
            "cluster.shard_gpus=0",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(
    nodes: list[Node], cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(cluster, refresh, index, nodes)
