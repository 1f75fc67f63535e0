"""Index generations on disk: `index/generation-N/`, written by the shards, sealed with a manifest by the coordinator.

Producers of wishes: every commit, and the end of a stage (`save_generation`). Consumer: one thread that calls `work`;
each shard then writes its own files, and no search waits for that. A torn or failed snapshot is never read: the
directory gets its name and manifest at the end. Generations that checkpoints name are protected from pruning, also
after a restart of the coordinator (`index/protected.json`)."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.refresh.ports import Events, Serving, ShardLost, Weights
from cluster.refresh.shards import ShardGroup
from indexing.corpus.snapshot import (
    MANIFEST,
    TornSnapshot,
    complete_directories,
    is_complete,
    prune,
    verify,
    write_file,
    write_once,
)
from indexing.corpus.stores.changes import ChangeLog
from indexing.shard.reshard import check_ranges
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import Shard

PREFIX = "generation-"
WEIGHTS, WEIGHTS_FILE = "weights", "weights.npz"  # folder and file in it
FAILURES = 3  # of one generation, before its snapshot is given up


@dataclass(frozen=True, kw_only=True)
class IndexIdentity:
    """Properties that an index on disk must share with the run that loads it."""

    encoder_fingerprint: str  # of the encoder's settings and its tokeniser, without the weights
    corpus_fingerprint: str
    factory: str
    ranges: tuple[tuple[int, int], ...]  # passage numbers of each shard; another number of shards may be loaded
    lexical: str = ""  # the lexical index that is searched beside it; not compared: any of this corpus fits


@dataclass(frozen=True)
class Wish:
    """A generation to be written."""

    generation: int
    weights_version: int
    corpus_version: int = 0


def check_snapshot(directory: str | Path, identity: IndexIdentity, log: ChangeLog | None = None) -> Wish:
    """Return the generation and weights version of a snapshot that fits `identity` and the changes in `log` (None:
    none).

    Names and sizes are compared here; the contents by each shard, of what it loads. Raises TornSnapshot for an
    incomplete one, ValueError for another index.
    """
    extra = verify(directory, contents=False)
    wanted = {**asdict(identity), "ranges": [list(pair) for pair in identity.ranges]}
    found = {name: extra.get(name) for name in wanted}
    reasons = {
        "encoder_fingerprint": "another encoder or tokeniser",
        "corpus_fingerprint": "another corpus",
        "factory": f"index.factory={found['factory']} instead of {identity.factory}",
    }
    for name, reason in reasons.items():
        if found[name] != wanted[name]:
            raise ValueError(f"index {directory} was built with {reason}: it cannot serve this run")
    if found["ranges"] != wanted["ranges"]:  # each shard takes over what others saved
        ranges = [(int(start), int(stop)) for start, stop in found["ranges"] or ()]
        check_ranges(ranges, identity.ranges, identity.factory, directory)
    corpus_version = int(extra.get("corpus_version", 0))
    if corpus_version and extra["corpus_checksum"] != checksum_of(log, corpus_version):
        raise ValueError(f"index {directory} was built with changes of the corpus that this run does not have")
    return Wish(int(extra["generation"]), int(extra["weights_version"]), corpus_version)


def fits_changes(directory: Path, log: ChangeLog) -> bool:
    """Return True if a snapshot is complete and all changes of the corpus that it was built with are in `log`."""
    try:
        extra = verify(directory, contents=False)
    except TornSnapshot:
        return False
    version = int(extra.get("corpus_version", 0))
    return not version or extra["corpus_checksum"] == checksum_of(log, version)


def checksum_of(log: ChangeLog | None, version: int) -> str:
    """Return the checksum of the changes up to `version`; empty for version 0, and for one that is not in the log."""
    return log.changes[version - 1].checksum if log is not None and 0 < version <= log.version else ""


class Snapshots:
    """Writes, finds and prunes the generations of one run."""

    def __init__(
        self,
        directory: str | Path,
        shards: ShardGroup,
        *,
        identity: IndexIdentity,
        events: Events,
        keep: int,
        keep_protected: int,
        log: ChangeLog,
        write_weights: Callable[[Weights, Path], None] | None = None,
        read_weights: Callable[[int, int, Path], Weights] | None = None,
    ) -> None:
        """`log`: the changes of the corpus. `write_weights` and `read_weights` (None: weights are not kept) write those
        that a generation was encoded with to one file beside it, and read them back; they raise OSError."""
        self.directory = Path(directory)
        self._shards = shards
        self._identity = identity
        self._events = events
        self._keep = keep
        self._keep_protected = keep_protected
        self._log, self._write_weights, self._read_weights = log, write_weights, read_weights
        self._lock = threading.Lock()
        self._weights: dict[int, Weights] = {}  # of generations that are still to be written
        self._derived: set[int] = set()  # wishes that a newer generation makes needless
        self._writing = -1
        self._wishes: dict[int, Wish] = {}
        self._attempts: Counter[int] = Counter()
        self._postponed: set[int] = set()
        self._refused: set[str] = set()  # reasons that were reported
        self._late: set[tuple[int, int]] = set()  # shard and generation of saves that were reported as late
        self._failures: dict[int, str] = {}
        self._protected = self._read_protected()

    def path(self, generation: int) -> Path:
        """Return the directory of a generation, which need not exist."""
        return self.directory / f"{PREFIX}{generation}"

    def saved(self, generation: int) -> bool:
        """Return True if a generation is on disk, with a manifest and all files in their size."""
        return is_complete(self.path(generation))

    def on_disk(self, first: int = 0) -> Iterator[Wish]:
        """Yield the generations on disk, from number `first` on, that fit this run by names and sizes, newest first.
        Their contents are compared by the shard that loads them."""
        for number, path in complete_directories(self.directory, PREFIX, self.refuse, contents=False):
            if number < first:
                return
            try:
                yield check_snapshot(path, self._identity, self._log)
            except ValueError as error:
                self.refuse(str(error))

    def refuse(self, why: str) -> None:
        """Report a snapshot that is not used; each reason once."""
        if why not in self._refused:
            self._refused.add(why)
            self._events("snapshot_refused", why=why)

    def want(self, serving: Serving, derived: bool = False, asked: bool = False) -> None:
        """Ask for a snapshot; `work` writes it. A `derived` one is not needed any more when the next one is wanted,
        unless somebody asked for it by its number."""
        generation = serving.generation
        with self._lock:
            if self.saved(generation):
                return
            if derived:
                for older in [g for g in self._derived if g < generation and g != self._writing]:
                    self._wishes.pop(older, None)
                    self._weights.pop(older, None)
                    self._derived.discard(older)
                self._derived.add(generation)
            if asked:
                self._derived.discard(generation)
            self._wishes[generation] = Wish(generation, serving.weights_version, serving.corpus_version)
            if serving.weights is not None:
                self._weights[generation] = serving.weights

    def keep_wish(self, generation: int) -> None:
        """Somebody asked for this generation: it is written also when a newer one is wanted."""
        with self._lock:
            self._derived.discard(generation)

    def weights(self, generation: int, version: int) -> Weights | None:
        """Return the weights of a generation from its snapshot; None if it has none."""
        path = self.path(generation) / WEIGHTS
        if self._read_weights is None or not self.saved(generation):
            return None
        try:
            return self._read_weights(version, int(verify(path)["publish_id"]), path / WEIGHTS_FILE)
        except (TornSnapshot, OSError) as error:
            self._events("weights_refused", why=str(error))
            return None

    def pending(self) -> set[int]:
        """Return the generations that are still to be written: shards keep them open."""
        with self._lock:
            return set(self._wishes)

    def forget(self, before: int) -> None:
        """Drop wishes for generations before this one, which are about to be closed."""
        with self._lock:
            late = [generation for generation in self._wishes if generation < before]
            for generation in late:
                del self._wishes[generation]
                self._weights.pop(generation, None)
                self._derived.discard(generation)
                self._failures[generation] = "it was replaced before it was on disk"
        for generation in late:
            self._events("snapshot_failed", generation=generation, why=self._failures[generation])

    def failure(self, generation: int) -> str | None:
        """Return why a generation could not be written; None if nothing is known against it."""
        with self._lock:
            return self._failures.get(generation)

    def protect(self, generation: int) -> None:
        """Keep a generation that a checkpoint names; only the newest few stay protected."""
        with self._lock:
            if generation in self._protected[-1:]:
                return
            self._protected = [g for g in self._protected if g != generation] + [generation]
            self._protected = self._protected[-self._keep_protected :]
            self.directory.mkdir(parents=True, exist_ok=True)
            write_file(self.directory / "protected.json", [json.dumps(self._protected).encode()])

    def work(self) -> bool:
        """Write the oldest wish, unless a shard still writes an earlier one; returns whether there was one to write."""
        if not self.pending() or self._is_late():
            return False
        with self._lock:
            if not self._wishes:
                return False
            wish = self._wishes[min(self._wishes)]
            self._writing = wish.generation
        try:
            self._write(wish)
        except (ShardLost, GenerationGone) as lost:
            if isinstance(lost, GenerationGone) and lost.committed >= 0:  # released meanwhile
                self._count_failure(wish, str(lost))
            elif wish.generation not in self._postponed:  # the shard comes back, empty, and is then repaired
                self._postponed.add(wish.generation)
                self._events("snapshot_postponed", generation=wish.generation, why=str(lost))
        except (OSError, ValueError) as error:  # disk full
            self._count_failure(wish, str(error))
        else:
            with self._lock:
                self._wishes.pop(wish.generation, None)
                self._weights.pop(wish.generation, None)
                self._derived.discard(wish.generation)
                self._failures.pop(wish.generation, None)
                protected = tuple(self._protected)
            prune(self.directory, PREFIX, self._keep, protected)
        finally:
            self._writing = -1
        return True

    def tidy(self) -> None:
        """Remove what a killed coordinator, or a shard that was given up, left half-written."""
        for leftover in self.directory.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _is_late(self) -> bool:
        """Return True while a shard still writes what was given up: a second save beside it would only be slower."""
        saves = {
            (number, step.generation): step
            for number, status in self._shards.statuses().items()
            for step in (() if status is None else status.steps)
            if step.name == "save"
        }
        for number, generation in saves.keys() - self._late:
            self._events("snapshot_waits", why=f"shard {number} still {saves[number, generation]}")
        self._late = set(saves)
        return bool(saves)

    def _write(self, wish: Wish) -> None:
        if self.saved(wish.generation):
            return
        self.tidy()  # of a save that was given up, and has ended since
        target = self.path(wish.generation)
        shutil.rmtree(target, ignore_errors=True)  # torn: it would have been found complete
        extra = {**asdict(self._identity), "generation": wish.generation, "weights_version": wish.weights_version}
        version = wish.corpus_version
        extra |= {"corpus_version": version, "corpus_checksum": checksum_of(self._log, version)}
        earlier = self._newest_on_disk()  # where it shares its big indexes with this one, they are linked
        with write_once(target, extra) as directory, ThreadPoolExecutor(len(self._shards)) as threads:
            list(
                threads.map(
                    lambda shard: shard.call(Shard.save, wish.generation, str(directory), earlier), self._shards
                )
            )
            self._save_weights(wish, directory, earlier)

    def _newest_on_disk(self) -> str | None:
        """Return the newest generation that seems to be there."""
        paths = [path for path in self.directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
        paths = [path for path in paths if (path / MANIFEST).is_file()]
        return str(max(paths, key=lambda path: int(path.name.removeprefix(PREFIX)))) if paths else None

    def _save_weights(self, wish: Wish, directory: Path, earlier: str | None) -> None:
        """Write the weights of the generation, so that a service that starts from it can encode further passages."""
        with self._lock:
            weights = self._weights.get(wish.generation)
        target = directory / WEIGHTS
        if earlier is not None and _link_weights(Path(earlier) / WEIGHTS, target, wish, weights):
            return
        if weights is not None and self._write_weights is not None and weights.version == wish.weights_version:
            extra = {"weights_version": weights.version, "publish_id": weights.publish_id}
            with write_once(target, extra) as temporary:
                self._write_weights(weights, temporary / WEIGHTS_FILE)

    def _count_failure(self, wish: Wish, why: str) -> None:
        with self._lock:
            self._attempts[wish.generation] += 1
            self._failures[wish.generation] = why
            if self._attempts[wish.generation] >= FAILURES:
                self._wishes.pop(wish.generation, None)
                self._weights.pop(wish.generation, None)
        self._events("snapshot_failed", generation=wish.generation, why=why)

    def _read_protected(self) -> list[int]:
        path = self.directory / "protected.json"
        return [int(number) for number in json.loads(path.read_text())] if path.exists() else []


def _link_weights(source: Path, target: Path, wish: Wish, weights: Weights | None) -> bool:
    """Give the weights of another generation a second name, if they are those of `wish`; whether they are."""
    try:
        found = verify(source, contents=False)
        if weights is None or (found["weights_version"], found["publish_id"]) != (
            wish.weights_version,
            weights.publish_id,
        ):
            return False
        target.mkdir()
        for file in source.iterdir():
            os.link(file, target / file.name)
    except (TornSnapshot, OSError):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True
