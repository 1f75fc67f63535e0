"""A corpus that changes while it is served: what is deleted is hidden at once, what is new is encoded and committed.

The truth is the log on disk (`indexing/corpus/stores/changes.py`): whoever changes the corpus appends to it, and
nothing else. The coordinator follows the log. For each new version, or several at once:
1. What was deleted is hidden on every shard, in every generation that it serves or will ever serve, whole ones under
   way included; a shard that is lost is awaited, and one that comes back is told before it is given a generation again.
2. What was added is encoded with the serving generation's own weights, before the chunks of a refresh, and a new
   generation is derived from the serving one, prepared on all shards and committed on all: the same two phases as of a
   refresh (`cluster/refresh/coordinator.py`), at the cost of the added passages alone.
3. `corpus/serving.json` says which version is served. Whoever made the change waits for that.

A coordinator that dies in between leaves the log as it is; the next one follows it. Who waits for whom: one thread
calls `hide` and `add`; it waits for shards and workers, each bounded by its port, and for the end of another commit.
`encode_again` is for whoever wants single passages fresher. `add`, `encode_again` and `caught_up` take turns: their
callers hold the coordinator's lock `changing` (`RefreshCoordinator.follow_corpus`, `.encode_again` and `._attempt`).
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cluster.refresh.build_generation import Builder
from cluster.refresh.ports import Events, RefreshFailed, Serving, ShardLost, Weights
from cluster.refresh.serving_generation import ServingGeneration
from cluster.refresh.shards import ShardGroup
from indexing.corpus.stores.changes import ChangeLog
from indexing.shard.shard import Shard

SERVING_FILE = "serving.json"
BEAT_S = 1.0  # Seconds between two signs of life for those who wait


@dataclass(frozen=True)
class ServedCorpus:
    """The content of `serving.json`."""

    version: int  # everything up to this change is done: deleted passages are hidden, added ones are found
    generation: int  # that answers; -1: none yet
    num_passages: int
    waits: str = ""  # why a newer version is not served yet


class LiveCorpus:
    """Brings the serving generation up to the newest version of the corpus."""

    def __init__(
        self,
        builder: Builder,
        shards: ShardGroup,
        *,
        serving: ServingGeneration,
        events: Events,
    ) -> None:
        self._builder, self._shards, self._serving, self._events = builder, shards, serving, events
        self.log: ChangeLog = builder.log
        self.hidden = 0  # corpus version up to which all shards have confirmed
        self._without_weights = -1  # the generation whose weights nobody has any more
        self._waits = ""
        self._noted: ServedCorpus | None = None
        self._beat_at = 0.0

    @property
    def served(self) -> ServedCorpus:
        """Return the version of the corpus that is served."""
        serving = self._serving.now
        corpus, generation = (self.log.version, -1) if serving is None else (serving.corpus_version, serving.generation)
        version = min(self.hidden, corpus)
        waits = self._waits if version < self.log.version else ""
        return ServedCorpus(version, generation, self.log.num_living(version), waits)

    @property
    def needs_weights(self) -> bool:
        """True if nobody has the weights to encode added passages with; the next publish then brings them."""
        serving = self._serving.now
        behind = serving is not None and serving.corpus_version < self.log.version
        return behind and serving is not None and serving.generation == self._without_weights

    def is_behind(self) -> bool:
        """Look for new versions on disk; return True if one is not served yet."""
        self.log.refresh()
        return self.served.version < self.log.version

    def hide(self) -> bool:
        """Hide what was deleted up to now on every shard; returns whether all have confirmed."""
        version = self.log.version
        if self.hidden >= version:
            return True
        deleted = self.log.deleted_at(version)
        lost: list[str] = []
        for number, error in self._shards.each(lambda shard: shard.call(Shard.hide, version, deleted)).items():
            if isinstance(error, ShardLost | TimeoutError):
                lost.append(f"shard {number}: {error}")
            elif error is not None:
                raise error
        if lost:
            self._wait(f"deleted passages are not hidden everywhere: {lost[0]}")
            return False
        self.hidden = version
        return True

    def add(self) -> bool:
        """Commit a generation with what was added up to now; returns whether it serves. Hold `changing`."""
        begin, version, serving = time.monotonic(), self.log.version, self._serving.now
        if serving is None or serving.corpus_version >= version:
            self._waits = ""
            return True
        added = self.log.added_between(serving.corpus_version, version)
        deleted = len(self.log.deleted_at(version)) - len(self.log.deleted_at(serving.corpus_version))
        fields: dict[str, object] = {"corpus_version": version, "added": len(added), "deleted": deleted}
        if not len(added):  # the same generation without the deleted ones
            self._serving.commit_derived(
                replace(serving, corpus_version=version), "corpus_changed", {**fields, "seconds": 0.0}
            )
            self._waits = ""
            return True
        weights = self._serving.weights(serving)
        if weights is None:
            self._without_weights = serving.generation
            self._wait("the weights of the serving generation are gone; the next publish brings the added passages")
            return False
        try:
            self._derive(serving, added, weights=weights, corpus_version=version, fields=fields, begin=begin)
        except RefreshFailed as failed:
            self._wait(str(failed))
            return False
        self._waits = ""
        return True

    def encode_again(self, numbers: np.ndarray, weights: Weights, adopt: bool = False) -> int:
        """Commit a generation in which the passages `numbers` are encoded with `weights`, and all others as they were;
        returns its number. Hold `changing`.

        Each hit tells by which weights its passage was encoded (`Hits.versions`). The generation as a whole goes by the
        weights of the serving one, so that `wait_for_version` is not content with it; with `adopt` by `weights`, with
        which passages are encoded from then on that are added, or lost with a shard. Numbers that were deleted, or are
        not served yet, are left out. Raises RefreshFailed; the serving generation goes on then.
        """
        begin, serving = time.monotonic(), self._serving.now
        if serving is None:
            raise RefreshFailed("no generation serves of which passages could be encoded again")
        numbers = np.unique(np.asarray(numbers, np.int64))
        known = numbers < self.log.num_numbers(serving.corpus_version)
        numbers = numbers[known & self.log.is_living(numbers)]
        fields: dict[str, object] = {"passages": len(numbers), "encoded_with": weights.version}
        if adopt:
            kept = replace(serving, weights_version=weights.version, publish_id=weights.publish_id, weights=weights)
        else:
            kept = serving
        self._derive(
            kept,
            numbers,
            weights=weights,
            corpus_version=serving.corpus_version,
            fields=fields,
            begin=begin,
            event="passages_encoded_again",
        )
        new = self._serving.now
        assert new is not None
        return new.generation

    def caught_up(self, whole: Serving, before: Callable[[], None]) -> Serving:
        """Return what to commit in place of a whole generation that is prepared on all shards: itself, or, if passages
        were added since it was begun or another generation was committed, one that is derived from it and prepared too.
        `before` prepares it again where it was lost. Hold `changing`. Raises RefreshFailed."""
        self.log.refresh()
        version, serving = self.log.version, self._serving.now
        added = self.log.added_between(whole.corpus_version, version)
        if not len(added) and (serving is None or serving.generation < whole.generation):
            return replace(whole, corpus_version=version)
        assert whole.weights is not None
        generation = self._serving.next_number()
        self._events("derive_started", generation=generation, origin=whole.generation, passages=len(added))
        weights, number = whole.weights, whole.weights_version
        plan = self._builder.derived(
            generation,
            whole.generation,
            numbers=added,
            weights=weights,
            weights_version=number,
            corpus_version=version,
            before=before,
        )
        try:
            self._builder.build(plan)
        except Exception:
            self._serving.abort(generation)
            raise
        return replace(whole, generation=generation, corpus_version=version)

    def note(self, folder: Path) -> None:
        """Write down what is served, for those who wait for a change; a sign of life now and then."""
        served = self.served
        path = folder / SERVING_FILE
        if served != self._noted:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{SERVING_FILE}")
            partial.write_text(json.dumps(asdict(served)), encoding="utf-8")
            partial.rename(path)
            self._noted, self._beat_at = served, time.monotonic()
        elif time.monotonic() - self._beat_at > BEAT_S:
            os.utime(path)
            self._beat_at = time.monotonic()

    def _derive(
        self,
        serving: Serving,
        numbers: np.ndarray,
        *,
        weights: Weights,
        corpus_version: int,
        fields: dict[str, object],
        begin: float,
        event: str = "corpus_changed",
    ) -> None:
        """Prepare and commit a generation derived from `serving`, which says what the new one goes by. Raises
        RefreshFailed, with nothing left of it."""
        generation = self._serving.next_number()
        self._events("derive_started", generation=generation, origin=serving.generation, passages=len(numbers))
        origin, version = serving.generation, serving.weights_version
        plan = self._builder.derived(
            generation, origin, numbers=numbers, weights=weights, weights_version=version, corpus_version=corpus_version
        )
        try:
            self._builder.build(plan)
        except Exception as error:  # whatever it was, nothing of the generation may stay
            self._serving.abort(generation)
            if isinstance(error, RefreshFailed):
                raise
            raise RefreshFailed(f"{type(error).__name__}: {error}") from error
        new = replace(serving, generation=generation, corpus_version=corpus_version)
        self._serving.commit_derived(new, event, {**fields, "seconds": round(time.monotonic() - begin, 3)})

    def _wait(self, why: str) -> None:
        if why != self._waits:
            self._events("corpus_waits", corpus_version=self.log.version, why=why)
        self._waits = why
