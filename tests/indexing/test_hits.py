"""Merging: hand-computed lists, ties by id, refusals."""

import numpy as np
import pytest

from indexing.hits import Hits, ShardHits, merge


def hits(ids: list[list[int]], scores: list[list[float]], generation: int = 3, weights_version: int = 30) -> ShardHits:
    return ShardHits(
        ids=np.array(ids, np.int64),
        scores=np.array(scores, np.float32),
        generation=generation,
        weights_version=weights_version,
        committed=generation,
    )


def test_hand_computed() -> None:
    left = hits([[2, 0, 1], [0, 1, 2]], [[0.9, 0.5, 0.1], [0.3, 0.2, 0.1]])
    right = hits([[5, 4], [3, 4]], [[0.7, 0.5], [0.25, 0.2]])
    merged = merge([left, right], 4)
    assert merged.ids.tolist() == [[2, 5, 0, 4], [0, 3, 1, 4]]
    assert merged.scores.tolist() == np.array([[0.9, 0.7, 0.5, 0.5], [0.3, 0.25, 0.2, 0.2]], np.float32).tolist()
    assert (merged.generation, merged.weights_version) == (3, 30)
    assert (merged.ids.dtype, merged.scores.dtype) == (np.int64, np.float32)


def test_ties_by_id_whatever_the_order_of_shards() -> None:
    left, right = hits([[7, 3]], [[1.0, 1.0]]), hits([[5, 1]], [[1.0, 1.0]])
    for order in ([left, right], [right, left]):
        assert merge(order, 3).ids.tolist() == [[1, 3, 5]]


def test_shards_smaller_than_k() -> None:
    parts = [hits([[number]], [[float(number % 3)]]) for number in range(5)]
    assert merge(parts, 5).ids.tolist() == [[2, 1, 4, 0, 3]]


@pytest.mark.parametrize(("num_vectors", "k"), [(1, 5), (3, 5), (9, 5), (3, 2), (9, 9)])
def test_leading_vectors_belong_to_the_hits(num_vectors: int, k: int) -> None:
    """Three shards of 2, 3 and 4 passages, searched by brute force; passage n has the vector n, n, n."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (6, 9)).astype(np.float32)  # with ties
    parts = []
    for start, stop in ((0, 2), (2, 5), (5, 9)):
        order = np.lexsort((np.broadcast_to(np.arange(start, stop), (6, stop - start)), -scores[:, start:stop]), axis=1)
        ids = order + start
        vectors = np.repeat(ids[:, :num_vectors, None], 3, axis=2).astype(np.float32)
        parts.append(
            ShardHits(
                ids=ids,
                scores=np.take_along_axis(scores, ids, axis=1),
                generation=1,
                weights_version=1,
                committed=1,
                vectors=vectors,
            )
        )
    merged = merge(parts, k)
    assert merged.vectors is not None
    assert merged.vectors.shape == (6, min(num_vectors, k), 3)
    assert (merged.vectors == merged.ids[:, :num_vectors, None]).all()
    assert (
        merge(
            [*parts[:2], ShardHits(ids=ids, scores=parts[2].scores, generation=1, weights_version=1, committed=1)], k
        ).vectors
        is None
    )


def test_missing_ids_never_leave() -> None:
    short = hits([[4, -1]], [[0.5, float(np.finfo(np.float32).min)]])
    assert merge([short, hits([[9, 8]], [[-5.0, -6.0]])], 3).ids.tolist() == [[4, 9, 8]]
    with pytest.raises(ValueError, match=r"retrieval\.k=2: must be smaller"):
        merge([short], 2)


@pytest.mark.parametrize(
    ("parts", "k", "message"),
    [
        ([], 1, "at least one shard"),
        ([hits([[0]], [[1.0]], 3), hits([[1]], [[1.0]], 4)], 1, r"different generations \[3, 4\]"),
        ([hits([[0]], [[1.0]], 3, 1), hits([[1]], [[1.0]], 3, 2)], 1, r"weights versions \[1, 2\]"),
        ([hits([[0]], [[1.0]]), hits([[1], [2]], [[1.0], [1.0]])], 1, r"answered \[1, 2\] queries"),
        ([hits([[0]], [[1.0]]), hits([[1]], [[1.0]])], 3, r"retrieval\.k=3: must be 1 to 2"),
        ([hits([[0]], [[1.0]])], 0, r"retrieval\.k=0"),
    ],
)
def test_refused(parts: list[ShardHits], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(parts, k)


def test_no_queries() -> None:
    empty = ShardHits(
        ids=np.zeros((0, 4), np.int64),
        scores=np.zeros((0, 4), np.float32),
        generation=1,
        weights_version=1,
        committed=1,
    )
    merged: Hits = merge([empty], 2)
    assert merged.ids.shape == (0, 2)
