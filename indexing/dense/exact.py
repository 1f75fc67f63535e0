"""Searches by brute force, as the reference that every index is compared with.

The score of a pair is its inner product in float64, rounded to float32: it depends on the two vectors alone, not on
their places in a matrix, so that equal vectors tie exactly.
"""

import numpy as np

BLOCK_NUMBERS = 1 << 23  # Number of float64 values converted at a time


def search_exactly(
    vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` rows of `vectors` [n, dim] with the largest inner product for each of `queries` [batch, dim],
    among those that are true in `allowed`, bool [n] (None: all).

    Returns float32 scores [batch, k], falling, and int64 rows [batch, k]; equal scores by row. Needs 1 <= k <= n, or as
    many as are allowed.
    """
    assert 1 <= k <= (len(vectors) if allowed is None else np.count_nonzero(allowed))
    queries = queries.astype(np.float64)
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    block = max(k, BLOCK_NUMBERS // max(vectors.shape[1], len(queries)))
    for start in range(0, len(vectors), block):
        part, numbers = vectors[start : start + block], np.arange(start, min(start + block, len(vectors)))
        if allowed is not None:
            chosen = allowed[start : start + block]
            part, numbers = part[chosen], numbers[chosen]
        with np.errstate(over="ignore"):  # infinity ranks first
            part_scores = (queries @ part.astype(np.float64).T).astype(np.float32)
        part_rows = np.broadcast_to(numbers, part_scores.shape)
        scores, rows = top_k(np.hstack([scores, part_scores]), np.hstack([rows, part_rows]), k)
    return scores, rows


def score_pairs(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return float32 [batch, columns]: the score of query i and vector `rows[i, j]`, as `search_exactly` computes
    it."""
    scores = np.empty(rows.shape, np.float32)
    block = max(1, BLOCK_NUMBERS // max(1, rows.shape[1] * vectors.shape[1]))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        candidates = vectors[rows[part]].astype(np.float64)
        with np.errstate(over="ignore"):
            scores[part] = np.matmul(candidates, queries[part, :, None].astype(np.float64))[:, :, 0]
    return scores


def top_k(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` best columns by falling score, then rising row; `rows` rises along the columns of equal score."""
    if scores.shape[1] > k:
        limit = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
        columns = np.empty((len(scores), k), np.int64)
        for query, line in enumerate(scores):
            above = np.flatnonzero(line > limit[query])
            columns[query] = np.concatenate([above, np.flatnonzero(line == limit[query])[: k - len(above)]])
        scores, rows = np.take_along_axis(scores, columns, axis=1), np.take_along_axis(rows, columns, axis=1)
    order = np.lexsort((rows, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def recall(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean share of the `reference` rows [batch, k] that are among the `found` rows [batch, any]."""
    shares = [np.isin(wanted, line).mean() for wanted, line in zip(reference, found, strict=True)]
    return float(np.mean(shares))
