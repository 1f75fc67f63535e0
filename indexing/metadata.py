"""Which passages of a range pass a filter, as a mask by passage number.

A field that a filter names is read from the store once, and kept as a column: one small number a passage into the list
of its different values. A filter is then decided once a value, not once a passage; masks of the last filters are kept.
One lock is held while a column is read and a mask is made: the first search with a new field waits for that.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from indexing.filters import Condition, Filter
from indexing.store import Store

MASKS_KEPT = 16  # of a range: a byte a passage each


class MetadataColumns:
    """Metadata of passages `start` to `stop` - 1 of a store, which is opened when it is first needed."""

    def __init__(self, store: str | Path, start: int, stop: int) -> None:
        self._path, self._start, self._stop = store, start, stop
        self._store: Store | None = None
        self._columns: dict[str, tuple[np.ndarray, list[Any]]] = {}
        self._masks: OrderedDict[Filter, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def mask(self, where: Filter) -> np.ndarray:
        """bool [stop - start]: who passes; never change it. Raises ValueError for a store without metadata, and for a
        field that no passage of the whole store has."""
        with self._lock:
            if where not in self._masks:
                self._read([field for field in where.fields if field not in self._columns])
                passes = np.ones(self._stop - self._start, bool)
                for condition in where.conditions:
                    passes &= self._holds(condition)
                passes.setflags(write=False)
                self._masks[where] = passes
                if len(self._masks) > MASKS_KEPT:
                    self._masks.popitem(last=False)
            self._masks.move_to_end(where)
            return self._masks[where]

    def _holds(self, condition: Condition) -> np.ndarray:
        numbers, values = self._columns[condition.field]
        return np.array([condition.holds(value) for value in values], bool)[numbers]

    def _read(self, fields: Sequence[str]) -> None:
        """Make columns of `fields`, in one pass over the range."""
        if not fields:
            return
        if self._store is None:
            self._store = Store.open(self._path, verify=False)
        known = self._store.metadata_fields
        for field in fields:
            if field not in known:
                raise ValueError(f"retrieval.where.{field}: {_nobody_has(known, str(self._path))}")
        columns = {field: np.zeros(self._stop - self._start, np.int32) for field in fields}
        values: dict[str, dict[Any, int]] = {field: {"null": 0} for field in fields}
        for row in range(self._start, self._stop):
            metadata = self._store.metadata(row)
            for field in fields if metadata else ():
                key = json.dumps(metadata.get(field), sort_keys=True)
                columns[field][row - self._start] = values[field].setdefault(key, len(values[field]))
        for field in fields:
            self._columns[field] = columns[field], [json.loads(key) for key in values[field]]


def count_passing(store: str | Path, where: Filter) -> int:
    """How many passages of a whole store pass. Raises ValueError as `MetadataColumns.mask` does."""
    num_passages = len(Store.open(store, verify=False))
    return int(np.count_nonzero(MetadataColumns(store, 0, num_passages).mask(where)))


def _nobody_has(known: Sequence[str], path: str) -> str:
    if not known:
        return (
            f"the passages in {path} have no metadata: corpus.path has none, or the store was written before metadata "
            "was kept; remove it to have it written anew"
        )
    return f"no passage has this field; their metadata has {', '.join(known)}"
