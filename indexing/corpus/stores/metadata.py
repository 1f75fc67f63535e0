"""Decides which passages of a shard pass a filter, as a mask by passage number.

A field that a filter names is read from the store once, and kept as a column: one small number per passage into the
list of its different values. A filter is then decided once per value, not once per passage; masks of the last filters
are kept. Passages that were added to the corpus later are read when they are first needed. One lock is held while a
column is read and a mask is made: the first search with a new field waits for that.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from indexing.corpus.stores.filters import Condition, Filter
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.passages import Store

MASKS_KEPT = 16  # Number of masks of a range that are kept, at a byte per passage


@dataclass
class _Column:
    """One field: the place of each passage's value in `values`, which are JSON; the first stands for no value."""

    places: np.ndarray  # int32 [passages read so far]
    values: dict[str, int] = field(default_factory=lambda: {"null": 0})


class MetadataColumns:
    """The metadata of passages `start` to `stop` - 1 of a store, and of those added later that shard `shard` of
    `num_shards` holds (`ChangeLog.owned`). A path is opened when it is first needed, with the changes in `corpus`."""

    def __init__(
        self,
        store: str | Path | Store,
        start: int,
        stop: int,
        *,
        shard: int = 0,
        num_shards: int = 1,
        corpus: str | Path | None = None,
    ) -> None:
        self._path, self._corpus = store, corpus
        self._start, self._stop, self._shard, self._num_shards = start, stop, shard, num_shards
        self._store: Store | None = store if isinstance(store, Store) else None
        self._columns: dict[str, _Column] = {}
        self._masks: OrderedDict[Filter, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def mask(self, where: Filter) -> np.ndarray:
        """Return bool [stop - start]: True for passages that pass; never change it. Raises ValueError for a store
        without metadata, and for a field that no passage of the whole store has."""
        return self.passes(where, None)

    def passes(self, where: Filter, numbers: np.ndarray | None) -> np.ndarray:
        """Return bool, in the shape of int64 `numbers` of this shard's passages (None: `start` to `stop` - 1): True for
        those that pass; never change it. Raises ValueError as `mask`."""
        with self._lock:
            base = self._stop - self._start
            if numbers is None or not len(numbers):
                mask, size = self._mask(where, base), base if numbers is None else 0
                return mask if len(mask) == size else mask[:size]
            later = numbers - self._num_base() - self._shard  # negative for passages of the base
            places = np.where(later < 0, numbers - self._start, base + later // self._num_shards)
            return self._mask(where, max(base, int(places.max()) + 1))[places]

    def _mask(self, where: Filter, size: int) -> np.ndarray:
        """Return bool [`size` or more]: True for passages that pass. Call with the lock held."""
        known = self._masks.get(where, np.empty(0, bool))
        if len(known) < size:
            self._read(where.fields, size)
            passes = np.ones(size, bool)
            for condition in where.conditions:
                passes &= self._holds(condition, size)
            passes.setflags(write=False)
            self._masks[where] = known = passes
            if len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        self._masks.move_to_end(where)
        return known

    def _holds(self, condition: Condition, size: int) -> np.ndarray:
        column = self._columns[condition.field]
        return np.array([condition.holds(json.loads(value)) for value in column.values], bool)[column.places[:size]]

    def _read(self, fields: Sequence[str], size: int) -> None:
        """Read the columns of `fields` for `size` passages, in one pass over those that they lack."""
        store = self._opened()
        if not set(fields) <= set(store.metadata_fields) and isinstance(store, LiveStore):
            store.refresh()
        for name in fields:
            if name not in store.metadata_fields:
                raise ValueError(f"retrieval.where.{name}: {_nobody_has(store.metadata_fields, str(store.path))}")
        for lacking, names in self._lacking(fields, size).items():
            more = {name: np.zeros(size - lacking, np.int32) for name in names}
            for place in range(lacking, size):
                metadata = store.metadata(self._number(place))
                for name in names if metadata else ():
                    value, values = json.dumps(metadata.get(name), sort_keys=True), self._columns[name].values
                    more[name][place - lacking] = values.setdefault(value, len(values))
            for name in names:
                self._columns[name].places = np.concatenate([self._columns[name].places, more[name]])

    def _lacking(self, fields: Sequence[str], size: int) -> dict[int, list[str]]:
        """Return number of passages read -> fields, for those of `fields` with fewer than `size` passages."""
        found: dict[int, list[str]] = {}
        for name in fields:
            have = len(self._columns.setdefault(name, _Column(np.empty(0, np.int32))).places)
            if have < size:
                found.setdefault(have, []).append(name)
        return found

    def _number(self, place: int) -> int:
        base = self._stop - self._start
        if place < base:
            return self._start + place
        return self._num_base() + self._shard + (place - base) * self._num_shards

    def _num_base(self) -> int:
        store = self._opened()
        return store.num_base if isinstance(store, LiveStore) else len(store)

    def _opened(self) -> Store:
        if self._store is None:
            assert not isinstance(self._path, Store)
            self._store = open_store(self._path, self._corpus)
        return self._store


def open_store(path: str | Path, corpus: str | Path | None) -> Store:
    """Open the store at `path` with the changes in the folder `corpus` (None: no changes)."""
    return Store.open(path, verify=False) if corpus is None else LiveStore.open_with(path, corpus)


def count_passing(path: str | Path, where: Filter, corpus: str | Path | None = None) -> int:
    """Return the number of living passages of a whole store, with the changes in `corpus`, that pass. Raises ValueError
    as `MetadataColumns.mask` does."""
    store = open_store(path, corpus)
    if not isinstance(store, LiveStore):
        return int(np.count_nonzero(MetadataColumns(store, 0, stop=len(store)).mask(where)))
    numbers = np.arange(len(store))
    passing = MetadataColumns(store, 0, stop=store.num_base).passes(where, numbers)
    return int(np.count_nonzero(passing & store.is_living(numbers)))


def _nobody_has(known: Sequence[str], path: str) -> str:
    if not known:
        return (
            f"the passages in {path} have no metadata: corpus.path has none, or the store was written before metadata "
            "was kept; remove it to have it written anew"
        )
    return f"no passage has this field; their metadata has {', '.join(known)}"
