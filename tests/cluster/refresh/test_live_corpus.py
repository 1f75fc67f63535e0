"""A corpus that changes under the refresh contract, proven in order with plain objects behind the ports
(`fakes.py`)."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.refresh.coordinator import RefreshCoordinator
from cluster.refresh.ports import Chunk, RefreshFailed, ShardLost, Weights
from indexing.corpus.snapshot import TornSnapshot
from tests.cluster.fakes import NUM_PASSAGES, World, build, wait_until, weights

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_a_change_is_committed_by_the_same_two_phases_and_encodes_only_what_is_new(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    indexes = [shard.shard._serving.served[1].generation.base for shard in world.shards]
    assert not coordinator.follow_corpus()
    world.log.clear()
    world.workers[0].chunks.clear()
    world.workers[1].chunks.clear()
    assert world.change(added=4, deleted=[2, 20]) == 1
    assert coordinator.follow_corpus()
    kinds = [call[0] for call in world.calls("hide", "derive", "stage", "prepare", "commit")]
    assert kinds == ["hide"] * 3 + ["derive"] * 3 + ["stage"] * 3 + ["prepare"] * 3 + ["commit"] * 3
    encoded = [n for worker in world.workers for chunk in worker.chunks for n in chunk.numbers or ()]
    assert sorted(encoded) == [23, 24, 25, 26]
    assert [shard.shard._serving.served[2].generation.base for shard in world.shards] == indexes  # shared
    world.check_corpus(2, 7)
    status = coordinator.status()
    assert (status.generation, status.weights_version, status.corpus_version) == (2, 7, 1)
    assert status.num_passages == NUM_PASSAGES + 4 - 2
    assert status.figures.recall == 1.0  # of the base; the bytes are those of the delta too
    assert status.figures.bytes_per_passage == pytest.approx((NUM_PASSAGES * 16 + 4 * 2 * 16) / (NUM_PASSAGES + 2))
    assert world.coordinator().status().figures == status.figures  # the next coordinator asks the shards
    (event,) = world.named("corpus_changed")
    assert (event["corpus_version"], event["added"], event["deleted"], event["generation"]) == (1, 4, 2, 2)
    assert not coordinator.follow_corpus()


def test_what_is_only_deleted_costs_no_generation_and_is_gone_from_the_one_before_too(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    build(coordinator, 8)
    world.change(deleted=[0, 22])
    coordinator.follow_corpus()
    assert coordinator.status().generation == 2
    assert coordinator.status().corpus_version == 1
    for generation, version in ((1, 7), (2, 8)):
        world.check_corpus(generation, version)


def test_several_versions_at_once_and_no_generation_yet(world: World) -> None:
    coordinator = world.coordinator()
    world.change(added=3)
    world.change(deleted=[1, 24])
    coordinator.follow_corpus()
    assert coordinator.status().corpus_version == 2
    build(coordinator, 7)
    world.check_corpus(1, 7)
    world.change(added=1)
    world.change(added=2, deleted=[26])
    coordinator.follow_corpus()
    world.check_corpus(2, 7)


def test_the_next_refresh_holds_no_deleted_rows(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=5, deleted=[0, 1, 2, 3, 4, 5, 6, 9])  # all of the first shard's base
    coordinator.follow_corpus()
    build(coordinator, 8)
    generation = coordinator.status().generation
    served = [shard.shard._serving.served[generation].generation for shard in world.shards]
    assert all(one.delta is None for one in served)
    rows = np.concatenate([one.base.number_of(np.arange(one.base.num_rows)) for one in served])
    log = world.changes()
    assert sorted(rows) == np.arange(28)[log.is_living(np.arange(28))].tolist()
    world.check_corpus(generation, 8)


def refresh_held_up(
    world: World, coordinator: RefreshCoordinator, version: int
) -> tuple[threading.Thread, threading.Event]:
    """A refresh whose last chunk waits for the event."""
    running, go_on = threading.Event(), threading.Event()

    def hold(chunk: Chunk, used: Weights) -> None:
        if used.version == version and chunk.stop == NUM_PASSAGES:
            running.set()
            assert go_on.wait(10)

    for worker in world.workers:
        worker.before = hold
    thread = threading.Thread(target=build, args=(coordinator, version))
    thread.start()
    assert running.wait(10)
    return thread, go_on


def test_a_change_does_not_wait_for_a_refresh_which_then_includes_it(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    thread, go_on = refresh_held_up(world, coordinator, 8)
    world.change(added=4, deleted=[3])
    coordinator.follow_corpus()
    world.check_corpus(coordinator.status().generation, 7)
    world.change(added=2, deleted=[23, 11])
    coordinator.follow_corpus()
    world.check_corpus(coordinator.status().generation, 7)
    world.change(deleted=[15])
    coordinator.follow_corpus()
    assert coordinator.status().generation == 4
    go_on.set()
    thread.join(10)
    status = coordinator.status()
    assert (status.weights_version, status.corpus_version) == (8, 3)
    world.check_corpus(status.generation, 8)
    assert not any(shard.shard.status().staged for shard in world.shards)


def test_a_deletion_alone_while_a_refresh_is_under_way(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    thread, go_on = refresh_held_up(world, coordinator, 8)
    world.change(deleted=[3])
    coordinator.follow_corpus()
    go_on.set()
    thread.join(10)
    assert coordinator.status().generation == 2
    world.check_corpus(2, 8)


def test_a_change_that_nobody_told_of_is_in_the_refresh(world: World) -> None:
    """Written while the refresh was under way, and not followed yet: the refresh looks at the log before it commits."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    thread, go_on = refresh_held_up(world, coordinator, 8)
    world.change(added=4)
    go_on.set()
    thread.join(10)
    world.check_corpus(coordinator.status().generation, 8)
    assert coordinator.status().weights_version == 8


@pytest.mark.parametrize("method", ["hide", "derive", "stage", "prepare"])
def test_a_shard_that_dies_while_a_change_is_made(world: World, method: str) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    while coordinator.snapshots.work():
        pass
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            coordinator.tick()
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    world.shards[1].die_once(method)
    world.change(added=6, deleted=[2, 12])
    wait_until(lambda: not coordinator.follow_corpus())
    stop.set()
    thread.join(10)
    status = coordinator.status()
    assert status.corpus_version == 1
    world.check_corpus(status.generation, 7)


@pytest.mark.parametrize("saved", [True, False])
def test_a_shard_that_dies_afterwards_gets_delta_and_mask_back(world: World, saved: bool) -> None:
    """From the snapshot of the derived generation, and from the kept weights; what was deleted later stays hidden."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=6, deleted=[12])
    coordinator.follow_corpus()
    while saved and coordinator.snapshots.work():
        pass
    world.change(deleted=[13, 24])
    coordinator.follow_corpus()
    for shard in world.shards:
        shard.die()
    coordinator.tick()
    assert {event["source"] for event in world.named("shard_restored")} == {"snapshot" if saved else "weights"}
    world.check_corpus(coordinator.status().generation, 7)


@pytest.mark.parametrize("num_committed", [0, 1, 3])
def test_a_coordinator_that_dies_in_the_commit_of_a_change(world: World, num_committed: int) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    while coordinator.snapshots.work():
        pass
    world.change(added=6, deleted=[12])
    commits = 0

    def die(method: str, generation: int) -> None:
        nonlocal commits
        if method == "commit":
            commits += 1
            if commits > num_committed:
                raise SystemExit("the coordinator dies here")

    for shard in world.shards:
        shard.before = die
    if num_committed < 3:
        with pytest.raises(SystemExit):
            coordinator.follow_corpus()
    else:
        coordinator.follow_corpus()
    for shard in world.shards:
        shard.before = lambda method, generation: None
    follower = world.coordinator()
    while follower.follow_corpus():
        pass
    assert (follower.status().generation, follower.status().corpus_version) == (2, 1)
    world.check_corpus(2, 7)


def test_a_coordinator_that_dies_before_it_began_is_followed_by_one_with_the_weights_of_the_snapshot(
    world: World,
) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    while coordinator.snapshots.work():
        pass
    world.change(added=6, deleted=[12])
    follower = world.coordinator()
    world.check_corpus_hidden([12])
    assert follower.follow_corpus()
    world.check_corpus(follower.status().generation, 7)


def test_everything_died_and_a_new_service_serves_the_changed_corpus(world: World) -> None:
    """As a resume: generations from disk, changes from the log, in each order of snapshot and change."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=6, deleted=[12])
    coordinator.follow_corpus()
    while coordinator.snapshots.work():
        pass
    world.change(added=2, deleted=[13, 24])
    coordinator.follow_corpus()
    world.change(deleted=[1])  # followed by nobody
    for shard in world.shards:
        shard.die()
    follower = world.coordinator()
    assert (follower.status().generation, follower.status().corpus_version) == (2, 1)
    world.check_corpus_hidden([12, 13, 24, 1])
    while follower.follow_corpus():
        pass
    assert follower.status().corpus_version == 3
    assert follower.status().generation > 3 or follower.settings.first_generation == 1
    world.check_corpus(follower.status().generation, 7)


def test_without_weights_the_deleted_are_gone_and_the_added_wait_for_the_next_publish(world: World) -> None:
    build(world.coordinator(), 7)
    follower = world.coordinator()  # nothing is on disk
    world.change(added=3, deleted=[5])
    assert follower.follow_corpus()
    world.check_corpus_hidden([5])
    assert follower.status().needs_weights
    assert follower.status().corpus_version == 0
    assert "weights" in world.named("corpus_waits")[0]["why"]
    build(follower, 8)
    world.check_corpus(follower.status().generation, 8)
    follower.follow_corpus()
    assert follower.status().corpus_version == 1
    assert not follower.status().needs_weights


def test_passages_encoded_again_carry_their_own_version(world: World) -> None:
    """What a partial refresh does: masked in the big index, newer in the delta."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=4, deleted=[6])
    coordinator.follow_corpus()
    chosen = np.array([0, 6, 8, 9, 22, 23, 25])  # one of them deleted
    assert coordinator.encode_again(chosen, weights(9)) == 3
    versions = np.full(27, 7)
    versions[chosen] = 9
    world.check_corpus(3, versions)
    assert coordinator.status().weights_version == 7
    world.change(added=1, deleted=[8])
    coordinator.follow_corpus()
    world.check_corpus(4, np.append(versions, 7))
    coordinator.encode_again(np.array([1, 2]), weights(11), adopt=True)
    versions[[1, 2]] = 11
    world.check_corpus(5, np.append(versions, 7))
    assert coordinator.status().weights_version == 11
    world.change(added=1)
    coordinator.follow_corpus()
    world.check_corpus(6, np.concatenate([versions, [7, 11]]))
    while coordinator.snapshots.work():
        pass
    for shard in world.shards:
        shard.die()
    coordinator.tick()
    world.check_corpus(6, np.concatenate([versions, [7, 11]]))


def test_encoding_again_that_fails_leaves_the_serving_generation(world: World) -> None:
    coordinator = world.coordinator()
    with pytest.raises(RefreshFailed, match="no generation serves"):
        coordinator.encode_again(np.array([1]), weights(9))
    build(coordinator, 7)

    def refuse(chunk: Chunk, used: Weights) -> None:
        raise ValueError("these weights are not of this encoder")

    for worker in world.workers:
        worker.before = refuse
    with pytest.raises(RefreshFailed, match="not of this encoder"):
        coordinator.encode_again(np.array([1, 2]), weights(9))
    assert not any(shard.shard.status().deriving for shard in world.shards)
    assert coordinator.status().generation == 1
    world.check_corpus(1, 7)


def test_many_changes_keep_few_generations_open_and_the_disk_small(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    for _ in range(25):
        world.change(added=1, deleted=[int(world.changes().num_numbers()) - 3])
        coordinator.follow_corpus()
    assert all(len(served) <= 4 for served in world.served())
    assert len(coordinator.snapshots.pending()) <= 2
    while coordinator.snapshots.work():
        pass
    folders = sorted(coordinator.snapshots.directory.glob("generation-*"))
    newest = coordinator.snapshots.path(26)
    assert len(folders) == 2
    assert newest in folders
    assert (newest / "shard-0000" / "base" / "index.faiss").stat().st_nlink > 1  # linked, not written
    assert (newest / "weights" / "weights.npz").is_file()
    world.check_corpus(26, 7)


def test_a_snapshot_of_other_changes_is_refused(world: World, tmp_path: Path) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=2)
    coordinator.follow_corpus()
    while coordinator.snapshots.work():
        pass
    path = world.changes().path(1)
    path.unlink()
    world.change(added=3)  # another first version
    for shard in world.shards:
        shard.die()
    follower = world.coordinator()
    assert "changes of the corpus" in world.named("snapshot_refused")[0]["why"]
    assert follower.status().generation == 1
    while follower.follow_corpus():
        pass
    world.check_corpus(follower.status().generation, 7)


def test_a_damaged_version_is_refused(world: World) -> None:
    world.change(added=2)
    path = world.changes().path(1)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(TornSnapshot, match="version-000001"):
            world.changes()


def test_random_changes_refreshes_and_deaths(world: World) -> None:
    """Whatever dies when: nothing deleted is ever found, and in the end exactly the living passages are."""
    chance = random.Random(0)
    coordinator = world.coordinator()
    build(coordinator, 1)
    stop, stop_repairing = threading.Event(), threading.Event()
    problems: list[str] = []

    def in_background(step: Callable[[], object], stop: threading.Event) -> threading.Thread:
        def run() -> None:
            while not stop.is_set():
                step()
                time.sleep(0.002)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def perhaps_die(number: int) -> Callable[[str, int], None]:
        def before(method: str, generation: int) -> None:
            if method != "status" and chance.random() < 0.02:
                world.shards[number].die()
                raise ShardLost(f"died in {method}")

        return before

    def repair() -> None:
        coordinator.tick()
        coordinator.snapshots.work()

    def refresh() -> None:
        coordinator.publish(weights(2 + len(world.named("refresh_started"))))
        coordinator.wait_and_refresh(0.0)

    repairing = in_background(repair, stop_repairing)
    threads = [in_background(step, stop) for step in (coordinator.follow_corpus, refresh)]
    for number, shard in enumerate(world.shards):
        shard.before = perhaps_die(number)
    for _ in range(25):
        log = world.changes()
        living = np.arange(log.num_numbers())[log.is_living(np.arange(log.num_numbers()))].tolist()
        version = world.change(chance.randrange(0, 4), chance.sample(living, chance.randrange(0, 3)) or living[:1])
        deadline = time.monotonic() + 10
        while coordinator.live.hidden < version and time.monotonic() < deadline:
            time.sleep(0.002)
        problems += world.hidden_found(world.changes().deleted_at(version))
    for shard in world.shards:
        shard.before = lambda method, generation: None
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    stop_repairing.set()
    repairing.join(30)
    assert not problems
    while coordinator.follow_corpus():
        coordinator.tick()
    coordinator.tick()
    build(coordinator, 999)
    world.check_corpus(coordinator.status().generation, 999)
