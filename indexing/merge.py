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


@dataclass(frozen=True)
class Hits:
    """What the index answers. `ids` are passage numbers, best first; equal scores by number."""

    ids: np.ndarray  # int64 [batch, k]
    scores: np.ndarray  # float32 [batch, k], descending: inner products
    generation: int
    weights_version: int


def best_first(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best columns of each row, by falling score and then by rising id; an id of -1 comes last.

    `scores` float32 [batch, columns], `ids` int64 [batch, columns]; returns scores and ids [batch, k].
    """
    keys = np.where(ids < 0, -np.inf, scores)
    order = np.lexsort((ids, ids < 0, -keys), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def merge(shard_hits: Sequence[ShardHits], k: int) -> Hits:
    """The `k` best hits over all shards, which must have answered from the same generation.

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
    scores, ids = best_first(scores, ids, k)
    if ids.size and ids.min() < 0:
        raise ValueError(f"retrieval.k is {k}, but the index found fewer hits for a query: raise index.nprobe")
    return Hits(ids, scores, generations[0], versions[0])


def check_k(k: int, num_passages: int) -> None:
    """Raise ValueError unless 1 <= k <= `num_passages`."""
    if not 1 <= k <= num_passages:
        raise ValueError(
            f"retrieval.k is {k}, but the index holds {num_passages} passages: allowed are 1 to {num_passages}"
        )
