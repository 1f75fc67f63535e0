"""Merges the hits of the shards to hits of the corpus.

Every query is answered by one index generation: hits of two generations are never mixed. Equal scores are ordered by
passage number, so that the number of shards cannot change the answer of an exhaustive index.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from indexing.declare import refuse


@dataclass(frozen=True)
class CorpusState:
    """The passages that an answer is from: those that the corpus got up to version `added`
    (`indexing/corpus/stores/changes.py`),
    without those that it lost up to version `hidden`, or to a later one."""

    added: int = 0
    hidden: int = 0


UNCHANGED = CorpusState()  # the base store alone


@dataclass(frozen=True, kw_only=True)
class ShardHits:
    """The answer of one shard. `ids` are passage numbers of the whole corpus, best first."""

    ids: np.ndarray  # int64 [batch, min(k, rows of the shard)]
    scores: np.ndarray  # float32, same shape, descending
    generation: int
    weights_version: int
    committed: int  # newest generation that this shard has committed
    vectors: np.ndarray | None = None  # float32 [batch, columns, dim] of the leading ids, where they were asked for
    versions: np.ndarray | None = None  # int64, as `ids`: weights version of each hit; None: all `weights_version`
    num_living: int = -1  # passages of this shard that may be returned; -1: not told
    num_allowed: int = -1  # passages of the shard that pass the filter; -1: there was none
    corpus: CorpusState = UNCHANGED


@dataclass(frozen=True, kw_only=True)
class Hits:
    """The answer of the index. `ids` are passage numbers, best first; equal scores by number."""

    ids: np.ndarray  # int64 [batch, k]
    scores: np.ndarray  # float32 [batch, k], descending: inner products, or what they were fused to
    generation: int
    weights_version: int
    vectors: np.ndarray | None = None  # float32 [batch, columns, dim]: the indexed vectors of the leading ids
    versions: np.ndarray | None = None  # int64 [batch, k]: weights version of each hit; None: all `weights_version`
    lexical: np.ndarray | None = None  # float32 [batch, k]: normalised lexical scores, where these were fused
    places: np.ndarray | None = None  # int32 [batch, k, 2]: in the dense and the lexical ranking, from 1; 0: in neither
    corpus: CorpusState = UNCHANGED


@dataclass(frozen=True)
class Indexed:
    """The rows of a generation for passages that were asked for by number."""

    vectors: np.ndarray | None  # float32 [..., dim]: zeros where it has none; None: such a kind of index keeps none
    versions: np.ndarray  # int64 [...]: weights version of each; the generation's where it has no such passage

    def at(self, places: np.ndarray) -> "Indexed":
        """Return the entries at `places` int64 [...]; needs one axis."""
        return Indexed(None if self.vectors is None else self.vectors[places], self.versions[places])


@dataclass(frozen=True)
class ShardIndexed:
    """The rows of one shard for these passages."""

    places: np.ndarray  # int64 [found]: of its own passages among those that were asked for
    vectors: np.ndarray | None  # float32 [found, dim]
    versions: np.ndarray  # int64 [found]
    weights_version: int  # of the generation


def best_first(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` best columns of each row, by falling score and then by rising id; an id of -1 comes last.

    `scores` float32 [batch, columns], `ids` int64 [batch, columns]; returns scores and ids [batch, k].
    """
    order = _order(scores, ids, k)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _order(scores: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    keys = np.where(ids < 0, -np.inf, scores)
    return np.lexsort((ids, ids < 0, -keys), axis=-1)[:, :k]


def merge(shard_hits: Sequence[ShardHits], k: int, allow_fewer: bool = False) -> Hits:
    """Return the `k` best hits over all shards, which must have answered from the same generation; with the vectors of
    as many leading ones as every shard gave vectors for.

    Raises ValueError when generations or weights versions differ, when the shards together hold fewer than `k`
    passages (each of them answers with all its rows then), or when fewer pass a filter, unless `allow_fewer`.
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
    if all(hits.num_allowed >= 0 for hits in shard_hits):
        k = _check_filtered(k, sum(hits.num_allowed for hits in shard_hits), allow_fewer)
    else:
        check_k(k, ids.shape[1])
    order = _order(scores, ids, k)
    scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    if ids.size and ids.min() < 0:
        raise refuse("retrieval.k", k, "must be smaller: the index found fewer hits for a query")
    corpus = CorpusState(
        min(hits.corpus.added for hits in shard_hits), max(hits.corpus.hidden for hits in shard_hits)
    )  # what was deleted is hidden on one shard after the other
    vectors, each = _leading_vectors(shard_hits, order), _each(shard_hits, order)
    return Hits(
        ids=ids,
        scores=scores,
        generation=generations[0],
        weights_version=versions[0],
        vectors=vectors,
        versions=each,
        corpus=corpus,
    )


def joined(parts: Sequence[ShardIndexed], number: int) -> Indexed:
    """Return what all shards have of `number` passages that were asked for; `parts` must not be empty."""
    versions = np.full(number, parts[0].weights_version, np.int64)
    for part in parts:
        versions[part.places] = part.versions
    known = [(part.places, part.vectors) for part in parts if part.vectors is not None]
    if len(known) < len(parts):
        return Indexed(None, versions)
    vectors = np.zeros((number, max(found.shape[1] for _, found in known)), np.float32)
    for places, found in known:
        if len(places):
            vectors[places] = found
    return Indexed(vectors, versions)


COLUMNS = ("ids", "scores", "vectors", "versions", "lexical", "places")  # of Hits: what each hit has


def chosen(hits: Hits, order: np.ndarray) -> Hits:
    """Return the hits in the columns `order` int64 [batch, n], and everything that belongs to them; vectors are left
    out where they are those of fewer hits."""
    changed: dict[str, Any] = {}
    for name in COLUMNS:
        values = vars(hits)[name]
        if values is not None and order.size and order.max() >= values.shape[1]:
            changed[name] = None
        elif values is not None:
            index = order.reshape(*order.shape, *[1] * (values.ndim - 2))
            changed[name] = np.take_along_axis(values, index, axis=1)
    return replace(hits, **changed)


def without(hits: Hits, gone: np.ndarray) -> Hits:
    """Return `hits` without a passage where `gone` bool [batch, k] says so."""
    return replace(
        hits,
        ids=np.where(gone, -1, hits.ids),
        scores=np.where(gone, np.float32("-inf"), hits.scores).astype(np.float32),
        lexical=None if hits.lexical is None else np.where(gone, np.float32(0), hits.lexical),
        places=None if hits.places is None else np.where(gone[..., None], 0, hits.places).astype(np.int32),
    )


def filled(hits: Hits, k: int) -> Hits:
    """Return `hits` of at least `k` columns: further ones have no passage, and no vector."""
    missing = k - hits.ids.shape[1]
    if missing <= 0:
        return hits
    width, blank = ((0, 0), (0, missing)), {"ids": -1, "scores": -np.inf, "versions": hits.weights_version}
    changed: dict[str, Any] = {}
    for name in COLUMNS:
        values = vars(hits)[name]
        if values is not None and name != "vectors":
            widths = (*width, *[(0, 0)] * (values.ndim - 2))
            changed[name] = np.pad(values, widths, constant_values=blank.get(name, 0))
    return replace(hits, **changed)


def _each(shard_hits: Sequence[ShardHits], order: np.ndarray) -> np.ndarray | None:
    """Return the weights versions of the columns of `order`; None if every hit has that of its generation."""
    if all(hits.versions is None for hits in shard_hits):
        return None
    parts = [np.full(h.ids.shape, h.weights_version) if h.versions is None else h.versions for h in shard_hits]
    return np.take_along_axis(np.concatenate(parts, axis=1), order, axis=1)


def _leading_vectors(shard_hits: Sequence[ShardHits], order: np.ndarray) -> np.ndarray | None:
    """Return the vectors of the first columns of `order`, which counts through the columns of all shards; None if a
    shard has none. The n best of all are among the n best of their own shard, so its leading vectors suffice."""
    parts: list[np.ndarray] = [hits.vectors for hits in shard_hits if hits.vectors is not None]
    if len(parts) < len(shard_hits):
        return None
    dim = max(part.shape[2] for part in parts)  # 0 of a shard without passages
    parts = [part if part.shape[2] else np.empty((part.shape[0], part.shape[1], dim), np.float32) for part in parts]
    slots, first = [], 0
    for hits, part in zip(shard_hits, parts, strict=True):
        slots.append(np.pad(np.arange(first, first + part.shape[1]), (0, hits.ids.shape[1] - part.shape[1])))
        first += part.shape[1]
    limits = [part.shape[1] for hits, part in zip(shard_hits, parts, strict=True) if part.shape[1] < hits.ids.shape[1]]
    wanted = min([*limits, order.shape[1]])
    columns = np.concatenate(slots)[order[:, :wanted]]
    return np.take_along_axis(np.concatenate(parts, axis=1), columns[:, :, None], axis=1)


def _check_filtered(k: int, num_allowed: int, allow_fewer: bool) -> int:
    """Return `k`, or as many as pass the filter. Raises ValueError where that is fewer, unless `allow_fewer`."""
    if k > num_allowed and not allow_fewer:
        allowed = f"must be at most {num_allowed}, the passages that pass the filter retrieval.where"
        raise refuse("retrieval.k", k, allowed)
    return min(k, num_allowed)


def check_k(k: int, num_passages: int) -> None:
    """Raise ValueError unless 1 <= k <= `num_passages`."""
    if not 1 <= k <= num_passages:
        raise refuse("retrieval.k", k, f"must be 1 to {num_passages}, the passages of the index")
