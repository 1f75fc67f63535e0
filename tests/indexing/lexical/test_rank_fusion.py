"""Fused rankings, by hand."""

import numpy as np
import pytest

from indexing.lexical.rank_fusion import (
    behind,
    fuse_by_rank,
    fuse_by_score,
    normalised,
    places_of,
    reciprocal_rank_fusion,
    union,
)


def test_reciprocal_ranks_by_hand() -> None:
    """Passage 7 is second and first; 3 first and third; 5 and 9 stand in one ranking each."""
    dense, lexical = np.array([[3, 7, 5]]), np.array([[7, 9, 3, -1]])
    scores, ids = reciprocal_rank_fusion([dense, lexical], 60, 5)
    np.testing.assert_array_equal(ids, [[7, 3, 9, 5, -1]])
    expected = [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63, -np.inf]
    np.testing.assert_allclose(scores, [expected], rtol=1e-6)


def test_equal_ranks_stand_by_number_and_questions_do_not_mix() -> None:
    scores, ids = reciprocal_rank_fusion([np.array([[8, 1], [1, 2]]), np.array([[1, 8], [4, -1]])], 0, 3)
    np.testing.assert_array_equal(ids, [[1, 8, -1], [1, 4, 2]])
    np.testing.assert_allclose(scores[1], [1, 1, 0.5])


def test_a_small_constant_trusts_the_first_places() -> None:
    """Twice second against once first: 2/(c + 2) against 1/(c + 1) ties at c = 0, and wins from there on."""
    rankings = [np.array([[1, 9]]), np.array([[2, 9]])]
    assert reciprocal_rank_fusion(rankings, 0, 1)[1].tolist() == [[1]]
    assert reciprocal_rank_fusion(rankings, 60, 1)[1].tolist() == [[9]]


def test_fused_by_rank_knows_where_each_came_from() -> None:
    dense, lexical = np.array([[3, 7, 5]]), np.array([[7, 9, -1]])
    fused = fuse_by_rank(dense, lexical, shares=np.array([[1.0, 0.25, 0.0]], np.float32), constant=60, k=4)
    np.testing.assert_array_equal(fused.ids, [[7, 3, 9, 5]])
    np.testing.assert_array_equal(fused.dense_places, [[2, 1, 0, 3]])
    np.testing.assert_array_equal(fused.lexical_places, [[1, 0, 2, 0]])
    np.testing.assert_array_equal(fused.lexical, np.array([[1.0, 0.0, 0.25, 0.0]], np.float32))


def test_fused_by_score_by_hand() -> None:
    """Scores .9 .8 .1 and weight .5; passage 7 stands in both and counts once, with the same numbers."""
    dense = np.array([[3, 7, 5]]), np.array([[0.9, 0.8, 0.1]], np.float32), np.array([[0.0, 0.6, 0.2]], np.float32)
    lexical = np.array([[9, 7, -1]]), np.array([[0.5, 0.8, 0.0]], np.float32), np.array([[1.0, 0.6, 0.0]], np.float32)
    fused = fuse_by_score(dense, lexical, 0.5, 5)
    np.testing.assert_array_equal(fused.ids, [[7, 9, 3, 5, -1]])
    np.testing.assert_allclose(fused.scores, [[1.1, 1.0, 0.9, 0.2, -np.inf]], rtol=1e-6)
    np.testing.assert_allclose(fused.lexical, [[0.6, 1.0, 0.0, 0.2, 0.0]])
    np.testing.assert_array_equal(fused.dense_places, [[2, 0, 1, 3, 0]])
    np.testing.assert_array_equal(fused.lexical_places, [[2, 1, 0, 0, 0]])
    np.testing.assert_array_equal(fuse_by_score(dense, lexical, 0.0, 3).ids, [[3, 7, 9]])


@pytest.mark.parametrize("seed", range(5))
def test_fused_by_score_equals_brute_force_over_all_candidates(seed: int) -> None:
    chance = np.random.default_rng(seed)
    products, shares = chance.normal(size=(3, 40)).astype(np.float32), chance.random((3, 40)).astype(np.float32)
    first, second = (np.stack([chance.permutation(40)[:12] for _ in range(3)]) for _ in range(2))

    def ranking(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return ids, np.take_along_axis(products, ids, 1), np.take_along_axis(shares, ids, 1)

    fused = fuse_by_score(ranking(first), ranking(second), 0.7, 6)
    for row in range(3):
        candidates = np.union1d(first[row], second[row])
        total = products[row] + np.float32(0.7) * shares[row]
        expected = candidates[np.argsort(-total[candidates], kind="stable")][:6]
        np.testing.assert_array_equal(fused.ids[row], expected)
        np.testing.assert_allclose(fused.scores[row], total[expected], rtol=1e-6)


def test_what_was_no_candidate_stands_behind() -> None:
    """With the score of the last candidate; nothing comes twice, and nothing is moved."""
    fused = fuse_by_rank(
        np.array([[3, 7], [1, 2]]), np.array([[7, 9], [2, 1]]), shares=np.zeros((2, 2), np.float32), constant=60, k=5
    )
    filled = behind(fused, np.array([[3, 7, 9, 4, 5], [1, 2, 6, 8, 9]]))
    np.testing.assert_array_equal(filled.ids, [[7, 3, 9, 4, 5], [1, 2, 6, 8, 9]])
    np.testing.assert_array_equal(filled.dense_places, [[2, 1, 0, 4, 5], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(filled.scores[0, 3:], filled.scores[0, [2, 2]])
    assert (np.diff(filled.scores, axis=1) <= 0).all()
    short = behind(fused, np.array([[3, 7], [1, 2]]))
    np.testing.assert_array_equal(short.ids, fused.ids)
    deep = np.array([[3]]), np.array([[0.5]], np.float32), np.array([[0.0]], np.float32)
    assert fuse_by_score(deep, deep, 1.0, 4).ids.tolist() == [[3, -1, -1, -1]]


def test_small_parts() -> None:
    np.testing.assert_array_equal(union(np.array([[1, 2]]), np.array([[2, 3, 1]])), [[-1, 3, -1]])
    np.testing.assert_array_equal(
        normalised(np.array([[2, 1], [0, 0]], np.float32), np.array([2, 0], np.float32)), [[1, 0.5], [0, 0]]
    )
    np.testing.assert_array_equal(places_of(np.array([[4, -1, 6]]), np.array([[6, -1, 4]])), [[3, 0, 1]])
