"""Hits of the shards to hits of the corpus.

Every query is answered by one index generation: hits of two generations are never mixed. Equal scores are ordered by
passage number, so that the number of shards cannot change the answer of an exhaustive index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardHits:
    """What one shard answers. `ids` are passage numbers of the whole corpus, best first."""

    ids: np.ndarray  # int64 [batch, min(k, rows of the shard)]
    scores: np.ndarray  # float32, same shape, descending
    generation: int
    weights_version: int
    committed: int  # newest generation that this shard has committed
    vectors: np.ndarray | None = None  # float32 [batch, columns, dim] of the leading ids, where they were asked for


@dataclass(frozen=True)
class Hits:
    """What the index answers. `ids` are passage numbers, best first; equal scores by number."""

    ids: np.ndarray  # int64 [batch, k]
    scores: np.ndarray  # float32 [batch, k], descending: inner products, or what they were fused to
    generation: int
    weights_version: int
    vectors: np.ndarray | None = None  # float32 [batch, columns, dim]: the indexed vectors of the leading ids
    lexical: np.ndarray | None = None  # float32 [batch, k]: normalised lexical scores, where these were fused
    places: np.ndarray | None = None  # int32 [batch, k, 2]: in the dense and the lexical ranking, from 1; 0: in neither
    corpus: str = ""  # fingerprint of the corpus that was searched, where it is known


def best_first(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best columns of each row, by falling score and then by rising id; an id of -1 comes last.

    `scores` float32 [batch, columns], `ids` int64 [batch, columns]; returns scores and ids [batch, k].
    """
    order = _order(scores, ids, k)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _order(scores: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    keys = np.where(ids < 0, -np.inf, scores)
    return np.lexsort((ids, ids < 0, -keys), axis=-1)[:, :k]


def merge(shard_hits: Sequence[ShardHits], k: int) -> Hits:
    """The `k` best hits over all shards, which must have answered from the same generation; with the vectors of as
    many leading ones as every shard gave vectors for.

    Raises ValueError when generations or weights versions differ, or when the shards together hold fewer than `k`
    passages (each of them answers with all its rows then).
    """
    if not shard_hits:
        raise ValueError("merge needs the hits of at least one shard")
    generations = sorted({hits.generation for hits in shard_hits})
    versions = sorted({hits.weights_version for hits in shard_hits})
    if len(generations) > 1 or len(versions) > 1:
        raise ValueError(f"hits of different generations {generations} (weights versions {versions}) cannot be merged")
    if len({hits.ids.shape[0] for hits in shard_hits}) > 1:
        raise ValueError(f"shards answered {[hits.ids.shape[0] for hits in shard_hits]} queries: must be equal")
    scores = np.concatenate([hits.scores for hits in shard_hits], axis=1).astype(np.float32, copy=False)
    ids = np.concatenate([hits.ids for hits in shard_hits], axis=1).astype(np.int64, copy=False)
    check_k(k, ids.shape[1])
    order = _order(scores, ids, k)
    scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    if ids.size and ids.min() < 0:
        raise ValueError(f"retrieval.k is {k}, but the index found fewer hits for a query: raise index.nprobe")
    return Hits(ids, scores, generations[0], versions[0], _leading_vectors(shard_hits, order))


def _leading_vectors(shard_hits: Sequence[ShardHits], order: np.ndarray) -> np.ndarray | None:
    """Vectors of the first columns of `order`, which counts through the columns of all shards; None if a shard has
    none. The n best of all are among the n best of their own shard, so its leading vectors suffice."""
    parts = [hits.vectors for hits in shard_hits if hits.vectors is not None]
    if len(parts) < len(shard_hits):
        return None
    slots, first = [], 0
    for hits, part in zip(shard_hits, parts, strict=True):
        slots.append(np.pad(np.arange(first, first + part.shape[1]), (0, hits.ids.shape[1] - part.shape[1])))
        first += part.shape[1]
    limits = [part.shape[1] for hits, part in zip(shard_hits, parts, strict=True) if part.shape[1] < hits.ids.shape[1]]
    wanted = min([*limits, order.shape[1]])
    columns = np.concatenate(slots)[order[:, :wanted]]
    return np.take_along_axis(np.concatenate(parts, axis=1), columns[:, :, None], axis=1)


def check_k(k: int, num_passages: int) -> None:
    """Raise ValueError unless 1 <= k <= `num_passages`."""
    if not 1 <= k <= num_passages:
        raise ValueError(
            f"retrieval.k is {k}, but the index holds {num_passages} passages: allowed are 1 to {num_passages}"
        )
