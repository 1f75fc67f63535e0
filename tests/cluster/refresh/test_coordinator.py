"""The refresh contract, proven in order with plain objects behind the ports (`fakes.py`); no Ray here."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cluster.refresh.encode_queue import split
from cluster.refresh.ports import Chunk, ShardLost, Weights
from indexing.shard.shard import Shard
from tests.cluster import fakes
from tests.cluster.fakes import DIM, NUM_PASSAGES, World, build, vectors_of, wait_until, weights

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_chunks_never_cross_a_shard(world: World) -> None:
    chunks = split(world.shards, 3)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(NUM_PASSAGES))
    for chunk in chunks:
        shard = world.shards[chunk.shard]
        assert shard.start <= chunk.start < chunk.stop <= shard.stop
        assert chunk.stop - chunk.start <= 3


def test_all_rows_are_staged_before_any_prepare_and_all_prepared_before_any_commit(world: World) -> None:
    build(world.coordinator(), 7)
    kinds = [call[0] for call in world.calls("stage", "prepare", "commit")]
    assert kinds == ["stage"] * len(split(world.shards, 3)) + ["prepare"] * 3 + ["commit"] * 3
    world.check_contents(1, 7)
    (event,) = world.named("refresh_committed")
    assert (event["generation"], event["weights_version"], event["passages"]) == (1, 7, NUM_PASSAGES)
    assert (event["bytes_per_passage"], event["recall"]) == (4 * DIM, 1.0)
    assert event["build_s"] >= 0


def test_status_follows_the_commit(world: World) -> None:
    coordinator = world.coordinator()
    before = coordinator.status()
    assert (before.generation, before.weights_version, before.generations_committed) == (-1, -1, 0)
    build(coordinator, 7)
    after = coordinator.status()
    assert (after.generation, after.weights_version, after.generations_committed) == (1, 7, 1)
    assert after.refresh_seconds > 0
    assert after.refresh_passages_per_s == pytest.approx(NUM_PASSAGES / after.refresh_seconds)
    assert after.publish_id == weights(7).publish_id
    assert (after.figures.bytes_per_passage, after.figures.recall) == (4 * DIM, 1.0)


def test_publish_returns_while_a_refresh_runs_and_older_waiting_versions_are_dropped(world: World) -> None:
    coordinator = world.coordinator()
    running, go_on = threading.Event(), threading.Event()

    def hold(chunk: Chunk, used: Weights) -> None:
        running.set()
        assert go_on.wait(10)

    for worker in world.workers:
        worker.before = hold
    coordinator.publish(weights(10))
    thread = threading.Thread(target=coordinator.wait_and_refresh, args=(0.0,))
    thread.start()
    assert running.wait(10)
    for version in (20, 30, 40):
        begin = time.monotonic()
        coordinator.publish(weights(version))
        assert time.monotonic() - begin < 0.5
    go_on.set()
    thread.join(10)
    assert [event["weights_version"] for event in world.named("publish_dropped")] == [20, 30]
    assert coordinator.status().weights_version == 10
    assert coordinator.wait_and_refresh(0.0)
    assert coordinator.status().weights_version == 40
    assert not coordinator.wait_and_refresh(0.0)
    world.check_contents(2, 40)


def test_a_publish_that_is_sent_twice_is_built_once(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    coordinator.publish(weights(7))
    assert not coordinator.wait_and_refresh(0.0)


def test_an_older_version_that_is_published_later_is_newer(world: World) -> None:
    """A trainer that resumed from a checkpoint publishes an older step again."""
    coordinator = world.coordinator()
    build(coordinator, 50)
    coordinator.publish(weights(40, publish_id=1000))
    assert coordinator.wait_and_refresh(0.0)
    world.check_contents(2, 40)


def test_a_worker_that_dies_costs_its_chunk(world: World) -> None:
    coordinator = world.coordinator()
    world.workers[0].lose(2)
    world.workers[1].before = lambda chunk, used: wait_until(lambda: len(world.named("worker_restarted")) == 2)
    build(coordinator, 7)
    done = [chunk for worker in world.workers for chunk in worker.chunks]
    assert sorted(done, key=lambda chunk: chunk.start) == split(world.shards, 3)
    assert len(world.named("worker_lost")) == len(world.named("worker_restarted")) == 2
    assert not world.named("refresh_failed")
    world.check_contents(1, 7)


def test_a_chunk_that_kills_every_worker_fails_the_refresh_and_leaves_the_old_generation(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    for worker in world.workers:
        worker.lose(1000)
    build(coordinator, 8)
    assert coordinator.status().weights_version == 7
    assert "lost 3 times" in coordinator.status().given_up
    assert coordinator.status().given_up_publish == weights(8).publish_id
    assert coordinator.status().failures == 3 == len(world.named("refresh_failed"))
    assert [event["given_up"] for event in world.named("refresh_failed")] == [False, False, True]
    assert all(served == {1: 7} for served in world.served())
    assert not any(shard.shard.status().staged for shard in world.shards)
    for worker in world.workers:
        worker.lose(0)
    build(coordinator, 9)
    world.check_contents(coordinator.status().generation, 9)
    assert coordinator.status().given_up == ""
    assert coordinator.status().given_up_publish == 0


def test_what_the_encoder_refuses_is_not_tried_again(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)

    def refuse(chunk: Chunk, used: Weights) -> None:
        raise ValueError("these weights are not of this encoder")

    for worker in world.workers:
        worker.before = refuse
    build(coordinator, 8)
    (event,) = world.named("refresh_failed")
    assert "not of this encoder" in event["why"]
    assert event["given_up"]
    assert coordinator.status().weights_version == 7


def test_vectors_that_are_not_finite_are_refused_by_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)

    def poisoned(version: int, start: int, stop: int) -> np.ndarray:
        block = vectors_of(version, start, stop).copy()
        block[0] = np.nan
        return block

    monkeypatch.setattr(fakes, "vectors_of", poisoned)
    build(coordinator, 8)
    (event,) = world.named("refresh_failed")
    assert "not finite" in event["why"]
    assert "passage" in event["why"]
    assert all(served == {1: 7} for served in world.served())


@pytest.mark.parametrize("method", ["stage", "prepare"])
def test_a_shard_that_dies_before_the_commit_is_filled_again(world: World, method: str) -> None:
    coordinator = world.coordinator()
    world.shards[1].die_once(method)
    build(coordinator, 7)
    assert len(world.named("shards_filled_again")) == 1
    world.check_contents(1, 7)
    last_prepare = max(i for i, call in enumerate(world.log) if call[0] == "prepare")
    first_commit = min(i for i, call in enumerate(world.log) if call[0] == "commit")
    assert last_prepare < first_commit


def test_a_shard_that_dies_unnoticed_is_found_before_the_commit(world: World) -> None:
    """It died after it had prepared, and no call failed: the last look at all shards finds it."""
    coordinator = world.coordinator()
    other = world.shards[2]

    def kill_shard_0(method: str, generation: int) -> None:
        if method == "prepare":
            other.before = lambda method, generation: None
            wait_until(lambda: ("prepare", 1, 0) in world.log)
            world.shards[0].die()

    other.before = kill_shard_0
    build(coordinator, 7)
    assert world.named("shards_filled_again") == [{"event": "shards_filled_again", "generation": 1, "shards": [0]}]
    world.check_contents(1, 7)


def test_a_shard_that_dies_again_and_again_aborts_everywhere(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    shard = world.shards[1]

    def never_prepares(method: str, generation: int) -> None:
        if method == "prepare" and generation > 1:
            raise ShardLost("died")

    shard.before = never_prepares
    build(coordinator, 8)
    assert coordinator.status().weights_version == 7
    assert not [call for call in world.calls("commit") if call[1] > 1]
    assert not any(one.shard.status().staged for one in world.shards)


def test_a_shard_that_dies_in_the_commit_is_repaired_from_the_kept_weights(world: World) -> None:
    coordinator = world.coordinator()
    world.shards[1].die_once("commit")
    build(coordinator, 7)
    assert world.served() == [{1: 7}, {}, {1: 7}]
    assert coordinator.status().generation == 1
    coordinator.tick()
    world.check_contents(1, 7)
    (event,) = world.named("shard_restored")
    assert (event["shard"], event["generation"], event["source"]) == (1, 1, "weights")


def test_a_commit_that_was_not_answered_is_completed(world: World) -> None:
    coordinator = world.coordinator()
    shard = world.shards[1]

    def silent_once(method: str, generation: int) -> None:
        if method == "commit":
            shard.before = lambda method, generation: None
            raise ShardLost("silent", silent=True)

    shard.before = silent_once
    build(coordinator, 7)
    coordinator.tick()
    world.check_contents(1, 7)
    assert world.named("shard_restored")[0]["source"] == "prepared"


def test_a_shard_is_restored_from_the_snapshot(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    assert coordinator.snapshots.work()
    coordinator.tick()
    assert not world.named("shard_lost")
    world.shards[2].die()
    coordinator.tick()
    world.check_contents(1, 7)
    assert world.named("shard_restored")[0]["source"] == "snapshot"
    (lost,) = world.named("shard_lost")  # though it was back before anybody looked
    assert (lost["shard"], lost["why"]) == (2, "back without what it served: shard 2")


def test_a_torn_snapshot_is_refused_and_the_shard_encoded_again(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    assert coordinator.snapshots.work()
    path = next(coordinator.snapshots.path(1).glob("shard-0002/*.faiss"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    world.shards[2].die()
    coordinator.tick()
    world.check_contents(1, 7)
    assert "index.faiss" in world.named("snapshot_refused")[0]["why"]
    assert world.named("shard_restored")[0]["source"] == "weights"


def test_a_silent_shard_is_killed_after_a_while(world: World) -> None:
    coordinator = world.coordinator(search_timeout_s=0.2)
    build(coordinator, 7)
    shard = world.shards[0]

    def silent(method: str, generation: int) -> None:
        raise ShardLost("no answer", silent=True)

    shard.before = silent
    coordinator.tick()
    assert not world.calls("restart")
    time.sleep(0.1)
    coordinator.tick()
    assert world.calls("restart") == [("restart", -1, 0)]
    shard.before = lambda method, generation: None
    coordinator.tick()
    world.check_contents(1, 7)


def test_repair_and_refresh_at_the_same_time(world: World) -> None:
    """A shard that dies during a refresh first gets what searches wait for, then the generation that is being built."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    victim, died = world.shards[1], threading.Event()

    def kill_once(chunk: Chunk, used: Weights) -> None:
        if chunk.shard == 1 and used.version == 8 and not died.is_set():
            died.set()
            victim.die()
        if chunk == Chunk(2, victim.stop, victim.stop + 3):  # the refresh is held up until the repair is done
            wait_until(lambda: 1 in victim.shard.status().generations)

    for worker in world.workers:
        worker.before = kill_once
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            coordinator.tick()
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    build(coordinator, 8)
    stop.set()
    thread.join(10)
    assert [call for call in world.calls("commit") if call[2] == 1] == [("commit", 1, 1)] * 2 + [("commit", 2, 1)]
    assert world.named("shard_restored")[0]["source"] == "weights"
    world.check_contents(2, 8)


def test_the_generation_before_stays_open_until_the_next_commit_needs_its_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    build(coordinator, 8)
    coordinator.tick()  # within the grace time
    assert world.served() == [{1: 7, 2: 8}] * 3
    build(coordinator, 9)
    assert world.served() == [{2: 8, 3: 9}] * 3
    monkeypatch.setattr(coordinator, "settings", replace(coordinator.settings, grace_s=0.0))
    coordinator.tick()
    assert world.served() == [{2: 8, 3: 9}] * 3  # generation 2 is not on disk yet
    while coordinator.snapshots.work():
        pass
    coordinator.tick()
    assert world.served() == [{3: 9}] * 3


def test_a_commit_waits_for_the_snapshot_that_has_to_make_room(world: World) -> None:
    coordinator = world.coordinator(snapshot_wait_s=10.0)
    build(coordinator, 7)
    build(coordinator, 8)
    thread = threading.Thread(target=build, args=(coordinator, 9))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    assert coordinator.snapshots.work()
    thread.join(10)
    assert coordinator.snapshots.saved(1)
    world.check_contents(3, 9)


@pytest.mark.parametrize("num_committed", [0, 1, 2])
def test_a_coordinator_that_died_in_the_commit_is_followed_by_one_that_completes_it(
    world: World, num_committed: int
) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    for number, shard in enumerate(world.shards):
        shard.call(Shard.stage, 2, 8, shard.start, vectors_of(8, shard.start, shard.stop))
        shard.call(Shard.prepare, 2)
        if number < num_committed:
            shard.call(Shard.commit, 2)
    follower = world.coordinator()
    status = follower.status()
    assert (status.generation, status.weights_version) == (2, 8)
    world.check_contents(2, 8)
    build(follower, 9)
    assert follower.status().generation == 3


def test_a_coordinator_that_died_before_the_decision_is_followed_by_one_that_aborts(world: World) -> None:
    build(world.coordinator(), 7)
    for shard in world.shards[:2]:
        shard.call(Shard.stage, 2, 8, shard.start, vectors_of(8, shard.start, shard.stop))
        shard.call(Shard.prepare, 2)
    follower = world.coordinator()
    assert follower.status().generation == 1
    build(follower, 9)
    assert follower.status().generation == 3  # number 2 is not used again
    world.check_contents(3, 9)


def test_a_follower_goes_back_to_the_snapshot_when_half_of_a_commit_died(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    assert coordinator.snapshots.work()
    for shard in world.shards:
        shard.call(Shard.stage, 2, 8, shard.start, vectors_of(8, shard.start, shard.stop))
        shard.call(Shard.prepare, 2)
    world.shards[0].call(Shard.commit, 2)
    world.shards[1].die()
    follower = world.coordinator()
    assert follower.status().generation == 1
    world.check_contents(1, 7)
    build(follower, 9)
    world.check_contents(follower.status().generation, 9)


def test_without_snapshot_and_weights_the_follower_asks_for_a_publish(world: World) -> None:
    build(world.coordinator(), 7)
    world.shards[1].die()
    follower = world.coordinator()
    follower.tick()
    assert follower.status().needs_weights
    assert len(world.named("shard_not_restored")) == 1
    build(follower, 8)
    follower.tick()
    assert not follower.status().needs_weights
    world.check_contents(follower.status().generation, 8)


def test_everything_died_and_the_newest_snapshot_serves(world: World) -> None:
    coordinator = world.coordinator()
    for version in (7, 8):
        build(coordinator, version)
        assert coordinator.snapshots.work()
    for shard in world.shards:
        shard.die()
    follower = world.coordinator()
    assert follower.status().generation == 2
    world.check_contents(2, 8)


def test_random_deaths_never_leave_a_torn_generation(world: World) -> None:
    """Whatever dies when: a generation that all shards serve has the vectors of one version on every shard."""
    chance = random.Random(0)
    coordinator = world.coordinator()
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            coordinator.tick()
            coordinator.snapshots.work()
            time.sleep(0.002)

    def perhaps_die(shard_number: int) -> Callable[[str, int], None]:
        def before(method: str, generation: int) -> None:
            if chance.random() < 0.02:
                world.shards[shard_number].die()
                raise ShardLost(f"died in {method}")

        return before

    thread = threading.Thread(target=tick)
    thread.start()
    for version in range(1, 15):
        for number, shard in enumerate(world.shards):
            shard.before = perhaps_die(number)
        build(coordinator, version)
        for shard in world.shards:
            shard.before = lambda method, generation: None
        deadline = time.monotonic() + 10
        while (generation := coordinator.status().generation) > 0 and time.monotonic() < deadline:
            if all(generation in served for served in world.served()):
                break
            time.sleep(0.005)
        if generation > 0:
            world.check_contents(generation, coordinator.status().weights_version)
    stop.set()
    thread.join(20)
    assert coordinator.status().generations_committed > 5
