"""Stores ragged rows of numbers on disk: written once in a stream, read through a memory map.

`NAME.values` holds the rows one after another, `NAME.offsets` (int64) the place of each row's first number. Files are
written with `write()`, never through a map: a full disk is then an OSError with the path, not a killed process. A
reader opens them only below a manifest (`indexing/corpus/snapshot.py`) whose sizes it has compared, so that a map never
faults.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from indexing.corpus.snapshot import named_errors, write_file


class RaggedWriter:
    """Appends rows to `DIRECTORY/NAME.values`; `close` writes the offsets. A context manager."""

    def __init__(self, directory: str | Path, name: str, dtype: str) -> None:
        self.path = Path(directory) / f"{name}.values"
        self.offsets_path = Path(directory) / f"{name}.offsets"
        self.dtype = np.dtype(dtype)
        self._ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._file = self.path.open("wb", buffering=1 << 20)

    def append(self, rows: Sequence[Sequence[int] | np.ndarray | bytes]) -> None:
        """Append a batch of rows."""
        if not rows:
            return
        lengths = np.array([len(row) for row in rows], np.int64)
        self._ends.append(self._ends[-1][-1] + np.cumsum(lengths))
        with named_errors(self.path):
            if isinstance(rows[0], bytes):
                self._file.write(b"".join(row for row in rows if isinstance(row, bytes)))
            else:
                self._file.write(np.concatenate([np.asarray(row, self.dtype) for row in rows]).data)

    def close(self) -> None:
        """Flush the values to the disk and write the offsets."""
        with named_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        write_file(self.offsets_path, self._ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(OSError):  # the disk is full, as `error` already tells
            self._file.close()


class Ragged:
    """The rows that a `RaggedWriter` wrote, memory-mapped read-only."""

    def __init__(self, directory: str | Path, name: str, dtype: str) -> None:
        self.offsets = map_array(Path(directory) / f"{name}.offsets", "int64")
        self.values = map_array(Path(directory) / f"{name}.values", dtype)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of values of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def row(self, row: int) -> np.ndarray:
        """Return one row, a view of the map."""
        check_rows(row, row, len(self))
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def text(self, row: int) -> str:
        """Return one row of UTF-8 bytes as a string."""
        return self.row(row).tobytes().decode()


class TokenTable:
    """The token rows of one tokeniser, by passage number (or by question)."""

    def __init__(self, directory: str | Path, name: str) -> None:
        self._ragged = Ragged(directory, name, "int32")
        self.lengths: np.ndarray = self._ragged.lengths.astype(np.int32)  # int32 [rows]

    def __len__(self) -> int:
        return len(self._ragged)

    def rows(self, row_numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the int32 token rows of `row_numbers`, in that order; views of the map."""
        numbers = np.asarray(row_numbers, np.int64).reshape(-1)
        if len(numbers):
            check_rows(int(numbers.min()), int(numbers.max()), len(self))
        values, offsets = self._ragged.values, self._ragged.offsets
        return [values[start:stop] for start, stop in zip(offsets[numbers], offsets[numbers + 1], strict=True)]

    def padded(self, row_numbers: np.ndarray, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return `row_numbers` as int64 ids [n, tokens] and mask [n, tokens] (1 at tokens), cut to the longest of
        them."""
        numbers = np.asarray(row_numbers, np.int64)
        if len(numbers):
            check_rows(int(numbers.min()), int(numbers.max()), len(self))
        lengths = self.lengths[numbers]
        column = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = column < lengths[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = self._ragged.values[(self._ragged.offsets[numbers][:, None] + column)[mask]]
        return ids, mask.astype(np.int64)


def write_tokens(directory: str | Path, name: str, rows: Iterable[Sequence[int]]) -> None:
    """Write a whole token table."""
    with RaggedWriter(directory, name, "int32") as writer:
        for row in rows:
            writer.append([row])


def map_array(path: Path, dtype: str) -> np.ndarray:
    """Map a file as a read-only array; an empty file, which cannot be mapped, becomes an empty array."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def check_rows(first: int, last: int, num_rows: int) -> None:
    """Raise IndexError unless 0 <= first and last < num_rows."""
    if first < 0 or last >= num_rows:
        raise IndexError(f"row numbers {first} to {last} asked for, but there are rows 0 to {num_rows - 1}")
