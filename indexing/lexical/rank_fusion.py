"""Fuses several rankings of the same passages, by ranks alone or by a weighted sum of dense and lexical scores.

All functions are pure functions on arrays. Passage -1 stands for no passage: it ends a ranking, and is never returned
before a real one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from indexing.hits import best_first


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One ranking made from two, [batch, k] each; places count from 1, and 0 stands for passages that a ranking
    lacks."""

    ids: np.ndarray  # int64
    scores: np.ndarray  # float32, falling
    lexical: np.ndarray  # float32: lexical score over the best one of the corpus, from 0 to 1
    dense_places: np.ndarray  # int32
    lexical_places: np.ndarray  # int32


def reciprocal_rank_fusion(rankings: Sequence[np.ndarray], constant: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` best of several rankings: a passage scores the sum of 1 / (constant + place) over the rankings
    that hold it, places counting from 1 (Cormack, Clarke & Buettcher 2009). Equal scores by passage number.

    Each ranking is int64 [batch, n], n may differ. Returns scores float32 and ids int64 [batch, k]; if the rankings
    hold fewer passages, ids end with -1 and scores with -inf.
    """
    ids = np.concatenate(rankings, axis=1)
    shares = np.concatenate([1.0 / (constant + 1.0 + np.arange(ranking.shape[1])) for ranking in rankings])
    scores, best = np.full((len(ids), k), -np.inf, np.float32), np.full((len(ids), k), -1, np.int64)
    for row, passages in enumerate(ids):
        distinct, places = np.unique(passages, return_inverse=True)
        total = np.bincount(places, shares).astype(np.float32)
        total, distinct = total[distinct >= 0], distinct[distinct >= 0]
        found, chosen = best_first(total[None], distinct[None], k)
        scores[row, : found.shape[1]], best[row, : found.shape[1]] = found[0], chosen[0]
    return scores, best


def union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `second` int64 [batch, n] with -1 in place of each id that the same row of `first` [batch, m] holds."""
    return np.where((second[:, :, None] == first[:, None, :]).any(axis=2), -1, second)


def normalised(scores: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Return lexical scores [batch, n] over the best one of the whole corpus for the same question, [batch]; 0 if no
    passage shares a word with it. The result lies between 0 and 1 for any length of question, and does not depend on
    the candidates."""
    return (scores / np.where(best > 0, best, np.float32(1))[:, None]).astype(np.float32)


def fuse_by_rank(dense: np.ndarray, lexical: np.ndarray, *, shares: np.ndarray, constant: float, k: int) -> Fused:
    """Fuse dense and lexical ids [batch, n] by reciprocal rank; `shares` [batch, n] are normalised scores of the
    lexical ones. A dense hit that is no lexical one has a share of 0."""
    scores, ids = reciprocal_rank_fusion([dense, lexical], constant, k)
    places = places_of(ids, lexical)
    known = np.take_along_axis(np.pad(shares, ((0, 0), (1, 0))), places, axis=1)
    return Fused(
        ids=ids,
        scores=scores,
        lexical=known.astype(np.float32),
        dense_places=places_of(ids, dense),
        lexical_places=places,
    )


def fuse_by_score(
    dense: tuple[np.ndarray, np.ndarray, np.ndarray],
    lexical: tuple[np.ndarray, np.ndarray, np.ndarray],
    weight: float,
    k: int,
) -> Fused:
    """Return the `k` best by dense score + weight * normalised lexical score over all candidates of both rankings.

    Each ranking has ids, dense scores, and normalised lexical scores, [batch, n] each; a passage in both counts once.
    """
    more = union(dense[0], lexical[0])
    ids = np.concatenate([dense[0], more], axis=1)
    shares = np.concatenate([dense[2], lexical[2]], axis=1)
    total = np.concatenate([dense[1], lexical[1]], axis=1) + np.float32(weight) * shares
    scores, best = best_first(total.astype(np.float32), ids, k)
    missing = ((0, 0), (0, k - best.shape[1]))
    best = np.pad(best, missing, constant_values=-1)
    scores = np.pad(scores, missing, constant_values=-np.inf)
    scores = np.where(best < 0, np.float32("-inf"), scores)
    place = (best[:, :, None] == ids[:, None, :]).argmax(axis=2)
    known = np.where(best < 0, np.float32(0), np.take_along_axis(shares, place, axis=1))
    return Fused(
        ids=best,
        scores=scores,
        lexical=known.astype(np.float32),
        dense_places=places_of(best, dense[0]),
        lexical_places=places_of(best, lexical[0]),
    )


def behind(fused: Fused, dense: np.ndarray) -> Fused:
    """Return `fused` with its empty last columns filled by the `dense` ids [batch, n] that it lacks, in their order.
    These passages stand behind all candidates, with the score of the last one."""
    ids, scores, places = fused.ids.copy(), fused.scores.copy(), fused.dense_places.copy()
    for row, found in enumerate(fused.ids):
        empty = np.flatnonzero(found < 0)
        if not len(empty):
            continue
        more = np.flatnonzero(~np.isin(dense[row], found) & (dense[row] >= 0))[: len(empty)]
        filled = empty[: len(more)]
        ids[row, filled], places[row, filled] = dense[row, more], more + 1
        scores[row, filled] = scores[row, empty[0] - 1] if empty[0] else 0.0
    return replace(fused, ids=ids, scores=scores, dense_places=places)


def places_of(ids: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """Return int32: the place of each of `ids` [batch, k] in the same row of `ranking` [batch, n], from 1; 0 if it is
    absent."""
    same = (ids[:, :, None] == ranking[:, None, :]) & (ids[:, :, None] >= 0)
    return np.where(same.any(axis=2), same.argmax(axis=2) + 1, 0).astype(np.int32)
