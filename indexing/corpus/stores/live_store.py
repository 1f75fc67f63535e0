"""Joins a base store and the changes made to it into one store, and makes changes.

`LiveStore` is a `Store` of all passage numbers ever given: text and tokens of any number can be read. `is_living` tells
which of them are in the corpus now, `current` where a labelled passage is now. The store follows changes that other
processes make: `refresh` looks for them, and so does reading a number that is not known yet.
"""

import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.changes import Change, ChangeLog
from indexing.corpus.stores.passages import KIND, Store, TokenSide, open_extra, write_store
from indexing.corpus.stores.table import TokenTable, check_rows

LOCK_S = 60.0  # Seconds that a change waits for another one


class LiveStore(Store):
    """A store with its changes. Reading is safe from several threads."""

    def __init__(self, path: Path, extra: dict[str, Any], folder: str | Path) -> None:
        super().__init__(path, extra)
        self.num_base = super().__len__()
        self.log = ChangeLog(folder, self.fingerprint, self.num_base)
        self._lock = threading.RLock()
        self._firsts = np.zeros(1, np.int64)  # first number of the base and of each segment with passages
        self._segments: list[Store] = []
        self._added: dict[str, int] = {}  # id -> the last number that it got in a segment
        self._unlisted: list[tuple[int, Store]] = []  # segments whose ids are not in `_added` yet
        self._read = 0  # version up to which segments were opened
        self._tables = {name: LiveTokens(self, name, super(LiveStore, self).tokens(name)) for name in extra["sides"]}
        self._open_segments()

    @staticmethod
    def open_with(path: str | Path, folder: str | Path, verify: bool = False) -> "LiveStore":
        """Open the base store at `path` with the changes in `folder`. Raises as `Store.open` and `ChangeLog` do."""
        return LiveStore(Path(path), open_extra(path, KIND, verify), folder)

    def __len__(self) -> int:
        """Return the number of passage numbers given so far; `log.num_living()` of them are living."""
        return self.log.num_numbers(self._read)

    def refresh(self) -> bool:
        """Read the changes made since and return True if there were any. Never waits."""
        with self._lock:
            found = self.log.refresh()
            self._open_segments()
        return found

    def passage(self, row: int) -> Passage:
        """Return the passage with number `row`, living or not. Raises IndexError."""
        store, place = self._find(row)
        return super().passage(row) if store is None else store.passage(place)

    def metadata(self, row: int) -> dict[str, Any]:
        """Return the metadata of the passage with number `row`, living or not. Raises IndexError."""
        store, place = self._find(row)
        return super().metadata(row) if store is None else store.metadata(place)

    def row_of(self, passage_id: str) -> int | None:
        """Return the number of the living passage with this id, or None."""
        with self._lock:
            for first, segment in self._unlisted:  # in order: the newest number of an id counts
                self._added |= {id: first + place for place, id in enumerate(segment.ids(range(len(segment))))}
            self._unlisted.clear()
            row = self._added.get(passage_id)
        row = super().row_of(passage_id) if row is None else row
        return row if row is not None and self.is_living(np.array([row]))[0] else None

    def ids(self, rows: Iterable[int] | np.ndarray) -> list[str]:
        """Return the ids of passage numbers."""
        return [self.passage(int(row)).id for row in rows]

    def tokens(self, side: str) -> "LiveTokens":
        """Return the token rows of one side by passage number; they follow the changes. Raises ValueError that names
        the sides."""
        self.side_fingerprint(side)
        return self._tables[side]

    def is_living(self, numbers: np.ndarray) -> np.ndarray:
        """Return bool, in the shape of `numbers`: True for passages that are in the corpus now. Looks for changes
        first."""
        self.refresh()
        return self.log.is_living(numbers)

    def current(self, numbers: np.ndarray) -> np.ndarray:
        """Return the present numbers of passages: the same number, or that of its id's present text; passages that are
        gone are left out."""
        numbers = np.asarray(numbers, np.int64)
        living = self.is_living(numbers)
        if living.all():
            return numbers
        each = zip(numbers.tolist(), living.tolist(), strict=True)
        found = [number if alive else self.row_of(self.passage(number).id) for number, alive in each]
        return np.array([row for row in found if row is not None], np.int64)

    def origin(self, numbers: np.ndarray) -> np.ndarray:
        """Return the first number that each passage had, before its text was replaced, in the shape of `numbers`."""
        origins = np.array(numbers, np.int64)
        for change in reversed(self.log.changes):
            inside = (origins >= change.first) & (origins < change.first + change.num_added)
            if inside.any():
                before = change.replaces[origins[inside] - change.first]
                origins[inside] = np.where(before < 0, origins[inside], before)
        return origins

    def _find(self, row: int) -> tuple[Store | None, int]:
        """Return the segment that holds number `row` (None: the base), and its place there."""
        if 0 <= row < self.num_base:
            return None, row
        if row >= len(self):
            self.refresh()
        check_rows(row, row, len(self))
        with self._lock:
            place = int(np.searchsorted(self._firsts, row, side="right")) - 1
            return self._segments[place - 1], row - int(self._firsts[place])

    def _open_segments(self) -> None:
        """Open the segments of versions that were read since. Raises TornSnapshot."""
        with self._lock:
            for change in self.log.changes[self._read :]:
                if change.num_added:
                    segment = Store.open(self.log.segment_path(change), verify=True)
                    for name, table in self._tables.items():
                        if segment.side_fingerprint(name) != self.side_fingerprint(name):
                            raise ValueError(f"{segment.path} was tokenised by another tokeniser than {self.path}")
                        table.add(change.first, segment.tokens(name))
                    self._segments.append(segment)
                    self.metadata_fields = tuple(sorted({*self.metadata_fields, *segment.metadata_fields}))
                    self._unlisted.append((change.first, segment))
                    self._firsts = np.append(self._firsts, change.first)
                self._read = change.version


class LiveTokens(TokenTable):
    """The token rows of base and segments by passage number."""

    def __init__(self, store: LiveStore, name: str, base: TokenTable) -> None:
        self._store, self.name = store, name
        # (first number, rows) of each part; replaced as a whole
        self._parts: tuple[tuple[int, TokenTable], ...] = ((0, base),)
        self.lengths: np.ndarray = base.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, first: int, table: TokenTable) -> None:
        """Append rows from number `first` on."""
        assert first == len(self.lengths)
        self.lengths = np.concatenate([self.lengths, table.lengths])
        self._parts = (*self._parts, (first, table))

    def rows(self, row_numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the int32 token rows of `row_numbers`, in that order; views of the maps."""
        numbers = np.asarray(row_numbers, np.int64).reshape(-1)
        self.know(numbers)
        base = self._parts[0][1]
        if not len(numbers) or numbers.max() < len(base):
            return base.rows(numbers)
        parts = self._parts
        places = np.searchsorted([first for first, _ in parts], numbers, side="right") - 1
        return [parts[p][1].rows([n - parts[p][0]])[0] for p, n in zip(places.tolist(), numbers.tolist(), strict=True)]

    def padded(self, row_numbers: np.ndarray, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return `row_numbers` as int64 ids [n, tokens] and mask [n, tokens] (1 at tokens), cut to the longest of
        them."""
        numbers = np.asarray(row_numbers, np.int64)
        self.know(numbers)
        base = self._parts[0][1]
        if not len(numbers) or numbers.max() < len(base):
            return base.padded(numbers, pad_id)
        rows = self.rows(numbers)
        mask = np.arange(max(1, max(len(row) for row in rows))) < np.array([len(row) for row in rows])[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = np.concatenate(rows)
        return ids, mask.astype(np.int64)

    def know(self, numbers: np.ndarray) -> None:
        """Look for changes if one of `numbers` is not known yet. Raises IndexError if there is no such passage."""
        if len(numbers):
            if numbers.max() >= len(self.lengths):
                self._store.refresh()
            check_rows(int(numbers.min()), int(numbers.max()), len(self.lengths))


@dataclass
class Wanted:
    """A change to make: passages to put in, and ids to delete."""

    put: list[Passage] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    mode: str = "add"  # add: ids of `put` are new | update: they are living | upsert: either


def change_corpus(
    store: LiveStore, wanted: Wanted, *, sides: Sequence[TokenSide], keep: int = 1, timeout_s: float = LOCK_S
) -> Change:
    """Make one change as a whole or not at all; it is made when this returns.

    `keep` is the number of living passages that must be left. Raises ValueError for ids that do not fit `mode`, that
    come twice, or that are not living, and TimeoutError if another change takes longer than `timeout_s`.
    """
    log = store.log
    with log.locked(timeout_s):
        store.refresh()
        deleted, replaces = _check(store, wanted, keep)
        # left by a writer that died
        for leftover in (log.folder / "segments").glob(f"*segment-{log.version + 1:06d}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if wanted.put:
            path = log.folder / "segments" / f"segment-{log.version + 1:06d}"
            write_store(path, wanted.put, sides, {"first": log.num_numbers()})
        change = log.append(len(wanted.put), np.array(deleted, np.int64), np.array(replaces, np.int64))
    store.refresh()
    return change


def _check(store: LiveStore, wanted: Wanted, keep: int) -> tuple[list[int], list[int]]:
    """Return the numbers that are taken away, and the number that each of `put` replaces (-1: none). Raises
    ValueError."""
    if not wanted.put and not wanted.delete:
        raise ValueError("nothing to change: no passage is put in and no id is deleted")
    seen: set[str] = set()
    for passage_id in (*(passage.id for passage in wanted.put), *wanted.delete):
        if passage_id in seen:
            raise ValueError(f"id {passage_id!r} comes twice in one change")
        seen.add(passage_id)
    rows = [store.row_of(passage.id) for passage in wanted.put]
    for passage, row in zip(wanted.put, rows, strict=True):
        if wanted.mode == "add" and row is not None:
            raise ValueError(f"passage {passage.id!r} is in the corpus already: use update to replace its text")
        if wanted.mode == "update" and row is None:
            raise ValueError(f"passage {passage.id!r} is not in the corpus: use add to put it in")
    gone: list[int] = []
    for passage_id in wanted.delete:
        row = store.row_of(passage_id)
        if row is None:
            raise ValueError(f"passage {passage_id!r} is not in the corpus: it cannot be deleted")
        gone.append(row)
    left = store.log.num_living() + rows.count(None) - len(gone)
    if left < keep:
        raise ValueError(f"{left} passages would be left in the corpus: {keep} are needed (retrieval.k)")
    return [*gone, *(row for row in rows if row is not None)], [-1 if row is None else row for row in rows]
