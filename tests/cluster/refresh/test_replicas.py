"""Replicas of shards, in order and with plain objects behind the ports: they switch together, or none does."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.refresh.coordinator import RefreshCoordinator
from cluster.refresh.ports import ShardLost, has_staged_all
from cluster.refresh.replicas import ReplicatedShard, in_common
from indexing.dense.probe import Figures
from indexing.shard.shard import Shard, shard_ranges
from indexing.shard.shard_status import ShardStatus
from indexing.shard.staging import StagingStatus
from tests.cluster.fakes import NUM_PASSAGES, FakeShard, World, build
from tests.cluster.refresh import test_coordinator, test_live_corpus

pytestmark = pytest.mark.usefixtures("no_pauses")

REPLICAS = 2


class ReplicatedWorld(World):
    """Two shards, each in two processes: `shards` are all of them, `ports` the two."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, num_shards=2)
        ranges = list(enumerate(shard_ranges(NUM_PASSAGES, 2)))
        groups = [[FakeShard(number, *pair, self.log) for _ in range(REPLICAS)] for number, pair in ranges]
        self.shards = [replica for group in groups for replica in group]
        for number, shard in enumerate(self.shards):
            shard.name += f", replica {number % REPLICAS}"
        self.ports = [ReplicatedShard(group) for group in groups]

    def check_corpus(self, generation: int, versions: int | np.ndarray) -> None:
        everybody = self.shards
        for replica in range(REPLICAS):
            self.shards = everybody[replica::REPLICAS]
            super().check_corpus(generation, versions)
        self.shards = everybody


@pytest.fixture
def world(tmp_path: Path) -> ReplicatedWorld:
    return ReplicatedWorld(tmp_path)


@contextmanager
def repairing(coordinator: RefreshCoordinator) -> Iterator[None]:
    """The repair thread, while the block runs."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(0.01):
            coordinator.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join(10)
    assert not thread.is_alive()


def test_every_replica_gets_every_row_and_all_commit_after_all_have_prepared(world: ReplicatedWorld) -> None:
    build(world.coordinator(), 7)
    kinds = [call[0] for call in world.calls("prepare", "commit")]
    assert kinds == ["prepare"] * 4 + ["commit"] * 4
    world.check_contents(1, 7)
    encoded = sum(chunk.stop - chunk.start for worker in world.workers for chunk in worker.chunks)
    assert encoded == NUM_PASSAGES  # once, not once a replica


@pytest.mark.parametrize("method", ["stage", "prepare", "commit"])
def test_a_replica_that_dies_on_the_way_is_filled_again(world: ReplicatedWorld, method: str) -> None:
    coordinator = world.coordinator()
    build(coordinator, 1)
    world.shards[1].die_once(method)
    with repairing(coordinator):
        build(coordinator, 2)
    coordinator.tick()
    world.check_contents(2, 2)
    assert len(world.named("refresh_committed")) == 2


def test_a_replica_that_comes_back_empty_is_loaded_and_the_other_is_left_alone(world: ReplicatedWorld) -> None:
    coordinator = world.coordinator()
    build(coordinator, 1)
    coordinator.snapshots.work()
    assert sorted(call[2] for call in world.calls("save")) == [0, 1]  # once a shard
    found = world.shards[0].shard._serving.served[1].generation
    coordinator.tick()
    world.shards[1].die()
    coordinator.tick()
    assert [event["why"] for event in world.named("shard_lost")] == ["back without what it served: shard 0, replica 1"]
    assert world.named("shard_restored")[0]["source"] == "snapshot"
    world.check_contents(1, 1)
    assert world.shards[0].shard._serving.served[1].generation is found


def test_without_a_snapshot_it_is_encoded_again(world: ReplicatedWorld) -> None:
    coordinator = world.coordinator()
    build(coordinator, 1)
    world.shards[2].die()
    coordinator.tick()
    assert world.named("shard_restored")[0]["source"] == "weights"
    world.check_contents(1, 1)


def test_a_coordinator_that_died_between_two_replicas_commits_is_followed_by_one_that_goes_on(
    world: ReplicatedWorld,
) -> None:
    coordinator = world.coordinator()
    build(coordinator, 1)
    generation = 2
    coordinator.shards.wait(1.0)
    chunks = [(port, port.start, port.stop) for port in world.ports]
    for port, start, stop in chunks:
        port.call(
            Shard.stage, generation, 2, start, np.random.default_rng(2).normal(size=(NUM_PASSAGES, 4))[start:stop]
        )
        port.call(Shard.prepare, generation)
    for replica in (world.shards[0], world.shards[3]):
        replica.call(Shard.commit, generation)
    assert [one.prepared for one in world.ports[0].status().staged] == [True]
    world.coordinator()
    assert all(set(served) == {1, 2} for served in world.served())
    assert world.named("index_taken_over")[-1]["generation"] == generation


def test_what_only_one_replica_still_has_makes_room(world: ReplicatedWorld) -> None:
    """A replica that serves two generations, one of which the other lost, commits a third."""
    coordinator = world.coordinator(keep=5)
    build(coordinator, 1)
    build(coordinator, 2)
    coordinator.snapshots.work()
    coordinator.snapshots.work()
    world.shards[1].die()
    coordinator.tick()
    assert world.served()[:2] == [{1: 1, 2: 2}, {2: 2}]
    build(coordinator, 3)
    world.check_contents(3, 3)


def test_a_change_of_the_corpus_reaches_all_replicas(world: ReplicatedWorld) -> None:
    """What is deleted is hidden by all of them; what is added is encoded once, and derived by all of them."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    for worker in world.workers:
        worker.chunks.clear()
    world.change(added=4, deleted=[2, 20])
    coordinator.follow_corpus()
    assert len(world.calls("hide")) == len(world.calls("derive")) == 4
    encoded = [number for worker in world.workers for chunk in worker.chunks for number in chunk.numbers or ()]
    assert sorted(encoded) == [23, 24, 25, 26]
    world.check_corpus(2, 7)
    world.shards[1].die_once("commit")
    world.change(added=2, deleted=[24])
    coordinator.follow_corpus()
    coordinator.tick()
    world.check_corpus(coordinator.status().generation, 7)


@pytest.mark.parametrize(
    "what_happens",
    [
        test_coordinator.test_random_deaths_never_leave_a_torn_generation,
        test_live_corpus.test_random_changes_refreshes_and_deaths,
    ],
)
def test_random_deaths_of_replicas(world: ReplicatedWorld, what_happens: Callable[[World], None]) -> None:
    """What holds for shards that die at random holds for replicas of shards."""
    what_happens(world)


def test_only_a_silent_replica_is_killed(world: ReplicatedWorld) -> None:
    def silent(method: str, generation: int) -> None:
        raise ShardLost("no answer", silent=True)

    world.shards[1].before = silent
    with pytest.raises(ShardLost) as lost:
        world.ports[0].status()
    assert lost.value.silent
    before = world.shards[0].shard
    world.ports[0].restart()
    assert world.calls("restart") == [("restart", -1, 0)]
    assert world.shards[0].shard is before


def test_what_replicas_have_in_common() -> None:
    def status(
        generations: dict[int, int], staged: int = -1, rows: int = 0, prepared: bool = False, derived: int = -1
    ) -> ShardStatus:
        return ShardStatus(
            shard_number=0,
            start=10,
            stop=20,
            committed=max(generations, default=-1),
            generations=generations,
            in_flight=1,
            building=staging(staged, rows, 10, prepared) if staged >= 0 else None,
            deriving=staging(derived, 0, 0, False) if derived >= 0 else None,
            hidden=len(generations),
            corpora=dict.fromkeys(generations, 0),
        )

    def staging(generation: int, rows: int, wanted: int, prepared: bool) -> StagingStatus:
        return StagingStatus(
            generation=generation,
            weights_version=generation * 10,
            corpus_version=0,
            rows=rows,
            wanted=wanted,
            prepared=prepared,
        )

    whole = in_common([status({1: 1, 2: 2}, 3, 10, True), status({2: 2}, 3, 4)])
    assert (whole.generations, whole.committed, whole.in_flight) == ({2: 2}, 2, 2)
    assert whole.staged == [staging(3, 4, 10, False)]
    switched = in_common([status({2: 2, 3: 30}), status({2: 2}, 3, 10, True)])
    assert (switched.generations, switched.staged) == ({2: 2}, [staging(3, 10, 10, True)])
    empty = in_common([status({2: 2}), status({})])
    assert (empty.generations, empty.staged) == ({}, [])
    assert empty.hidden == 0
    read, measured = Figures(20.0), Figures(20.0, 1.5, 0.9)  # one replica read it from disk, one is empty
    old = replace(status({2: 2}), oldest_version=1, figures=read)
    three = in_common([status({}), old, replace(old, oldest_version=2, figures=measured)])
    assert (three.oldest_version, three.figures) == (1, measured)
    for other, staged_all in ((status({2: 2}, derived=3), True), (status({2: 2}), False)):  # a delta without rows here
        deriving = in_common([status({2: 2}, derived=3), other])
        assert [one.generation for one in deriving.staged] == [3]
        assert has_staged_all(deriving, 3) == staged_all
