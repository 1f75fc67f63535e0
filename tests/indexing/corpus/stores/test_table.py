"""Ragged tables: what was written comes back; a full disk is an error."""

import errno
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.stores.table import Ragged, RaggedWriter, TokenTable


def write(directory: Path, rows: list[list[int]]) -> TokenTable:
    with RaggedWriter(directory, "t", "int32") as writer:
        writer.append(rows[:2])
        writer.append([])
        writer.append(rows[2:])
    return TokenTable(directory, "t")


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [4], [5, 6]]
    table = write(tmp_path, rows)
    assert len(table) == 4
    assert table.lengths.tolist() == [3, 0, 1, 2]
    found = table.rows([3, 0, 1, 3])
    assert [row.tolist() for row in found] == [[5, 6], [1, 2, 3], [], [5, 6]]
    assert all(row.dtype == np.int32 for row in found)
    assert table.rows([]) == []


def test_padded(tmp_path: Path) -> None:
    table = write(tmp_path, [[1, 2, 3], [], [4], [5, 6]])
    ids, mask = table.padded(np.array([2, 3, 1]), pad_id=9)
    assert ids.tolist() == [[4, 9], [5, 6], [9, 9]]
    assert mask.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert (ids.dtype, mask.dtype) == (np.int64, np.int64)


def test_empty_table(tmp_path: Path) -> None:
    assert len(write(tmp_path, [])) == 0


def test_text(tmp_path: Path) -> None:
    with RaggedWriter(tmp_path, "t", "uint8") as writer:
        writer.append(["é".encode(), b"", b"abc"])
    table = Ragged(tmp_path, "t", "uint8")
    assert [table.text(row) for row in range(3)] == ["é", "", "abc"]


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_outside_are_refused(tmp_path: Path, row: int) -> None:
    table = write(tmp_path, [[1], [2], [3], [4]])
    for ask in (table.rows, table.padded):
        with pytest.raises(IndexError, match="rows 0 to 3"):
            ask(np.array([row]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_full_disk_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "t.values").symlink_to("/dev/full")

    def fill() -> None:
        with RaggedWriter(tmp_path, "t", "int32") as writer:
            for _ in range(100):
                writer.append([[1] * 10_000])

    with pytest.raises(OSError, match=r"t\.values") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
