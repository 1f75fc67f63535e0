"""SIGKILL and SIGSTOP at known states of a real service, while a client checks every answer."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cluster.survival.checker import wrong
from tests.cluster.survival.conftest import REFRESH, Victim, answer
from tests.cluster.survival.observers import (
    Held,
    is_prepared,
    kill,
    process_of,
    staged_rows,
    status_of,
    stopped,
    wait_until,
)


def await_restored(victim: Victim, before: int, shard: int) -> dict[str, Any]:
    """The event of a shard that was given its generation again, after the first `before` ones."""

    def found() -> list[dict[str, Any]]:
        return [row for row in victim.events("shard_restored")[before:] if row["shard"] == shard]

    return wait_until(found, "shard_restored")[0]


def test_a_shard_dies_while_idle(victim: Victim) -> None:
    generation, before = answer(victim), len(victim.events("shard_restored"))
    victim.client.save_generation(generation, 30.0)
    with victim.checker():
        kill(victim.shards[1])
        assert answer(victim) == generation
        assert await_restored(victim, before, 1)["source"] == "snapshot"


def test_a_shard_dies_while_it_searches(victim: Victim) -> None:
    """A search of many queries is under way in the shard that dies, and is answered in the end."""
    queries = np.random.default_rng(6).normal(size=(40_000, 16)).astype(np.float32)
    process = process_of(victim.shards[0])
    with victim.checker():
        pending = victim.client.submit(queries, 100)
        wait_until(lambda: status_of(victim.shards[0]).in_flight, "search under way")
        kill(victim.shards[0])
        hits = pending.result()
        assert process_of(victim.shards[0]) != process
    some = slice(0, None, 400)
    part = replace(hits, ids=hits.ids[some], scores=hits.scores[some])
    assert hits.ids.shape == (40_000, 100)
    assert not wrong(part, queries[some], victim.oracle)


def test_a_shard_dies_while_it_stages(victim: Victim) -> None:
    """Its rows are encoded again, those of the others are not."""
    generation, name = answer(victim), victim.shards[1]
    rows = status_of(name).stop - status_of(name).start
    with victim.checker():
        version = victim.publish()
        wait_until(lambda: 0 < staged_rows(name) < rows, "staged rows")
        kill(name)
        victim.await_version(version)
        assert answer(victim) > generation
    again = [row for row in victim.events("shards_filled_again") if row["generation"] > generation]
    assert [row["shards"] for row in again][:1] == [[1]]
    assert not [row for row in victim.events("refresh_failed") if row["weights_version"] == version]


def test_a_shard_dies_between_prepare_and_commit(victim: Victim) -> None:
    """One shard is held before it prepares: the others are prepared and nothing may be committed."""
    generation = answer(victim)
    held = Held(victim.shards[0], "prepare")
    with victim.checker():
        version = victim.publish()
        wait_until(held.reached, "all rows staged")
        wait_until(lambda: all(is_prepared(name) for name in victim.shards[1:]), "prepared shards")
        assert answer(victim) == generation
        kill(victim.shards[1])
        assert not is_prepared(victim.shards[0])
        assert status_of(victim.shards[2]).committed == generation
        held.release()
        victim.await_version(version)
        assert answer(victim) > generation
    again = [row for row in victim.events("shards_filled_again") if row["generation"] > generation]
    assert again[0]["shards"] == [1]


def test_a_shard_dies_when_the_others_have_committed(victim: Victim) -> None:
    """The commit is decided: the shard that died before it comes back empty and is given the new generation."""
    generation, before = answer(victim), len(victim.events("shard_restored"))
    held = Held(victim.shards[0], "commit")
    with victim.checker():
        version = victim.publish()
        wait_until(held.reached, "prepared shards")
        wait_until(lambda: all(status_of(name).committed > generation for name in victim.shards[1:]), "commits")
        assert answer(victim) == generation  # until the last one has switched
        kill(victim.shards[0])
        victim.await_version(version)
        await_restored(victim, before, 0)  # the generation before serves until then
        wait_until(lambda: answer(victim) > generation, "answers by the new generation")
    assert status_of(victim.shards[0]).committed == status_of(victim.shards[1]).committed


def test_the_coordinator_dies_in_the_middle_of_a_commit(victim: Victim) -> None:
    """The one that follows drives it to its end."""
    generation, taken_over = answer(victim), len(victim.events("index_taken_over"))
    held = Held(victim.shards[0], "commit")
    with victim.checker():
        version = victim.publish()
        wait_until(held.reached, "prepared shards")
        wait_until(lambda: all(status_of(name).committed > generation for name in victim.shards[1:]), "commits")
        kill(victim.service.address.coordinator)
        assert answer(victim) == generation
        held.release()
        victim.await_version(version)
        assert answer(victim) > generation
        wait_until(lambda: len(victim.events("index_taken_over")) > taken_over, "take-over")
        newest = {status_of(name).committed for name in victim.shards}
        assert len(newest) == 1
        assert victim.events("index_taken_over")[-1]["generation"] in newest


def test_the_coordinator_dies_while_shards_stage(victim: Victim) -> None:
    """Nothing of the half-built generation is ever served; the client hands its weights in again."""
    generation, name = answer(victim), victim.shards[2]
    with victim.checker():
        version = victim.publish()
        wait_until(lambda: staged_rows(name), "staged rows")
        kill(victim.service.address.coordinator)
        victim.await_version(version)
        assert answer(victim) > generation + 1


def test_a_refresh_worker_dies(victim: Victim) -> None:
    """Its chunk is encoded by the one that takes its place."""

    def deaths() -> int:  # on a busy machine its successor may also be late with a chunk, while it loads its libraries
        return sum("took longer" not in event["why"] for event in victim.events("worker_lost"))

    lost, process = deaths(), process_of(victim.service.workers[0])
    with victim.checker(bound_s=10.0):
        version = victim.publish()
        wait_until(lambda: staged_rows(victim.shards[1]), "staged rows")
        kill(victim.service.workers[0])
        victim.await_version(version)
    assert deaths() == lost + 1
    assert process_of(victim.service.workers[0]) != process


def test_a_stopped_shard_and_a_stopped_worker_are_replaced(victim: Victim) -> None:
    """SIGSTOP breaks no connection: only the bounds find it. The shard is given its snapshot: what the stopped worker
    would have to encode comes later than a search waits."""
    victim.client.save_generation(answer(victim), 30.0)
    killed, lost = len(victim.events("shard_killed")), len(victim.events("worker_lost"))
    frozen = [process_of(victim.shards[2]), process_of(victim.service.workers[0])]
    with victim.checker(), stopped(*frozen):
        version = victim.publish()
        answer(victim)
        victim.await_version(version)
        answer(victim)
    assert len(victim.events("shard_killed")) == killed + 1
    limit = f"took longer than {REFRESH.chunk_timeout_s:g} s"
    assert any(limit in row["why"] for row in victim.events("worker_lost")[lost:])
    assert process_of(victim.shards[2]) not in frozen
    assert process_of(victim.service.workers[0]) not in frozen


def test_a_stopped_coordinator_and_a_stopped_shard_are_replaced(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is the coordinator's to see to, and the coordinator that of the client that publishes, however often it
    does."""
    monkeypatch.setattr(victim.client, "address", replace(victim.client.address, hung_after_s=3.0))
    generation, killed = answer(victim), len(victim.events("shard_killed"))
    hung = len(victim.events("coordinator_killed"))
    victim.client.save_generation(generation, 30.0)
    frozen = [process_of(victim.service.address.coordinator), process_of(victim.shards[1])]
    with victim.checker(), stopped(*frozen):
        deadline = time.monotonic() + 20
        while True:
            version = victim.publish()
            victim.client.status()
            time.sleep(0.5)
            if len(victim.events("coordinator_killed")) > hung:
                break
            assert time.monotonic() < deadline
        victim.await_version(version)
        assert answer(victim) > generation
    assert len(victim.events("coordinator_killed")) == hung + 1
    assert len(victim.events("shard_killed")) > killed
    assert not victim.events("index_not_started")
