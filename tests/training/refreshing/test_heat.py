"""Which passages are encoded first: counts, ages, and what becomes of a refresh that never came."""

from typing import Any

import numpy as np
import pytest

from training.refreshing.heat import HALF_LIFE, Heat

FADE = 0.5 ** (1 / HALF_LIFE)


class Alone:
    """The one rank there is."""

    rank, world_size = 0, 1


class OfTwo:
    """Rank `rank` of two; the other one read `other`."""

    world_size = 2

    def __init__(self, rank: int, other: np.ndarray) -> None:
        self.rank, self.other = rank, other

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


def heat(num_passages: int = 6, ranks: Any = None) -> Heat:
    one: Any = ranks or Alone()
    return Heat(num_passages, one)


def test_the_most_read_come_first_and_numbers_rise():
    found = heat()
    found.read(np.array([[4, 1], [4, -1]]))
    found.read(np.array([4, 1, 5]))
    found.gather(serving_version=0)
    assert found.hits.tolist() == [0, 2, 0, 0, 3, 1]
    assert found.choose(1 / 6, step=10).tolist() == [4]
    assert found.choose(3 / 6, step=10).tolist() == [1, 4, 5]
    assert found.choose(4 / 6, step=10).tolist() == [0, 1, 4, 5]  # equal ones by number
    assert found.choose(0.001, step=10).tolist() == [4]  # at least one


def test_age_counts_as_hits_do():
    found = heat(3)
    found.read(np.array([0, 0, 1]))
    found.gather(0)
    found.encoded_at[:] = [18, 0, 0]  # the mean is 1 hit: 3 x 2 steps, 2 x 20 steps, 1 x 20 steps
    assert found.choose(1 / 3, step=20).tolist() == [1]
    assert found.choose(2 / 3, step=20).tolist() == [1, 2]  # what nobody reads comes up in time
    assert found.choose(2 / 3, step=30).tolist() == [0, 1]  # 3 x 12 against 1 x 30
    found.hits[:] = 0
    assert found.choose(2 / 3, step=20).tolist() == [1, 2]  # nothing read: age alone


def test_hits_fade_with_the_refreshes_and_start_again_when_their_passage_was_encoded():
    found = heat(3)
    found.read(np.array([0, 0, 1]))
    found.gather(0)
    found.ask(10, np.array([0]))
    found.read(np.array([0, 2]))  # while it is being built
    found.gather(serving_version=10)
    assert found.hits.tolist() == pytest.approx([1, FADE, 1])
    assert found.encoded_at.tolist() == [10, 0, 0]


def test_a_refresh_that_never_came_leaves_its_passages_urgent():
    found = heat(3)
    found.read(np.array([0, 0, 1]))
    found.gather(0)
    found.ask(10, np.array([0]))
    found.gather(serving_version=0)  # it failed
    assert found.encoded_at.tolist() == [0, 0, 0]
    assert found.choose(1 / 3, step=20).tolist() == [0]
    found.ask(20, np.array([0]))
    found.gather(serving_version=20)
    assert found.encoded_at.tolist() == [20, 0, 0]
    assert found.choose(1 / 3, step=30).tolist() == [1]


def test_a_whole_refresh_encodes_all():
    found = heat(3)
    found.read(np.array([2]))
    found.gather(0)
    found.ask(10, None)
    found.gather(10)
    assert found.encoded_at.tolist() == [10, 10, 10]
    assert found.hits.tolist() == [0, 0, 0]


def test_all_ranks_hits_are_counted_by_the_first():
    first, second = heat(4, OfTwo(0, np.array([3, 3]))), heat(4, OfTwo(1, np.array([0])))
    first.read(np.array([0]))
    second.read(np.array([3, 3]))
    first.gather(0)
    second.gather(0)
    assert first.hits.tolist() == [1, 0, 0, 2]
    assert len(second.hits) == 0


def test_passages_that_came_later_are_counted_too():
    found = heat(3)
    found.ask(10, None)
    found.read(np.array([4, 4, 1]))
    found.gather(10)
    assert found.num_passages == 5
    assert found.hits.tolist() == [0, 1, 0, 0, 2]
    assert found.encoded_at.tolist() == [10] * 5
    assert found.choose(0.4, step=20).tolist() == [1, 4]
    found.ask(20, None)
    found.read(np.array([6]))
    found.gather(10)  # not there yet
    found.gather(20)
    assert found.encoded_at.tolist() == [20] * 5 + [10] * 2


def test_a_restored_one_goes_on_with_the_same_choice():
    found = heat()
    found.read(np.array([4, 1, 4]))
    found.gather(0)
    found.ask(10, np.array([4]))
    found.read(np.array([5, 5, 5]))
    again = heat()
    again.restore(found.state(), None)
    for one in (found, again):
        one.gather(10)
    assert np.array_equal(again.hits, found.hits)
    assert np.array_equal(again.choose(0.5, 20), found.choose(0.5, 20))
    anew = heat()
    anew.restore(found.state(), 15)  # the resume encoded everything
    assert anew.encoded_at.tolist() == [15] * 6
    assert np.array_equal(anew.hits, found.hits)
