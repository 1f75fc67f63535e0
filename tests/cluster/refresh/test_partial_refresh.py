"""Refreshes that encode some passages: which vectors serve afterwards, in what order, and what becomes of lost ones."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.refresh.coordinator import RefreshCoordinator, with_those_of
from cluster.refresh.ports import Chunk, Weights
from tests.cluster.fakes import NUM_PASSAGES, World, weights

SOME = np.array([2, 9, 20])  # two shards of three have some, or all


pytestmark = pytest.mark.usefixtures("no_pauses")


def part(version: int, only: np.ndarray | list[int]) -> Weights:
    return replace(weights(version), only=np.asarray(only))


def build(coordinator: RefreshCoordinator, *published: Weights) -> None:
    """Publish all of them, and refresh once."""
    for one in published:
        coordinator.publish(one)
    assert coordinator.wait_and_refresh(0.0)


def versions(base: int, **newer: np.ndarray | list[int]) -> np.ndarray:
    """Weights version of each passage: `base`, but for those of `vN=...`."""
    found = np.full(NUM_PASSAGES, base)
    for name, numbers in newer.items():
        found[np.asarray(numbers)] = int(name[1:])
    return found


def failing(world: World, times: int) -> None:
    """The first `times` chunks of every worker cannot be encoded."""
    left = [times]

    def before(chunk: Chunk, used: Weights) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("out of memory")

    for worker in world.workers:
        worker.before = before


def test_only_the_named_passages_are_encoded_and_each_tells_its_version(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, weights(7))
    world.log.clear()
    build(coordinator, part(10, SOME))
    world.check_corpus(2, versions(7, v10=SOME))
    status = coordinator.status()
    assert (status.generation, status.weights_version, status.oldest_version) == (2, 10, 7)
    assert (status.generations_committed, status.publish_id) == (2, weights(10).publish_id)
    encoded = [number for worker in world.workers for chunk in worker.chunks for number in chunk.numbers or ()]
    assert sorted(encoded) == SOME.tolist()
    event = world.named("refresh_committed")[-1]
    assert (event["generation"], event["passages"], event["partial"]) == (2, 3, True)
    # All rows before any prepare, all prepared before any commit.
    kinds = [call[0] for call in world.calls("derive", "stage", "prepare", "commit")]
    assert kinds == sorted(kinds, key=["derive", "stage", "prepare", "commit"].index)
    assert kinds.count("commit") == 3


def test_versions_mix_until_a_whole_refresh(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, weights(7))
    build(coordinator, part(10, [2, 9]))
    build(coordinator, part(20, [9, 22]))
    world.check_corpus(3, versions(7, v10=[2], v20=[9, 22]))
    assert coordinator.status().oldest_version == 7
    build(coordinator, part(30, np.setdiff1d(np.arange(NUM_PASSAGES), [9])))
    world.check_corpus(4, versions(30, v20=[9]))
    assert coordinator.status().oldest_version == 20  # every passage of the big index was replaced
    build(coordinator, weights(40))
    world.check_corpus(5, 40)
    assert (coordinator.status().weights_version, coordinator.status().oldest_version) == (40, 40)


def test_the_first_index_is_whole_whatever_is_asked_for(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, part(10, SOME))
    world.check_corpus(1, 10)


def test_what_a_dropped_publish_was_to_encode_is_encoded_with_the_newer_weights(world: World) -> None:
    coordinator = world.coordinator()
    build(coordinator, weights(7))
    build(coordinator, part(10, [2, 9]), part(20, [9, 21]))
    world.check_corpus(2, versions(7, v20=[2, 9, 21]))
    build(coordinator, weights(30), part(40, [1]))  # the whole one waits: the newer one is whole
    world.check_corpus(3, 40)
    build(coordinator, part(50, [1]), weights(60))
    world.check_corpus(4, 60)
    assert [event["weights_version"] for event in world.named("publish_dropped")] == [10, 30, 50]


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_refresh_that_was_given_up_was_to_encode_goes_to_the_next(world: World, whole: bool) -> None:
    coordinator = world.coordinator(max_failures=0)
    build(coordinator, weights(7))
    failing(world, times=1)
    build(coordinator, weights(10) if whole else part(10, [2, 9]))
    assert coordinator.status().given_up
    world.check_corpus(1, 7)
    build(coordinator, part(20, [9, 21]))
    generation = coordinator.status().generation
    world.check_corpus(generation, 20 if whole else versions(7, v20=[2, 9, 21]))
    build(coordinator, part(30, [5]))  # and no further
    expected = versions(20, v30=[5]) if whole else versions(7, v20=[2, 9, 21], v30=[5])
    world.check_corpus(coordinator.status().generation, expected)


@pytest.mark.parametrize("method", ["derive", "stage", "prepare"])
def test_a_shard_that_dies_in_it_costs_no_passage(world: World, method: str) -> None:
    """It comes back empty: the repair gives it the serving generation, from which the next is derived again."""
    coordinator = world.coordinator(search_timeout_s=5.0)
    build(coordinator, weights(7))
    while coordinator.snapshots.work():
        pass
    world.shards[0].die_once(method)

    def repair() -> None:
        coordinator.repair.check()

    original = coordinator.shards.wait

    def wait(*arguments: object, **options: object) -> object:
        repair()
        return original(*arguments, **options)  # pyright: ignore[reportArgumentType]

    coordinator.shards.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    build(coordinator, part(10, SOME))
    world.check_corpus(coordinator.status().generation, versions(7, v10=SOME))


def test_a_shard_that_is_encoded_again_gets_newer_vectors_than_it_had(world: World) -> None:
    """Without a snapshot only the newest weights are there: all its passages are then of them."""
    coordinator = world.coordinator()
    build(coordinator, weights(7))
    build(coordinator, part(10, SOME))
    shard = world.shards[1]
    shard.die()
    coordinator.repair.check()
    world.check_corpus(2, versions(7, v10=[*SOME.tolist(), *range(shard.start, shard.stop)]))
    assert coordinator.status().oldest_version == 7


def test_a_coordinator_that_takes_over_knows_the_oldest_passage(world: World) -> None:
    first = world.coordinator()
    build(first, weights(7))
    build(first, part(10, SOME))
    second = world.coordinator()
    status = second.status()
    assert (status.generation, status.weights_version, status.oldest_version) == (2, 10, 7)
    build(second, part(20, [4]))
    world.check_corpus(3, versions(7, v10=SOME, v20=[4]))


def test_parts_add_up() -> None:
    both = with_those_of(part(1, [3, 5]), part(2, [4, 5]))
    assert both.only is not None
    assert (both.version, both.only.tolist()) == (2, [3, 4, 5])
    assert with_those_of(weights(1), part(2, [4])).only is None
    assert with_those_of(part(1, [4]), weights(2)).only is None
