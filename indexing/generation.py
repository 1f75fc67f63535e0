"""One index generation of one shard: a big index that never changes, and what has become different since it was built.

    base     FAISS index over the rows of sorted passage numbers; shared by all generations derived from one another
    delta    further passages, and passages of the base encoded again: sorted numbers, vectors, weights versions
    hidden   passages that were deleted; they are never returned

A search asks base and delta, each exactly as its kind of index is, and merges. A row of the base whose passage is in
the delta is never returned from the base. Deriving costs as much as the delta is large, hiding a mask of the base.
"""

import secrets
from dataclasses import dataclass, replace

import numpy as np

from indexing.build import EXHAUSTIVE, Index, build_index
from indexing.changes import contains
from indexing.merge import ShardIndexed, best_first
from indexing.settings import IndexConfig

SPARE = 32  # hits asked for beyond those wanted, where some may be hidden
LARGEST_SEARCH = 2048  # deeper ones are answered with the mask itself (FAISS's limit on a GPU)


@dataclass(frozen=True)
class Base:
    """The big index. `key` tells it from every other one, also on disk."""

    index: Index | None  # None: no passages
    start: int
    numbers: np.ndarray | None  # int64 [rows], sorted; None: start, start + 1, ...
    generation: int  # that it was built for
    weights_version: int
    corpus_version: int
    key: str

    @property
    def num_rows(self) -> int:
        """Passages in the index."""
        return 0 if self.index is None else self.index.num_vectors

    def number_of(self, rows: np.ndarray) -> np.ndarray:
        """Passage numbers of rows; -1 stays -1."""
        if self.numbers is None:
            return np.where(rows < 0, -1, rows + self.start)
        return np.where(rows < 0, -1, self.numbers[rows])

    def row_of(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of passage numbers, -1 for those that are not here."""
        if self.numbers is None:
            rows = numbers - self.start
            return np.where((rows >= 0) & (rows < self.num_rows), rows, -1)
        if not len(self.numbers):
            return np.full(np.shape(numbers), -1, np.int64)
        rows = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[rows] == numbers, rows, -1)


@dataclass(frozen=True)
class Delta:
    """What was added or encoded again."""

    numbers: np.ndarray  # int64 [n], sorted
    versions: np.ndarray  # int64 [n]: weights version of each
    vectors: np.ndarray  # float32 [n, dim]
    index: Index


@dataclass(frozen=True)
class _View:
    """What may be returned; replaced as a whole when passages are hidden."""

    base: np.ndarray | None  # bool [rows of the base]; None: all of them
    delta: np.ndarray | None  # bool [rows of the delta]; None: all of them
    num_base: int  # rows that may be returned
    num_delta: int


class Generation:
    """Base, delta and mask. Searching is safe from several threads, also while `hide` is called."""

    def __init__(self, base: Base, delta: Delta | None, weights_version: int, corpus_version: int) -> None:
        """`weights_version`: what the generation as a whole goes by; single passages may be newer. `corpus_version`: it
        has every passage that was living then."""
        self.base, self.delta = base, delta
        self.weights_version, self.corpus_version = weights_version, corpus_version
        self.hidden = np.empty(0, np.int64)  # sorted numbers
        self._replaced = np.empty(0, np.int64)  # rows of the base
        if delta is not None:
            rows = base.row_of(delta.numbers)
            self._replaced = rows[rows >= 0]
        self._view = self._see()

    @property
    def dim(self) -> int:
        """Of the vectors; 0 where there are none."""
        if self.base.index is not None:
            return self.base.index.dim
        return 0 if self.delta is None else self.delta.vectors.shape[1]

    @property
    def num_living(self) -> int:
        """Passages that may be returned."""
        view = self._view
        return view.num_base + view.num_delta

    @property
    def oldest_version(self) -> int:
        """Weights version of the passage that was encoded longest ago, of those that may be returned."""
        versions = [self.base.weights_version] if self._view.num_base else []
        if self.delta is not None and self._view.num_delta:
            versions.append(int(self.delta.versions.min()))
        return min(versions, default=self.weights_version)

    def hide(self, numbers: np.ndarray) -> None:
        """Never return these sorted passage numbers from now on; a search under way may still."""
        self.hidden = numbers
        self._view = self._see()

    def search(
        self, queries: np.ndarray, k: int, num_vectors: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """The `k` best passages for each of float32 `queries` [batch, dim], fewer where fewer are living.

        Returns scores float32 [batch, columns], falling, passage numbers int64, equal scores by number (where the kind
        of index finds too few: -1 with -inf), the vectors of the first `num_vectors` of them or None, and their weights
        versions int64 [batch, columns], None where all are the generation's own. Raises ValueError as `Index.search`.
        """
        view, parts = self._view, list[tuple[np.ndarray, np.ndarray]]()
        if view.num_base and self.base.index is not None:
            scores, rows = search_allowed(self.base.index, queries, min(k, view.num_base), view.base, view.num_base)
            parts.append((scores, self.base.number_of(rows)))
        if view.num_delta and self.delta is not None:
            scores, rows = search_allowed(self.delta.index, queries, min(k, view.num_delta), view.delta, view.num_delta)
            parts.append((scores, np.where(rows < 0, -1, self.delta.numbers[rows])))
        match parts:
            case []:
                scores, numbers = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            case [(scores, numbers)]:
                pass
            case _:
                scores, numbers = (np.hstack(each) for each in zip(*parts, strict=True))
                scores, numbers = best_first(scores, numbers, k)
        vectors = self._vectors(numbers[:, :num_vectors]) if num_vectors else None
        return scores, numbers, vectors, self._versions(numbers)

    def indexed(self, ids: np.ndarray, with_vectors: bool) -> ShardIndexed:
        """What there is of the passages among `ids` int64 [n] that are here, hidden ones included."""
        there = self.base.row_of(ids) >= 0
        if self.delta is not None:
            there |= contains(self.delta.numbers, ids)
        places = np.flatnonzero(there)
        found, versions = self._vectors(ids[places]) if with_vectors else None, self._versions(ids[places])
        if versions is None:
            versions = np.full(len(places), self.weights_version, np.int64)
        return ShardIndexed(places, found, versions, self.weights_version)

    def derive(
        self,
        numbers: np.ndarray,
        vectors: np.ndarray,
        versions: np.ndarray,
        weights_version: int,
        corpus_version: int,
        config: IndexConfig,
    ) -> "Generation":
        """This generation with the passages `numbers` (sorted) added, or in place of what they were here; it shares the
        base. Raises ValueError for another number of dimensions."""
        if self.delta is not None:
            kept = ~contains(numbers, self.delta.numbers) & ~contains(self.hidden, self.delta.numbers)
            numbers = np.concatenate([self.delta.numbers[kept], numbers])
            order = np.argsort(numbers)
            numbers = numbers[order]
            versions = np.concatenate([self.delta.versions[kept], versions])[order]
            old = self.delta.vectors[kept]
            vectors = np.concatenate([old, vectors] if vectors.size else [old, np.empty((0, old.shape[1]))])[order]
        delta = None
        if len(numbers):
            if self.dim not in (0, vectors.shape[1]):
                raise ValueError(f"staged vectors have {vectors.shape[1]} dimensions: needed are {self.dim}")
            delta = make_delta(numbers, versions, np.ascontiguousarray(vectors, np.float32), config)
        derived = Generation(self.base, delta, weights_version, corpus_version)
        if len(self.hidden):
            derived.hide(self.hidden)
        return derived

    def _see(self) -> _View:
        """Masks of what is neither hidden nor replaced."""
        base, delta = self.base, self.delta
        rows = base.row_of(self.hidden)
        out = np.union1d(rows[rows >= 0], self._replaced)
        base_mask = delta_mask = None
        if len(out):
            base_mask = np.ones(base.num_rows, bool)
            base_mask[out] = False
        num_delta = 0
        if delta is not None:
            hidden = contains(self.hidden, delta.numbers)
            num_delta = len(hidden) - int(hidden.sum())
            delta_mask = ~hidden if hidden.any() else None
        return _View(base_mask, delta_mask, base.num_rows - len(out), num_delta)

    def _vectors(self, numbers: np.ndarray) -> np.ndarray | None:
        """Vectors float32 [..., dim] of numbers that a search returned; None where the kind of index has none."""
        rows = self.base.row_of(numbers)
        if self.delta is None:
            return self._base_vectors(rows)
        places = np.minimum(np.searchsorted(self.delta.numbers, numbers), len(self.delta.numbers) - 1)
        there = self.delta.numbers[places] == numbers
        known = self._base_vectors(np.where(there, 0, rows)) if self.base.num_rows else self.delta.vectors[places]
        return None if known is None else np.where(there[..., None], self.delta.vectors[places], known)

    def _base_vectors(self, rows: np.ndarray) -> np.ndarray | None:
        if self.base.index is None:
            return np.empty((*rows.shape, 0), np.float32)
        return self.base.index.vectors(rows)

    def _versions(self, numbers: np.ndarray) -> np.ndarray | None:
        if self.delta is None and self.base.weights_version == self.weights_version:
            return None
        versions = np.full(numbers.shape, self.base.weights_version, np.int64)
        if self.delta is not None:
            places = np.minimum(np.searchsorted(self.delta.numbers, numbers), len(self.delta.numbers) - 1)
            there = self.delta.numbers[places] == numbers
            versions[there] = self.delta.versions[places[there]]
        return None if (versions == self.weights_version).all() else versions


def build_base(
    vectors: np.ndarray,
    start: int,
    numbers: np.ndarray | None,
    generation: int,
    weights_version: int,
    corpus_version: int,
    config: IndexConfig,
    seed: int,
) -> Base:
    """A big index over float32 `vectors` [rows, dim] of these passages. Raises ValueError as `build_index`."""
    index = build_index(vectors, config, seed) if len(vectors) else None
    return Base(index, start, numbers, generation, weights_version, corpus_version, secrets.token_hex(8))


def make_delta(numbers: np.ndarray, versions: np.ndarray, vectors: np.ndarray, config: IndexConfig) -> Delta:
    """The delta of sorted passage numbers, searched exhaustively, in the precision of the base where that is too."""
    factory = config.factory if config.factory in EXHAUSTIVE else "Flat"
    return Delta(numbers, versions, vectors, build_index(vectors, replace(config, factory=factory, device="cpu")))


def search_allowed(
    index: Index, queries: np.ndarray, k: int, allowed: np.ndarray | None, num_allowed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`Index.search` among the rows that bool `allowed` [rows] marks (None: all); needs 1 <= k <= `num_allowed`.

    Where most rows are allowed, more hits than `k` are asked for and the others dropped, which is as quick as a search
    of all rows and gives the same hits; queries that are left with too few are searched with the mask.
    """
    if allowed is None:
        return index.search(queries, k)
    share = num_allowed / len(allowed)
    wide = min(len(allowed), int(1.5 * k / share) + SPARE)
    if wide > max(LARGEST_SEARCH, k) or share < 0.5:
        return index.search(queries, k, allowed)
    scores, rows = index.search(queries, wide)
    good = (rows >= 0) & allowed[rows]
    order = np.argsort(~good, axis=1, kind="stable")[:, :k]  # those that count first, in their order
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    short = np.flatnonzero(good.sum(axis=1) < k)
    if len(short):
        scores[short], rows[short] = index.search(queries[short], k, allowed)
    return scores, rows
