"""Brute force: hand-computed scores, ties by row, blocks; recall."""

import numpy as np
import pytest

from indexing.dense import exact
from indexing.dense.exact import recall, score_pairs, search_exactly
from tests.indexing.helpers import unit_vectors


def test_hand_computed() -> None:
    vectors = np.array([[1, 0], [0, 2], [3, 4], [0, 2]], np.float32)
    scores, rows = search_exactly(vectors, np.array([[1, 0], [0, 1], [-1, 0]], np.float32), 3)
    assert rows.tolist() == [[2, 0, 1], [2, 1, 3], [1, 3, 0]]
    assert scores.tolist() == [[3, 1, 0], [4, 2, 2], [0, 0, -1]]


@pytest.mark.parametrize("block_numbers", [1, 100, 1 << 20])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, block_numbers: int) -> None:
    vectors = np.repeat(unit_vectors(40, 8), 3, axis=0)
    queries = unit_vectors(5, 8, seed=1)
    expected = search_exactly(vectors, queries, 7)
    monkeypatch.setattr(exact, "BLOCK_NUMBERS", block_numbers)
    scores, rows = search_exactly(vectors, queries, 7)
    assert rows.tolist() == expected[1].tolist()
    assert scores.tolist() == expected[0].tolist()
    assert score_pairs(vectors, queries, rows).tolist() == scores.tolist()


def test_all_equal() -> None:
    scores, rows = search_exactly(np.ones((50, 3), np.float32), np.ones((2, 3), np.float32), 4)
    assert rows.tolist() == [[0, 1, 2, 3]] * 2
    assert scores.tolist() == [[3.0] * 4] * 2


def test_recall() -> None:
    assert recall(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9], [5, 4]])) == 0.75
