"""Keeps the changes of a live corpus: an append-only log of numbered versions beside a base store that never changes.

    corpus/versions/version-000001.json    what the first change did; written last, by one rename
    corpus/segments/segment-000001/        a small passage store: the passages that this change brought
    corpus/lock                            held while a change is written

Passages of the base have numbers 0 to n - 1; those of the segments go on from there, in the order of the versions. A
number, once given, always means the same text. Deleting a passage takes its number away for ever (a tombstone);
updating one does the same and gives its new text a new number. Version v is the base with changes 1 to v; version 0 is
the base alone. Each version names the checksum of the one before it, so that a log cannot be put together from two.

Who produces: one writer at a time, under the lock (`indexing/corpus/stores/live_store.py`). It writes the segment first
and the version last: killed in between, it leaves a segment that nobody names and the next change replaces. Who
consumes: everybody who sees the folder, through `refresh`, which looks for the next version's file and waits for
nothing.
"""

import fcntl
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.snapshot import TornSnapshot, write_file

FORMAT = 1
POLL_S = 0.05  # Seconds between two attempts to take the lock of the log


@dataclass(frozen=True, kw_only=True)
class Change:
    """The changes that one version made."""

    version: int
    first: int  # number of the first passage that it brought
    num_added: int
    deleted: np.ndarray  # int64: numbers that it took away, also those of replaced texts
    replaces: np.ndarray  # int64 [num_added]: number whose text each new passage replaces; -1: none
    checksum: str

    @property
    def segment(self) -> str:
        """Return the name of the segment's folder."""
        return f"segment-{self.version:06d}"


class ChangeLog:
    """The versions of one corpus folder; `fingerprint` and `num_base` are those of the base store."""

    def __init__(self, folder: str | Path, fingerprint: str, num_base: int) -> None:
        """Read all versions. A folder that does not exist is a corpus without changes. Raises the errors of `refresh`,
        and TornSnapshot if a version is missing before others."""
        self.folder = Path(folder)
        self.fingerprint, self.num_base = fingerprint, num_base
        self.changes: list[Change] = []
        self.deleted = np.empty(0, np.int64)  # int64: numbers taken away by all versions, sorted
        self._when = np.empty(0, np.int64)  # int64: version that took each of them away
        self._reading = threading.RLock()  # several threads of a process share a log
        names = [path.stem.removeprefix("version-") for path in (self.folder / "versions").glob("version-*.json")]
        self.refresh()  # after the names were listed: a version written meanwhile is no gap
        if self.version < max((int(name) for name in names if name.isdigit()), default=0):
            raise TornSnapshot(str(self.path(self.version + 1)), "it is missing, but later versions are there")

    @property
    def version(self) -> int:
        """Return the newest version that was read."""
        return len(self.changes)

    def path(self, version: int) -> Path:
        """Return the file of a version."""
        return self.folder / "versions" / f"version-{version:06d}.json"

    def segment_path(self, change: Change) -> Path:
        """Return the folder with the passages of a change."""
        return self.folder / "segments" / change.segment

    def refresh(self) -> bool:
        """Read the versions that were written since and return True if there were any.

        Raises TornSnapshot for a damaged version and ValueError for one of another base corpus.
        """
        with self._reading:
            before = self.version
            while True:
                try:
                    raw = self.path(self.version + 1).read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    break
                self._take(self._parse(raw))
            return self.version > before

    def num_numbers(self, version: int | None = None) -> int:
        """Return the number of passage numbers given up to `version` (default: the newest); they count from 0."""
        last = self.version if version is None else version
        return self.num_base if not last else self.changes[last - 1].first + self.changes[last - 1].num_added

    def num_living(self, version: int | None = None) -> int:
        """Return the number of passages that version `version` (default: the newest) has."""
        return self.num_numbers(version) - len(self.deleted_at(version))

    def deleted_at(self, version: int | None = None) -> np.ndarray:
        """Return the sorted numbers that were taken away up to `version` (default: the newest)."""
        with self._reading:
            return self.deleted if version is None else self.deleted[self._when <= version]

    def is_living(self, numbers: np.ndarray) -> np.ndarray:
        """Return bool, in the shape of `numbers`: True for numbers that were given and not taken away."""
        return (numbers >= 0) & (numbers < self.num_numbers()) & ~contains(self.deleted, numbers)

    def owned(self, shard: int, num_shards: int, start: int, stop: int, version: int) -> np.ndarray | None:
        """Return the sorted living numbers of one shard at `version`: its range of the base, and every `num_shards`-th
        of the added passages. None stands for exactly `start` to `stop` - 1."""
        extra = np.arange(self.num_base + shard, self.num_numbers(version), num_shards)
        numbers = np.concatenate([np.arange(start, stop), extra])
        numbers = numbers[~contains(self.deleted_at(version), numbers)]
        whole = len(numbers) == stop - start and (not len(numbers) or numbers[-1] == stop - 1)
        return None if whole else numbers

    def added_between(self, before: int, version: int) -> np.ndarray:
        """Return the numbers that versions `before` + 1 to `version` brought and that are living at `version`."""
        numbers = np.arange(self.num_numbers(before), self.num_numbers(version))
        return numbers[~contains(self.deleted_at(version), numbers)]

    @contextmanager
    def locked(self, timeout_s: float) -> Iterator[None]:
        """Hold the folder's lock while the block runs, with all versions read. Raises TimeoutError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        with (self.folder / "lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"another change of {self.folder} has been under way for {timeout_s:g} s: try again later"
                        ) from None
                    time.sleep(POLL_S)
            self.refresh()
            yield

    def append(self, num_added: int, deleted: np.ndarray, replaces: np.ndarray) -> Change:
        """Write the next version; the change is made when this returns. Call with the lock held."""
        change = Change(
            version=self.version + 1,
            first=self.num_numbers(),
            num_added=num_added,
            deleted=np.unique(deleted),
            replaces=replaces,
            checksum="",
        )
        rest: dict[str, Any] = {
            "format": FORMAT,
            "version": change.version,
            "base": self.fingerprint,
            "num_base": self.num_base,
            "previous": self.changes[-1].checksum if self.changes else "",
            "first": change.first,
            "num_added": num_added,
            "deleted": change.deleted.tolist(),
            "replaces": replaces.tolist(),
        }
        self.path(change.version).parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path(change.version), [_serialise(rest)])
        self.refresh()
        return self.changes[-1]

    def _parse(self, raw: bytes) -> Change:
        path = self.path(self.version + 1)
        try:
            found = json.loads(raw)
            good = isinstance(found, dict) and _serialise(found) == raw
        except ValueError:  # neither JSON nor UTF-8
            good, found = False, {}
        if not good or found.get("format") != FORMAT or found.get("version") != self.version + 1:
            raise TornSnapshot(str(path), "it differs from its checksum, or is of another format")
        if (found["base"], found["num_base"]) != (self.fingerprint, self.num_base):
            raise ValueError(f"{self.folder} holds changes of another corpus than this run's: it cannot be used here")
        if found["previous"] != (self.changes[-1].checksum if self.changes else ""):
            raise TornSnapshot(str(path), f"it does not follow {self.path(self.version).name}")
        deleted, replaces = (np.array(found[name], np.int64) for name in ("deleted", "replaces"))
        return Change(
            version=found["version"],
            first=found["first"],
            num_added=found["num_added"],
            deleted=deleted,
            replaces=replaces,
            checksum=found["sha256"],
        )

    def _take(self, change: Change) -> None:
        numbers = np.concatenate([self.deleted, change.deleted])
        when = np.concatenate([self._when, np.full(len(change.deleted), change.version)])
        order = np.argsort(numbers, kind="stable")
        self.deleted, self._when = numbers[order], when[order]
        self.changes.append(change)


def contains(ordered: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return bool, in the shape of `numbers`: True for those in the sorted array `ordered`."""
    if not len(ordered):
        return np.zeros(np.shape(numbers), bool)
    places = np.minimum(np.searchsorted(ordered, numbers), len(ordered) - 1)
    return ordered[places] == numbers


def _serialise(version: dict[str, Any]) -> bytes:
    """Return JSON with sorted keys, and under "sha256" the checksum of the rest."""
    rest = {key: value for key, value in version.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**rest, "sha256": digest}, sort_keys=True) + "\n").encode()
