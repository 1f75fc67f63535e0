"""One part of the refresh that fails in an unusual way keeps no other part from its work; plain objects as in
`test_coordinator.py`."""

import threading
import time
from pathlib import Path

import pytest

from cluster.refresh.ports import ShardLost
from tests.cluster.fakes import World, build

pytestmark = pytest.mark.usefixtures("no_pauses")


def damage(path: Path) -> None:
    """Change one bit, and leave the size."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_the_newest_generation_on_disk_that_is_whole_serves(world: World) -> None:
    """Sizes alone are compared until a shard loads its part; the older one then takes the place of a torn one."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    build(coordinator, 8)
    while coordinator.snapshots.work():
        pass
    damage(next(coordinator.snapshots.path(2).glob("shard-0001/*.faiss")))
    assert [wish.generation for wish in coordinator.snapshots.on_disk()] == [2, 1]
    for shard in world.shards:
        shard.die()
    assert world.coordinator().status().generation == 1
    world.check_contents(1, 7)
    (refused,) = world.named("snapshot_refused")
    assert "generation-2/shard-0001" in refused["why"]


def test_a_checkpoint_names_the_newest_generation_on_disk(world: World) -> None:
    coordinator = world.coordinator(keep=1)
    assert coordinator.keep_newest() == -1
    build(coordinator, 7)
    assert coordinator.keep_newest() == -1  # it is not on disk yet
    assert coordinator.snapshots.work()
    build(coordinator, 8)
    assert coordinator.keep_newest() == 1
    while coordinator.snapshots.work():
        pass
    assert [wish.generation for wish in coordinator.snapshots.on_disk()] == [2, 1]  # 1 is protected
    (coordinator.snapshots.path(2) / "manifest.json").unlink()
    for _ in range(3):
        assert coordinator.keep_newest() == 1
    assert len(world.named("snapshot_refused")) == 1


def test_silent_shards_cost_one_wait(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)

    def silent(method: str, generation: int) -> None:
        time.sleep(0.3)
        raise ShardLost("no answer", silent=True)

    for shard in world.shards:
        shard.before = silent
    begin = time.monotonic()
    assert coordinator.shards.lacking(lambda status, generation: True, 1) == {0, 1, 2}
    assert coordinator.shards.serving(1) == []
    assert time.monotonic() - begin < 1.2  # one after another: 1.8 s


def test_a_shard_that_refuses_does_not_keep_the_repair_from_the_next(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.shards[0].die()
    world.shards[2].die()

    def refuse(method: str, generation: int) -> None:
        if method == "commit":
            raise ValueError("two generations serve already")

    world.shards[0].before = refuse
    coordinator.tick()
    assert 1 in world.shards[2].shard.status().generations
    assert "two generations" in world.named("repair_failed")[0]["why"]
    world.shards[0].before = lambda method, generation: None
    coordinator.tick()
    world.check_contents(1, 7)


def test_a_torn_log_fails_the_refresh_in_words(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(added=1)
    damage(world.changes().path(1))
    build(coordinator, 8)
    failed = world.named("refresh_failed")
    assert "the changes of the corpus cannot be read" in failed[-1]["why"]
    assert "version-000001" in coordinator.status().given_up
    world.check_contents(1, 7)


def test_a_follower_hides_what_a_silent_shard_was_not_told(world: World) -> None:
    """The shard that was lost while the follower told it comes back with what was deleted: it is told again."""
    coordinator = world.coordinator()
    build(coordinator, 7)
    world.change(deleted=[1, 12])
    silenced = threading.Event()

    def lost_once(method: str, generation: int) -> None:
        if method == "hide" and not silenced.is_set():
            silenced.set()
            raise ShardLost("did not answer hide")

    world.shards[0].before = lost_once
    follower = world.coordinator()
    assert silenced.is_set()
    assert follower.live.hidden == 0
    assert world.hidden_found([1]) == ["1 on 0: 1"]
    assert follower.follow_corpus()
    world.check_corpus_hidden([1, 12])


def test_every_other_refresh_is_written_to_disk(world: World) -> None:
    coordinator = world.coordinator(snapshot_every=2, keep=9)
    for version in (7, 8, 9):
        build(coordinator, version)
        while coordinator.snapshots.work():
            pass
    assert [wish.generation for wish in coordinator.snapshots.on_disk()] == [3, 1]
    build(coordinator, 10)
    assert coordinator.save_generation(4) is None  # the end of a stage asks for the last one
    assert coordinator.snapshots.work()
    assert coordinator.save_generation(4) == str(coordinator.snapshots.path(4))
