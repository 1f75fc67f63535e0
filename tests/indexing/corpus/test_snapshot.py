"""Snapshots: whole ones verify, every flipped bit, cut, missing or additional file is refused by name."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus import snapshot
from indexing.corpus.snapshot import (
    MANIFEST,
    TornSnapshot,
    complete_directories,
    is_complete,
    newest_complete,
    prune,
    verify,
    write_file,
    write_manifest,
    write_once,
)


def make(path: Path, number: int = 0) -> Path:
    with write_once(path, {"number": number, "text": "é"}) as directory:
        write_file(directory / "one.bin", [bytes(range(64)), np.arange(8)])
        write_file(directory / "empty.bin", [])
        (directory / "sub").mkdir()
        write_file(directory / "sub" / "two.bin", [b"two"])
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = make(tmp_path / "g-1", 1)
    assert verify(path) == {"number": 1, "text": "é"}
    manifest = json.loads((path / MANIFEST).read_bytes())
    assert manifest["files"].keys() == {"one.bin", "empty.bin", "sub/two.bin"}
    assert manifest["files"]["one.bin"]["bytes"] == 64 + 64
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["g-1"]


def test_flipped_bits_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "g-1")
    for file in [path / "one.bin", path / "sub" / "two.bin", path / MANIFEST]:
        whole = file.read_bytes()
        for position in range(0, len(whole), 3):
            bit = 1 << position % 7  # 32 is the case of a letter
            file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            with pytest.raises(TornSnapshot, match="g-1"):
                verify(path)
        file.write_bytes(whole)
    verify(path)


def test_cuts_are_refused_even_without_reading_contents(tmp_path: Path) -> None:
    path = make(tmp_path / "g-1")
    for file in [path / "one.bin", path / "sub" / "two.bin", path / MANIFEST]:
        whole = file.read_bytes()
        for length in [*range(0, len(whole), 7), len(whole) - 1, len(whole) + 1]:
            file.write_bytes((whole + b"\0")[:length])
            assert not is_complete(path)
        file.write_bytes(whole)
    assert is_complete(path)


def test_missing_and_additional_files_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "g-1")
    (path / "extra.bin").touch()
    with pytest.raises(TornSnapshot, match=r"extra\.bin is not in the manifest"):
        verify(path)
    (path / "extra.bin").unlink()
    (path / "empty.bin").unlink()
    with pytest.raises(TornSnapshot, match=r"empty\.bin is missing"):
        verify(path)
    with pytest.raises(TornSnapshot, match=r"no manifest\.json"):
        verify(tmp_path / "nowhere")


def test_sealed_subdirectories_are_covered_by_their_own_manifest(tmp_path: Path) -> None:
    outer = tmp_path / "g-1"
    outer.mkdir()
    inner = make(outer / "shard-0000")
    write_manifest(outer, {"shards": 1})
    assert json.loads((outer / MANIFEST).read_bytes())["files"].keys() == {f"shard-0000/{MANIFEST}"}
    assert verify(outer) == {"shards": 1}
    (inner / "one.bin").write_bytes(b"\1" * 128)
    assert is_complete(outer)
    with pytest.raises(TornSnapshot, match=r"shard-0000.*one\.bin"):
        verify(outer)
    (inner / MANIFEST).unlink()
    assert not is_complete(outer)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_once(tmp_path / "g-1", {}) as directory:
            write_file(directory / "one.bin", [b"1"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_written_once(tmp_path: Path) -> None:
    path = make(tmp_path / "g-1")
    with pytest.raises(FileExistsError, match="g-1"):
        make(path)
    with pytest.raises(ValueError, match="written once"):
        write_manifest(path, {})


def test_leftovers_of_a_killed_writer_are_not_sealed(tmp_path: Path) -> None:
    path = tmp_path / "g-1"
    (path / ".shard-0000.1.abc.tmp").mkdir(parents=True)
    (path / ".shard-0000.1.abc.tmp" / "index").write_bytes(b"half")
    write_file(path / "one.bin", [b"1"])
    write_manifest(path, {})
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "one.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_full_disk_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot.secrets, "token_hex", lambda _: "x")
    (tmp_path / ".one.bin.x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"one\.bin") as caught:
        write_file(tmp_path / "one.bin", [b"1" * 100_000])
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_complete_directories_newest_first_torn_ones_refused_by_name(tmp_path: Path) -> None:
    for number in (1, 2, 10, 11):
        make(tmp_path / f"g-{number}", number)
    (tmp_path / "g-2" / "one.bin").write_bytes(b"0" * 128)
    (tmp_path / "g-11" / MANIFEST).unlink()
    (tmp_path / "g-x").mkdir()
    (tmp_path / "g-12").touch()
    refused: list[str] = []
    assert [number for number, _ in complete_directories(tmp_path, "g-", refused.append)] == [10, 1]
    assert len(refused) == 2
    assert "g-11" in refused[0]
    assert "g-2 " in refused[1]
    assert newest_complete(tmp_path, "g-", refused.append) == (10, tmp_path / "g-10")
    assert len(refused) == 3  # older ones were not read
    assert list(complete_directories(tmp_path / "nowhere", "g-", refused.append)) == []


def test_prune_keeps_the_newest_the_protected_and_what_is_under_way(tmp_path: Path) -> None:
    for number in range(1, 7):
        make(tmp_path / f"g-{number}", number)
    for torn in ("g-0", "g-7"):
        (tmp_path / torn).mkdir()
    removed = prune(tmp_path, "g-", keep=2, protected=[1])
    assert sorted(path.name for path in removed) == ["g-0", "g-2", "g-3", "g-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g-1", "g-5", "g-6", "g-7"]
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, "g-", keep=0)
