"""Waiting for shards: one that says nothing is killed where nobody else would."""

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from cluster.refresh import shards
from cluster.refresh.ports import RefreshFailed, ShardLost
from cluster.service.ray_ports import NamedActor, Patience, RayShard
from tests.cluster.fakes import World, weights


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "POLL_S", 0.01)


def silence(world: World, number: int) -> None:
    """The shard answers no more until it is killed."""

    def before(method: str, generation: int) -> None:
        raise ShardLost("stopped", silent=True)

    shard = world.shards[number]
    shard.before = before
    restart = shard.restart

    def killed() -> None:
        shard.before = lambda method, generation: None
        restart()

    shard.restart = killed


def test_a_coordinator_that_starts_beside_a_silent_shard_kills_it(tmp_path: Path) -> None:
    """Nobody else would: the repair begins when the take-over is done."""
    world = World(tmp_path)
    first = world.coordinator()
    first.publish(weights(1))
    assert first.wait_and_refresh(0.0)
    first.snapshots.work()
    silence(world, 1)
    second = world.coordinator(search_timeout_s=0.2)
    assert world.calls("restart") == [("restart", -1, 1)]
    assert world.named("shard_killed")[0]["shard"] == 1
    second.tick()
    world.check_contents(1, 1)


def test_a_silent_shard_is_a_bounded_wait(tmp_path: Path) -> None:
    world = World(tmp_path)
    coordinator = world.coordinator()
    silence(world, 2)
    with pytest.raises(RefreshFailed, match="index shard 2 did not come back within 0 s"):
        coordinator.shards.wait(0.1)
    assert not world.calls("restart")


@pytest.mark.parametrize(
    ("error", "silent"), [(ActorUnavailableError("no connection", None), True), (ActorDiedError(), False)]
)
def test_a_process_that_takes_no_connection_counts_as_silent(error: RayError, silent: bool) -> None:
    """A stopped shard is unavailable for a coordinator that is new, and silent for one that has a connection: both kill
    it in the end."""
    actor = NamedActor("shard-0", "tests")

    def fail() -> None:
        raise error

    actor.find_place = fail
    with pytest.raises(ShardLost) as caught:
        RayShard(0, 0, stop=1, actor=actor, patience=Patience(1.0, 4.0)).status()
    assert caught.value.silent == silent
