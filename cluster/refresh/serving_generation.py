"""The generation that answers searches: what it is, which number the next one gets, and how all shards switch to it.

The coordinator, the repair and the changes of the corpus share one `ServingGeneration`. Its lock is held for moments
only, never while a shard is asked.
"""

import threading
import time
from dataclasses import replace

from cluster.refresh.ports import Events, Serving, ShardPort, Weights
from cluster.refresh.shards import ShardGroup, figures_of
from cluster.refresh.snapshots import Snapshots
from indexing.dense.probe import UNKNOWN, Figures
from indexing.shard.shard import Shard


class ServingGeneration:
    """Owns the record of which generation serves. Callers of `switch` and `commit_derived` hold the coordinator's lock
    `changing`, so that commits take turns."""

    def __init__(self, shards: ShardGroup, snapshots: Snapshots, events: Events, first_generation: int) -> None:
        self._shards, self._snapshots, self._events = shards, snapshots, events
        self._lock = threading.Lock()
        self._next_number = first_generation
        self._oldest_version, self._figures = -1, UNKNOWN
        self.now: Serving | None = None
        self.replaced_at = 0.0  # s, of time.monotonic: when the last switch was done

    @property
    def number(self) -> int:
        """Return the number of the generation that serves, -1 without one."""
        serving = self.now
        return serving.generation if serving else -1

    def view(self) -> tuple[Serving | None, int, Figures]:
        """Return what serves, the weights version of its passage that was encoded longest ago, and its figures."""
        with self._lock:
            return self.now, self._oldest_version, self._figures

    def next_number(self) -> int:
        """Return a number for a new generation, another one at each call."""
        with self._lock:
            number, self._next_number = self._next_number, self._next_number + 1
        return number

    def take_over(self, serving: Serving | None, next_number: int) -> None:
        """Begin with what the shards serve already."""
        oldest, figures = (-1, UNKNOWN) if serving is None else self._look_at(serving)
        with self._lock:
            self.now, self._next_number = serving, next_number
            self._oldest_version, self._figures = oldest, figures

    def switch(self, new: Serving) -> None:
        """Commit a generation, which all shards have prepared, on each of them. A shard that dies meanwhile is left to
        the repair."""
        self._shards.each(lambda shard: shard.call(Shard.commit, new.generation))
        oldest, figures = self._look_at(new)
        with self._lock:
            self.now, self._oldest_version, self._figures = new, oldest, figures
            self.replaced_at = time.monotonic()

    def commit_derived(self, new: Serving, event: str, fields: dict[str, object]) -> None:
        """Switch every shard to a generation that shares the big indexes of the serving one; if `new` is the serving
        one, note that it belongs to a newer corpus. Report it as `event`."""
        if self.now is not None and new.generation != self.now.generation:
            self.clear(keep=self._snapshots.pending(), abort=False)
            self.switch(new)
            self._snapshots.want(new, derived=True)
        else:
            with self._lock:
                self.now = new
        self._events(event, generation=new.generation, weights_version=new.weights_version, **fields)

    def abort(self, generation: int) -> None:
        """Drop what is staged of a generation on every shard that answers."""
        self._shards.each(lambda shard: shard.call(Shard.abort, generation))

    def clear(self, keep: set[int], abort: bool) -> None:
        """Release the generations older than the serving one, except `keep`; with `abort`, also drop what is staged of
        another generation that was to be built."""
        serving = self.number

        def clear_one(shard: ShardPort) -> None:
            status = shard.status()
            if abort and status.building is not None and status.building.generation != serving:
                shard.call(Shard.abort, status.building.generation)
            for generation in status.generations:
                if generation < serving and generation not in keep:
                    shard.call(Shard.release, generation)

        self._shards.each(clear_one)

    def weights(self, serving: Serving) -> Weights | None:
        """Return the weights of the serving generation, read from its snapshot if this process was not given them; None
        if there are none."""
        if serving.weights is not None:
            return serving.weights
        found = self._snapshots.weights(serving.generation, serving.weights_version)
        with self._lock:
            if found is not None and self.now is serving:
                self.now = replace(serving, weights=found)
        return found

    def _look_at(self, serving: Serving) -> tuple[int, Figures]:
        """Return the weights version of the passage that was encoded longest ago, and the figures of a generation, from
        the shards that have it. A shard that was lost is given all its passages from the snapshot, or anew from newer
        weights."""
        there = self._shards.serving(serving.generation)
        oldest = min((status.oldest_version for status in there), default=serving.weights_version)
        return oldest, figures_of(there)
