"""Shards that died come back empty; here they are noticed and given the serving generation again.

One thread calls `check` about once a second. A shard that answers without the serving generation gets it, in this
order: committed, if it has it prepared (the commit was interrupted); loaded from the snapshot; encoded again from the
kept weights, before any other chunk. Searches meanwhile wait and try again, bounded by index.search_timeout_s. A shard
that stays silent for `hung_s` is killed, and then found empty.
"""

import time
from collections.abc import Iterable

from cluster.refresh.build_generation import Builder
from cluster.refresh.encode_queue import EncodePool
from cluster.refresh.ports import Events, RefreshFailed, Serving, ShardLost, ShardPort, has_prepared
from cluster.refresh.serving_generation import ServingGeneration
from cluster.refresh.snapshots import Snapshots
from indexing.corpus.snapshot import TornSnapshot
from indexing.shard.serving import MAX_COMMITTED
from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus


class Repair:
    """Keeps the serving generation on every shard."""

    def __init__(
        self,
        shards: Iterable[ShardPort],
        pool: EncodePool,
        *,
        snapshots: Snapshots,
        serving: ServingGeneration,
        events: Events,
        builder: Builder,
        hung_s: float,
    ) -> None:
        self._shards = shards
        self._pool = pool
        self._snapshots = snapshots
        self._serving = serving
        self._events = events
        self._builder = builder
        self._hung_s = hung_s
        self._lost_since: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # shard -> serving generation that it had when last looked at
        self.beyond_repair = False  # a shard lacks the serving generation, and only new weights can help

    def check(self) -> None:
        """Look at every shard once, and repair what can be repaired; a shard that refuses does not keep the others from
        that."""
        beyond_repair = False
        for shard in self._shards:
            begin = time.monotonic()
            try:
                beyond_repair |= not self._look_at(shard)
            except ShardLost as lost:
                self._note_lost(shard, lost, begin)
            except (ValueError, TimeoutError) as error:
                self._events("repair_failed", shard=shard.number, why=str(error))
        self.beyond_repair = beyond_repair

    def _look_at(self, shard: ShardPort) -> bool:
        """Give one shard the serving generation if it lacks it. Returns False if there is nothing to make it from."""
        serving = self._serving.now  # before the status: a commit in between is then seen in both
        status = shard.status()
        self._note_found(shard)
        if serving is None:
            return True
        if serving.generation in status.generations:
            self._seen[shard.number] = serving.generation
            return True
        self._note_empty(shard, serving.generation)
        return self._restore(shard, status, serving)

    def _note_found(self, shard: ShardPort) -> None:
        if (since := self._lost_since.pop(shard.number, None)) is not None:
            self._events("shard_found", shard=shard.number, seconds=round(time.monotonic() - since, 3))

    def _note_empty(self, shard: ShardPort, generation: int) -> None:
        """Tell of a loss that fell between two looks: the shard died and is back already, without what it had."""
        if self._seen.pop(shard.number, None) == generation:
            why = f"back without what it served: {shard.lacking(generation)}"
            self._events("shard_lost", shard=shard.number, why=why)

    def _note_lost(self, shard: ShardPort, lost: ShardLost, since: float) -> None:
        if shard.number not in self._lost_since:
            self._lost_since[shard.number] = since
            self._seen.pop(shard.number, None)
            self._events("shard_lost", shard=shard.number, why=str(lost))
        silent_s = time.monotonic() - self._lost_since[shard.number]
        if lost.silent and silent_s > self._hung_s:
            self._events("shard_killed", shard=shard.number, why=f"silent for {silent_s:.0f} s")
            self._lost_since[shard.number] = time.monotonic()
            shard.restart()

    def _restore(self, shard: ShardPort, status: ShardStatus, serving: Serving) -> bool:
        """Give `shard` the serving generation. Returns False when there is nothing to make it from."""
        begin = time.monotonic()
        self._builder.hide(shard, status)
        source = self._source(shard, status, serving)
        if source is None:
            if not self.beyond_repair:
                self._events("shard_not_restored", shard=shard.number, generation=serving.generation)
            return False
        self._events(
            "shard_restored",
            shard=shard.number,
            generation=serving.generation,
            source=source,
            seconds=round(time.monotonic() - begin, 3),
        )
        return True

    def _source(self, shard: ShardPort, status: ShardStatus, serving: Serving) -> str | None:
        generation = serving.generation
        if has_prepared(status, generation):
            if len(status.generations) >= MAX_COMMITTED:
                shard.call(Shard.release, min(status.generations))
            shard.call(Shard.commit, generation)
            return "prepared"
        if self._snapshots.saved(generation):
            try:
                shard.call(Shard.load, generation, str(self._snapshots.path(generation)))
            except (TornSnapshot, ValueError, OSError) as error:
                self._events("snapshot_refused", why=str(error))
            else:
                return "snapshot"
        if serving.weights is None:
            return None
        try:
            self._pool.claim(shard.number, self._hung_s)
            if (building := shard.status().building) is not None and building.generation != generation:
                shard.call(Shard.abort, building.generation)
            plan = self._builder.whole(generation, serving.weights, serving.corpus_version, urgent=True)
            plan.begin(shard)
            if self._pool.run(generation, serving.weights, plan.chunks(shard), urgent=True):
                raise ShardLost(f"shard {shard.number} died again")
            shard.call(Shard.prepare, generation)
            shard.call(Shard.commit, generation)
        except (RefreshFailed, ValueError) as error:
            self._events("repair_failed", shard=shard.number, why=str(error))
            return None
        return "weights"
