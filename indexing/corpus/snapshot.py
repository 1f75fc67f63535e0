"""Writes and verifies directories that are shared through a disk: contents first, a checksummed manifest last.

A reader ignores a directory without a manifest and refuses one whose contents differ from it by a single bit. A
subdirectory with a manifest of its own (a shard inside a generation) is covered by that manifest.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
FORMAT = 1


class TornSnapshot(Exception):
    """The error for a directory that is incomplete or damaged, which must not be read."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{self.path} is incomplete or damaged: {self.why}"


def write_manifest(directory: str | Path, extra: dict[str, Any]) -> None:
    """Seal `directory`: flush its files, then write size and SHA-256 of each, with `extra`, atomically.

    Raises OSError with the path if the disk is full, ValueError if `extra` is no JSON or a manifest exists.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        raise ValueError(f"{directory} already has a {MANIFEST}: a snapshot is written once")
    for leftover in directory.rglob(".*.tmp"):  # files that a killed writer left
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    files = {}
    for path in _covered(directory):
        with named_errors(path), path.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(directory).as_posix()] = {"bytes": size, "sha256": digest}
    for folder in {(directory / name).parent for name in files}:
        sync_directory(folder)
    write_file(directory / MANIFEST, [_serialise({"format": FORMAT, "files": files, "extra": extra})])


def verify(directory: str | Path, contents: bool = True) -> dict[str, Any]:
    """Check `directory` against its manifest and return the manifest's `extra`.

    `contents` False compares names and sizes only (quick; enough that reading a memory map cannot fault).
    Raises TornSnapshot for a missing or altered manifest and for a missing, additional, cut or altered file.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    files: dict[str, dict[str, Any]] = manifest["files"]
    present = {path.relative_to(directory).as_posix(): path for path in _covered(directory)}
    if missing := sorted(files.keys() - present.keys()):
        raise TornSnapshot(str(directory), f"{missing[0]} is missing ({len(missing)} files)")
    if surplus := sorted(present.keys() - files.keys()):
        raise TornSnapshot(str(directory), f"{surplus[0]} is not in the manifest ({len(surplus)} files)")
    for name, path in present.items():
        with named_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != files[name]["bytes"]:
                raise TornSnapshot(str(directory), f"{name} has {size} bytes instead of {files[name]['bytes']}")
            nested = path.name == MANIFEST
            if (contents or nested) and hashlib.file_digest(file, "sha256").hexdigest() != files[name]["sha256"]:
                raise TornSnapshot(str(directory), f"{name} differs from its checksum")
        if nested:
            verify(path.parent, contents)
    return manifest["extra"]


def is_complete(directory: str | Path) -> bool:
    """Return True if `directory` has a manifest and all files have their size; contents are not read."""
    try:
        verify(directory, contents=False)
    except TornSnapshot:
        return False
    return True


@contextmanager
def write_once(final: str | Path, extra: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary directory beside `final`; at the end of the block it is sealed with a manifest and renamed to
    `final`.

    `extra` may be filled inside the block. After an exception nothing remains. Raises FileExistsError if `final`
    exists, OSError with the path if the disk is full.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "already exists, and is written once", str(final))
    temporary = final.parent / f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_manifest(temporary, extra)
        try:
            temporary.rename(final)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(final)) from error
        sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | Path, chunks: Iterable[bytes | np.ndarray]) -> None:
    """Write a whole file under a temporary name, flush it to the disk, rename it. OSError names the path."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with named_errors(path), temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).data)
            file.flush()
            os.fsync(file.fileno())
        with named_errors(path):
            temporary.rename(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def complete_directories(
    parent: str | Path, prefix: str, warn: Callable[[str], None], contents: bool = True
) -> Iterator[tuple[int, Path]]:
    """Yield every `PREFIX<number>` in `parent` whose contents match its manifest, newest (largest number) first; each
    is read when it is its turn.

    `warn` is called with a message about each directory that is refused. `contents` False compares sizes only. A parent
    that does not exist has none.
    """
    for number, path in _numbered(Path(parent), prefix):
        try:
            verify(path, contents)
        except TornSnapshot as torn:
            warn(str(torn))
        else:
            yield number, path


def newest_complete(
    parent: str | Path, prefix: str, warn: Callable[[str], None], contents: bool = True
) -> tuple[int, Path] | None:
    """Return the newest of `complete_directories`; older ones are not read."""
    return next(complete_directories(parent, prefix, warn, contents), None)


def prune(parent: str | Path, prefix: str, keep: int, protected: Sequence[int] = ()) -> list[Path]:
    """Remove all but the `keep` newest complete directories and the `protected` numbers; return what was removed.

    Incomplete directories older than the newest complete one are removed too; a newer one may still be under way.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: allowed is 1 or more")
    numbered = _numbered(Path(parent), prefix)
    complete = [number for number, path in numbered if (path / MANIFEST).is_file()]
    kept = {*complete[:keep], *protected}
    removed = []
    for number, path in numbered:
        if number in kept or not complete or number > complete[0]:
            continue
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed directory is incomplete
        shutil.rmtree(path)
        removed.append(path)
    return removed


def sync_directory(directory: str | Path) -> None:
    """Flush the names in `directory` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbered(parent: Path, prefix: str) -> list[tuple[int, Path]]:
    """Return (number, path) of each directory `PREFIX<number>`, largest number first."""
    if not parent.is_dir():
        return []
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    matches = [(pattern.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _covered(directory: Path) -> Iterator[Path]:
    """Return the files that the manifest of `directory` names: all, but of a sealed subdirectory only its manifest."""
    for path in sorted(directory.iterdir()):
        if not path.is_dir():
            if path.name != MANIFEST:
                yield path
        elif (path / MANIFEST).is_file():
            yield path / MANIFEST
        else:
            yield from _covered(path)


def _serialise(manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest: JSON with sorted keys, and under "sha256" the checksum of the rest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**rest, "sha256": digest}, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        raw = (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise TornSnapshot(str(directory), f"no {MANIFEST}") from None
    try:
        manifest = json.loads(raw)
    except ValueError:  # neither JSON nor UTF-8
        manifest = None
    if not isinstance(manifest, dict) or _serialise(manifest) != raw:
        raise TornSnapshot(str(directory), f"{MANIFEST} differs from its checksum")
    if manifest["format"] != FORMAT:
        raise TornSnapshot(str(directory), f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError of the block, for instance of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
