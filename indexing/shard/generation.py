"""Holds one index generation of one shard: a big index that never changes, and what has become different since it was
built.

    base     FAISS index over the rows of sorted passage numbers; shared by all generations derived from one another
    delta    further passages, and passages of the base encoded again: sorted numbers, vectors, weights versions
    hidden   passages that were deleted; they are never returned

A search asks the base as its kind of index is, the delta exactly, and merges. A row of the base whose passage is in the
delta is never returned from the base. Deriving costs as much as the delta is large, hiding a mask of the base. A filter
is one more mask of either.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from indexing.corpus.stores.changes import contains
from indexing.corpus.stores.filters import Filter
from indexing.dense.faiss_build import Index, build_index
from indexing.dense.kinds import EXHAUSTIVE
from indexing.dense.probe import UNKNOWN, Figures
from indexing.hits import ShardIndexed, best_first
from indexing.indexing_settings import IndexConfig
from indexing.shard.waiting import WaitingVectors

VIEWS_KEPT = 16  # of the last filters: a byte a passage each
Passes = Callable[[np.ndarray | None], np.ndarray]  # passage numbers (None: the shard's range) -> bool, as them


@dataclass(frozen=True, kw_only=True)
class Base:
    """The big index. `key` tells it from every other one, also on disk."""

    index: Index | None  # None: no passages
    start: int
    numbers: np.ndarray | None  # int64 [rows], sorted; None: start, start + 1, ...
    generation: int  # that it was built for
    weights_version: int
    corpus_version: int
    key: str
    figures: Figures = UNKNOWN

    @property
    def num_rows(self) -> int:
        """Return the number of passages in the index."""
        return 0 if self.index is None else self.index.num_vectors

    def number_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the passage numbers of rows; -1 stays -1."""
        if self.numbers is None:
            return np.where(rows < 0, -1, rows + self.start)
        return np.where(rows < 0, -1, self.numbers[rows])

    def row_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of passage numbers, -1 for those that are not here."""
        if self.numbers is None:
            rows = numbers - self.start
            return np.where((rows >= 0) & (rows < self.num_rows), rows, -1)
        if not len(self.numbers):
            return np.full(np.shape(numbers), -1, np.int64)
        rows = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[rows] == numbers, rows, -1)


@dataclass(frozen=True)
class Delta:
    """The passages that were added or encoded again."""

    numbers: np.ndarray  # int64 [n], sorted
    versions: np.ndarray  # int64 [n]: weights version of each
    vectors: np.ndarray  # float32 [n, dim]
    index: Index


@dataclass(frozen=True)
class View:
    """The rows that may be returned; replaced as a whole when passages are hidden."""

    base: np.ndarray | None  # bool [rows of the base]; None: all of them
    delta: np.ndarray | None  # bool [rows of the delta]; None: all of them
    num_base: int  # rows that may be returned
    num_delta: int

    @property
    def num_rows(self) -> int:
        """Return the number of passages that may be returned."""
        return self.num_base + self.num_delta


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
        self._filtered: dict[Filter, tuple[View, View]] = {}  # the view without the filter, and with it

    @property
    def dim(self) -> int:
        """Return the number of dimensions of the vectors; 0 if there are none."""
        if self.base.index is not None:
            return self.base.index.dim
        return 0 if self.delta is None else self.delta.vectors.shape[1]

    @property
    def num_living(self) -> int:
        """Return the number of passages that may be returned."""
        return self._view.num_rows

    @property
    def figures(self) -> Figures:
        """Return the bytes of base and delta, for each passage that may be returned. Recall and seconds are those of
        the base when it was built: of the delta everything is found."""
        figures, living, delta = self.base.figures, self.num_living, self.delta
        if not figures.bytes_per_passage or not living:
            return figures
        more = 0 if delta is None else delta.vectors.nbytes + delta.index.num_bytes
        return replace(figures, bytes_per_passage=(figures.bytes_per_passage * self.base.num_rows + more) / living)

    @property
    def oldest_version(self) -> int:
        """Return the weights version of the passage that was encoded longest ago, of those that may be returned."""
        versions = [self.base.weights_version] if self._view.num_base else []
        if self.delta is not None and self._view.num_delta:
            versions.append(int(self.delta.versions.min()))
        return min(versions, default=self.weights_version)

    def hide(self, numbers: np.ndarray) -> None:
        """Never return these sorted passage numbers from now on; a search under way may still."""
        self.hidden = numbers
        self._view = self._see()

    def view(self, where: Filter | None = None, passes: Passes | None = None) -> View:
        """Return the rows that may be returned now and pass the filter `where`, which `passes` decides."""
        view = self._view
        if where is None or passes is None:
            return view
        known = self._filtered.get(where)
        if known is None or known[0] is not view:
            base, num_base = view.base, view.num_base
            if num_base:
                base, num_base = _both(base, passes(self.base.numbers))
            delta, num_delta = view.delta, view.num_delta
            if num_delta and self.delta is not None:
                delta, num_delta = _both(delta, passes(self.delta.numbers))
            if len(self._filtered) >= VIEWS_KEPT:
                self._filtered.clear()
            known = self._filtered[where] = view, View(base, delta, num_base, num_delta)
        return known[1]

    def search(
        self, queries: np.ndarray, k: int, num_vectors: int = 0, view: View | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return the `k` best passages for each of float32 `queries` [batch, dim], fewer where fewer may be returned
        (`view`; None: all that are living).

        Returns scores float32 [batch, columns], falling, passage numbers int64, equal scores by number (where the kind
        of index finds too few: -1 with -inf), the vectors of the first `num_vectors` of them or None, and their weights
        versions int64 [batch, columns], None where all are the generation's own. Raises ValueError as `Index.search`.
        """
        view, parts = self._view if view is None else view, list[tuple[np.ndarray, np.ndarray]]()
        if view.num_base and self.base.index is not None:
            scores, rows = self.base.index.search(queries, min(k, view.num_base), view.base)
            parts.append((scores, self.base.number_of(rows)))
        if view.num_delta and self.delta is not None:
            scores, rows = self.delta.index.search(queries, min(k, view.num_delta), view.delta)
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
        """Return what there is of the passages among `ids` int64 [n] that are here, hidden ones included."""
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
        """Return this generation with the passages `numbers` (sorted) added, or in place of what they were here; it
        shares the base. Raises ValueError for another number of dimensions."""
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

    def _see(self) -> View:
        """Return masks of the rows that are neither hidden nor replaced."""
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
        return View(base_mask, delta_mask, base.num_rows - len(out), num_delta)

    def _vectors(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return vectors float32 [..., dim] of passage numbers that a search returned; None where the kind of index has
        none."""
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
    vectors: WaitingVectors,
    start: int,
    *,
    numbers: np.ndarray | None,
    generation: int,
    weights_version: int,
    corpus_version: int,
    seed: int,
    recent: np.ndarray | None = None,
) -> Base:
    """Return a big index over the vectors of these passages, measured with the `recent` queries [any, dim]. Raises
    ValueError as `build_index`."""
    index, figures = vectors.build(seed, recent) if vectors.num_rows else (None, UNKNOWN)
    key = secrets.token_hex(8)
    return Base(
        index=index,
        start=start,
        numbers=numbers,
        generation=generation,
        weights_version=weights_version,
        corpus_version=corpus_version,
        key=key,
        figures=figures,
    )


def make_delta(numbers: np.ndarray, versions: np.ndarray, vectors: np.ndarray, config: IndexConfig) -> Delta:
    """Return the delta of sorted passage numbers, searched exhaustively; an exhaustive base gives it its precision."""
    factory = config.factory if config.factory in EXHAUSTIVE else EXHAUSTIVE[0]
    exact = replace(config, factory=factory, device="cpu", rescore_candidates=0, products="float32")
    return Delta(numbers, versions, vectors, build_index(vectors, exact))


def _both(mask: np.ndarray | None, passing: np.ndarray) -> tuple[np.ndarray, int]:
    """Return bool [rows], true in both (None: all of them are), and how many."""
    both = passing if mask is None else mask & passing
    return both, int(np.count_nonzero(both))
