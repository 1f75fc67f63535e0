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


def places(cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, nodes: list[Node]) -> tuple[str, ...]:
    """The nodes of trainers, shards and workers."""
    return tuple("".join(map(str, seat.places)) for seat in plan(cluster, refresh, index, nodes).seats())


def test_trainers_are_packed_and_all_others_spread() -> None:
    """Replicas of one shard follow each other, so that they are apart; a worker goes where there is least."""
    eight, three = [Node(8, 0)] * 2, [Node(8, 4)] * 3
    assert places(replace(CLUSTER, num_trainers=3), REFRESH, replace(INDEX, replicas=2), eight) == ("000", "1010", "1")
    wanted = replace(CLUSTER, num_trainers=4)
    assert places(wanted, replace(REFRESH, num_workers=3), INDEX, three) == ("0000", "21", "121")
    assert places(CLUSTER, REFRESH, INDEX, [Node(4, 0), Node(8, 0)]) == ("1", "01", "0")  # the largest node trains
    seats = plan(replace(CLUSTER, num_trainers=4, threads_per_trainer=2), REFRESH, INDEX, [Node(16, 0), Node(4, 0)])
    assert seats.shards.places == (1, 0)
    assert seats.shards.threads == 3  # 4 - worker on the second node, 16 - 4 x 2 on the first
    assert "2 x index shard: 1 CPU each, on CPU, 3 threads; 1 on node 1, 1 on node 2" in str(seats)


def test_what_ray_would_spread_until_nothing_fits_has_a_node_each() -> None:
    two = replace(REFRESH, num_workers=2)
    trainer_of_4 = replace(CLUSTER, threads_per_trainer=4)
    assert places(trainer_of_4, two, INDEX, [Node(5, 0)] * 2) == ("0", "10", "11")
    assert places(replace(CLUSTER, trainer_gpus=2.0), two, INDEX, [Node(5, 2)] * 2) == ("0", "01", "11")


def test_a_share_of_a_gpu_is_on_one_gpu() -> None:
    """Two GPUs with 0.4 left each have no room for 0.5, though they have 0.8 left."""
    shares = replace(CLUSTER, num_trainers=2, trainer_gpus=0.6)
    assert plan(replace(shares, refresh_gpus=0.4), replace(REFRESH, num_workers=2), INDEX, [Node(8, 2)]).workers.gpus
    with pytest.raises(ValueError, match="no node has room for refresh worker 1 of 1"):
        plan(replace(shares, refresh_gpus=0.5), REFRESH, INDEX, [Node(8, 2)])


@pytest.mark.parametrize(
    ("nodes", "cluster", "refresh", "index", "gpus"),
    [
        ([Node(8, 1)], CLUSTER, REFRESH, INDEX, (0.6, 0, 0.4)),  # nothing would be left for the worker: they share
        ([Node(8, 2)], CLUSTER, REFRESH, INDEX, (1, 0, 1)),
        ([Node(8, 1)], replace(CLUSTER, trainer_gpus=0.7), REFRESH, INDEX, (0.7, 0, 0.3)),
        ([Node(8, 4)], CLUSTER, replace(REFRESH, num_workers=2), replace(INDEX, device="gpu", num_shards=1), (1, 1, 1)),
        ([Node(8, 2)], replace(CLUSTER, num_trainers=1), replace(REFRESH, num_workers=4), INDEX, (1, 0, 0.25)),
        ([Node(8, 4), Node(8, 4)], replace(CLUSTER, num_trainers=6), replace(REFRESH, num_workers=2), INDEX, (1, 0, 1)),
        ([Node(8, 8)], replace(CLUSTER, refresh_gpus=0.0), REFRESH, INDEX, (1, 0, 0)),
        ([Node(8, 1)], replace(CLUSTER, trainer_gpus=1.0), REFRESH, INDEX, (1, 0, 0)),  # as the setting says
        ([Node(8, 1)], replace(CLUSTER, refresh_gpus=0.0), REFRESH, INDEX, (1, 0, 0)),
        ([Node(8, 1)], CLUSTER, REFRESH, replace(INDEX, device="gpu"), (0.6, 0.13, 0.13)),  # 0.4 for three
        ([Node(8, 4)], replace(CLUSTER, num_trainers=4), replace(REFRESH, num_workers=4), INDEX, (0.6, 0, 0.4)),
        ([Node(8, 2)] * 2, replace(CLUSTER, num_trainers=4), replace(REFRESH, num_workers=6), INDEX, (0.6, 0, 0.2)),
        ([Node(8, 0)], CLUSTER, REFRESH, INDEX, (0, 0, 0)),
    ],
)
def test_gpus(
    nodes: list[Node], cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, gpus: tuple[float, ...]
) -> None:
    seats = plan(cluster, refresh, index, nodes)
    assert tuple(seat.gpus for seat in seats.seats()) == pytest.approx(gpus)


def test_trainers_that_share_gpus_have_theirs_first() -> None:
    """On several GPUs of one node, workers that come first could fill one of them, where a trainer would lack room."""
    assert plan(replace(CLUSTER, num_trainers=2), REFRESH, INDEX, [Node(8, 2)]).shares_gpus
    assert not plan(CLUSTER, REFRESH, INDEX, [Node(8, 1)]).shares_gpus
    assert not plan(CLUSTER, REFRESH, INDEX, [Node(8, 2)]).shares_gpus


def test_workers_without_a_gpu_have_the_cores_that_trainers_with_gpus_leave() -> None:
    on_cpu = replace(CLUSTER, refresh_gpus=0.0)
    seats = plan(on_cpu, replace(REFRESH, num_workers=2), INDEX, [Node(17, 1)])
    assert (seats.workers.threads, seats.shards.threads) == (4, 4)  # 17 - trainer, half for each kind of two
    whole = replace(INDEX, device="gpu", num_shards=1)
    assert plan(on_cpu, REFRESH, whole, [Node(16, 2)]).workers.threads == 15  # a shard on a GPU needs none
    assert plan(on_cpu, replace(REFRESH, threads=12), INDEX, [Node(17, 1)]).workers.threads == 12
    assert plan(on_cpu, REFRESH, INDEX, [Node(17, 0)]).workers.threads == 1  # trainers compute on the CPU


@pytest.mark.parametrize(
    ("nodes", "cluster", "refresh", "index", "message"),
    [
        ([Node(2, 0)], replace(CLUSTER, num_trainers=3), REFRESH, INDEX, "it wants 3 CPU and 0 GPU"),
        ([Node(8, 1)], replace(CLUSTER, num_trainers=2), REFRESH, INDEX, "trainer 2 of 2 (1 CPU, 1 GPU)"),
        (
            [Node(8, 1)],
            replace(CLUSTER, shard_gpus=1.0),
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
