"""The refresh contract, and the coordinator that keeps it.

1. The trainer publishes encoder weights version v through Ray's object store and goes on at once.
2. Refresh workers pull chunks of passages from one queue, encode them, hand vectors to the shard that owns them. A
   worker that dies costs its chunk, which another takes.
3. When every shard has staged all its rows of generation g, the coordinator commits: all switch, or none.
4. A query is answered by exactly one generation on every shard. g-1 stays open until no request names it.
5. Training never waits for a refresh, unless refresh.max_staleness_steps is set, and then says so.
6. A failed refresh leaves the old generation serving, is retried, is an event in the metrics, and ends the run only
   when the staleness bound is passed. Nothing hangs: every wait has a bound and a message.
7. When to refresh: every N steps (the training loop decides, by publishing).
8. A newer version that arrives while one is being built is kept, older waiting ones are dropped.

How all or none is kept: `prepare` on every shard builds generation g beside the serving one; only when every shard
reports it as prepared is the commit decided, and a decided commit is driven to its end: a shard that dies in it comes
back empty and is given g by the repair (`cluster/repair.py`). Until the last shard has switched, searches are answered
by g-1, which every living shard still has. Before the decision any failure aborts g everywhere.

Who waits for whom (`cluster/service.py` starts the threads):
- `publish`, `status` and `save_generation` are called by Ray; they take the lock for a moment and never wait.
- The refresh thread waits for a publish, then for workers and shards, each bounded by its port.
- The repair thread ticks about once a second; it may wait for chunks, which it queues before those of a refresh.
- The snapshot thread waits for a commit or a wish, then for the shards' disks.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.chunks import EncodePool, split
from cluster.ports import Events, RefreshFailed, ShardLost, ShardPort, Weights
from cluster.repair import Repair, Serving
from cluster.snapshots import Snapshots, Wish
from indexing.shard import ShardStatus

GRACE_S = 10.0  # that a replaced generation stays open for clients that have not heard of the next one
RETRY_S = 1.0  # before a failed refresh is tried again
POLL_S = 0.2  # while a lost shard is awaited


@dataclass(frozen=True)
class RefreshSettings:
    """The coordinator's share of the settings."""

    chunk_passages: int
    max_failures: int
    chunk_timeout_s: float
    search_timeout_s: float
    first_generation: int  # this service's numbers begin here


@dataclass(frozen=True)
class CoordinatorStatus:
    """What clients poll."""

    generation: int = -1
    weights_version: int = -1
    publish_id: int = 0  # of the serving generation; 0: unknown
    newest_publish_id: int = 0  # that this coordinator has seen
    generations_committed: int = 0
    refresh_seconds: float = 0.0
    refresh_passages_per_s: float = 0.0
    failures: int = 0
    given_up: str = ""  # why the newest publish will not become a generation
    needs_weights: bool = False  # the serving generation cannot be completed without a new publish


class RefreshCoordinator:
    """Turns published weights into committed generations. Knows no Ray: ports stand for the other processes."""

    def __init__(
        self,
        settings: RefreshSettings,
        shards: Sequence[ShardPort],
        pool: EncodePool,
        snapshots: Snapshots,
        keep_weights: Callable[[Weights], Weights],
        events: Events,
    ) -> None:
        """`keep_weights` makes a copy that outlives the trainer; it raises RefreshFailed when the original is gone."""
        self.settings = settings
        self.shards = shards
        self.pool = pool
        self.snapshots = snapshots
        self._keep_weights = keep_weights
        self._events = events
        hung_s = settings.search_timeout_s / 4
        chunk = settings.chunk_passages
        self.repair = Repair(shards, pool, snapshots, lambda: self._serving, events, chunk, hung_s)
        self._changed = threading.Condition()
        self._waiting: Weights | None = None
        self._serving: Serving | None = None
        self._replaced_at = 0.0
        self._next_generation = settings.first_generation
        self._newest_publish_id = 0
        self._given_up = ""
        self._committed = 0
        self._failures = 0
        self._seconds = 0.0
        self._passages_per_s = 0.0

    # What clients ask. Never waits.

    def publish(self, weights: Weights) -> None:
        """Take note of new weights; older ones that still wait are dropped."""
        with self._changed:
            if weights.publish_id <= self._newest_publish_id:
                return  # sent again by a client that was not sure
            dropped, self._waiting = self._waiting, weights
            self._newest_publish_id = weights.publish_id
            self._given_up = ""
            self._changed.notify_all()
        if dropped is not None:
            self._events("publish_dropped", weights_version=dropped.version, newer=weights.version)

    def status(self) -> CoordinatorStatus:
        """The newest state."""
        with self._changed:
            serving = self._serving
            return CoordinatorStatus(
                generation=serving.generation if serving else -1,
                weights_version=serving.weights_version if serving else -1,
                publish_id=serving.publish_id if serving else 0,
                newest_publish_id=self._newest_publish_id,
                generations_committed=self._committed,
                refresh_seconds=self._seconds,
                refresh_passages_per_s=self._passages_per_s,
                failures=self._failures,
                given_up=self._given_up,
                needs_weights=self.repair.beyond_repair,
            )

    def save_generation(self, generation: int) -> str | None:
        """The directory of a generation that is on disk, which is protected from now on; None while it is written.

        Raises ValueError when it is neither open nor on disk, or could not be written.
        """
        snapshots, serving = self.snapshots, self._serving
        if snapshots.saved(generation):
            snapshots.protect(generation)
            return str(snapshots.path(generation))
        if generation in snapshots.pending():
            return None
        if (failure := snapshots.failure(generation)) is not None:
            raise ValueError(f"index generation {generation} could not be saved: {failure}")
        if serving is None or serving.generation != generation:
            now = serving.generation if serving else "none"
            raise ValueError(f"index generation {generation} is neither on disk nor serving (serving: {now})")
        snapshots.want(generation, serving.weights_version)
        return None

    # The refresh thread.

    def wait_and_refresh(self, timeout_s: float) -> bool:
        """Wait for a publish and make a generation of it; returns whether there was one."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None, timeout_s)
            weights, self._waiting = self._waiting, None
        if weights is None:
            return False
        self._refresh(weights)
        return True

    def _refresh(self, weights: Weights) -> None:
        """Try until it works, a newer version waits, or refresh.max_failures is passed."""
        for attempt in range(self.settings.max_failures + 1):
            try:
                weights = self._keep_weights(weights) if attempt == 0 else weights
                self._attempt(weights)
                return
            except RefreshFailed as failed:
                with self._changed:
                    self._failures += 1
                    last = attempt == self.settings.max_failures or self._waiting is not None
                    self._given_up = str(failed) if last and self._waiting is None else ""
                self._events("refresh_failed", weights_version=weights.version, why=str(failed), given_up=last)
                if last:
                    return
                time.sleep(RETRY_S)

    def _attempt(self, weights: Weights) -> None:
        """Build and commit one generation, or raise RefreshFailed with nothing left of it."""
        with self._changed:
            generation, self._next_generation = self._next_generation, self._next_generation + 1
        self._events("refresh_started", generation=generation, weights_version=weights.version)
        begin = time.monotonic()
        self.clear(abort=True)
        try:
            self._build(generation, weights)
        except RefreshFailed:
            self._on_all(self.shards, lambda shard: shard.abort(generation))
            raise
        self._commit(Serving(generation, weights.version, weights.publish_id, weights), begin)

    def _build(self, generation: int, weights: Weights) -> None:
        """Stage and prepare on every shard; a shard that is lost on the way is filled again."""
        missing = list(self.shards)
        for _ in range(self.settings.max_failures + 1):
            lost = self.pool.run(generation, weights, split(missing, self.settings.chunk_passages))
            lost |= self._lacking(lambda s, status: generation in status.prepared or _staged_all(s, status, generation))
            if not lost:
                unprepared = [s for s in self.shards if s.number in self._lacking(_has_prepared(generation))]
                lost = self._prepare(generation, unprepared)
            lost |= self._lacking(_has_prepared(generation)) if not lost else set()
            if not lost:
                return
            missing = [shard for shard in self.shards if shard.number in lost]
            self._events("shards_filled_again", generation=generation, shards=sorted(lost))
            self._await(missing)
        raise RefreshFailed(f"shards {sorted(lost)} were lost again and again (refresh.max_failures)")

    def _prepare(self, generation: int, shards: Sequence[ShardPort]) -> set[int]:
        """Build the staged generation on `shards`; returns those that were lost, raises RefreshFailed when one refuses."""
        results = self._on_all(shards, lambda shard: shard.prepare(generation))
        lost = {number for number, error in results.items() if isinstance(error, ShardLost)}
        refused = {number: error for number, error in results.items() if isinstance(error, ValueError)}
        for number, error in refused.items():
            shard = next(s for s in shards if s.number == number)
            status = self._status(shard)
            if status is not None and _staged_all(shard, status, generation):
                raise RefreshFailed(f"shard {number} refuses generation {generation}: {error}") from error
            lost.add(number)  # it died and came back without its rows
        return lost

    def _commit(self, new: Serving, begin: float) -> None:
        """Switch every shard. The decision is made: a shard that dies here is repaired, not waited for."""
        self._on_all(self.shards, lambda shard: shard.commit(new.generation))
        seconds = time.monotonic() - begin
        passages = sum(shard.stop - shard.start for shard in self.shards)
        with self._changed:
            self._serving = new
            self._replaced_at = time.monotonic()
            self._committed += 1
            self._seconds, self._passages_per_s = seconds, passages / seconds
        self.snapshots.want(new.generation, new.weights_version)
        self._events(
            "refresh_committed",
            generation=new.generation,
            weights_version=new.weights_version,
            seconds=round(seconds, 3),
            passages=passages,
            passages_per_s=round(passages / seconds, 1),
        )

    # The repair thread.

    def tick(self) -> None:
        """Repair lost shards; close generations that nobody names any more."""
        self.repair.check()
        if time.monotonic() - self._replaced_at > GRACE_S:
            self.clear(abort=False)

    def clear(self, abort: bool) -> None:
        """Release generations other than the serving one; with `abort` also forget what is staged of others."""
        serving = self._serving
        keep = {serving.generation} if serving else set()
        keep |= self.snapshots.pending()

        def clear_one(shard: ShardPort) -> None:
            status = shard.status()
            for generation in status.generations:
                if serving is not None and generation not in keep:
                    shard.release(generation)
            for generation in status.staged if abort else ():
                if generation not in keep:
                    shard.abort(generation)

        self._on_all(self.shards, clear_one)

    # Start and restart.

    def recover(self, timeout_s: float, initial: tuple[Wish, str] | None = None) -> None:
        """Find out what the shards serve, before the threads start; `initial` is a snapshot to start from.

        After a coordinator died: a generation that every shard has committed or prepared is committed (the decision
        was made or was due); otherwise the newest one that all shards have serves; otherwise the newest of this
        service on disk. Raises TimeoutError when a shard does not answer.
        """
        statuses = self._await(self.shards, timeout_s)
        self.snapshots.tidy()
        open_on = [set(status.generations) for status in statuses]
        ready_on = [open_on[i] | set(status.prepared) for i, status in enumerate(statuses)]
        seen = set[int]().union(*ready_on, *(set(status.staged) for status in statuses))
        found = max(set.intersection(*ready_on), default=None)
        first = self.settings.first_generation
        if found is not None:
            self._on_all(self.shards, lambda shard: shard.commit(found))
            wish, source = Wish(found, _version(statuses, found)), "shards"
        elif (wish := self.snapshots.newest(first)) is not None:
            source = str(self.snapshots.path(wish.generation))
        elif any(open_on):
            newest = max(set[int]().union(*open_on))
            wish, source = Wish(newest, _version(statuses, newest)), "some shards"
        elif initial is not None:
            wish, source = initial
        else:
            return
        self._take_over(wish, source, max({first, wish.generation + 1, *(number + 1 for number in seen)}))

    def _take_over(self, wish: Wish, source: str, next_generation: int) -> None:
        """Serve a generation that was built before."""
        if "/" in source:
            errors = self._on_all(self.shards, lambda shard: shard.load(wish.generation, source))
            for error in errors.values():
                if error is not None and not isinstance(error, ShardLost):
                    raise error
        else:
            self.snapshots.want(wish.generation, wish.weights_version)
        with self._changed:
            self._serving = Serving(wish.generation, wish.weights_version, 0, None)
            self._next_generation = max(self._next_generation, next_generation)
        self._events("index_taken_over", generation=wish.generation, weights_version=wish.weights_version, source=source)

    def remember(self, committed: int, failures: int) -> None:
        """Counters of the coordinator that was here before."""
        self._committed, self._failures = committed, failures

    # Helpers.

    def _on_all(
        self, shards: Sequence[ShardPort], call: Callable[[ShardPort], None]
    ) -> dict[int, ShardLost | ValueError | None]:
        """`call` on each shard, at the same time; what each raised."""

        def guarded(shard: ShardPort) -> ShardLost | ValueError | None:
            try:
                call(shard)
            except (ShardLost, ValueError) as error:
                return error
            return None

        if not shards:
            return {}
        with ThreadPoolExecutor(len(shards)) as threads:
            return dict(zip((shard.number for shard in shards), threads.map(guarded, shards), strict=True))

    def _status(self, shard: ShardPort) -> ShardStatus | None:
        try:
            return shard.status()
        except ShardLost:
            return None

    def _lacking(self, complete: Callable[[ShardPort, ShardStatus], bool]) -> set[int]:
        """Numbers of shards that do not answer or are not `complete`."""
        statuses = [(shard, self._status(shard)) for shard in self.shards]
        return {shard.number for shard, status in statuses if status is None or not complete(shard, status)}

    def _await(self, shards: Iterable[ShardPort], timeout_s: float | None = None) -> list[ShardStatus]:
        """Wait until `shards` answer. Raises RefreshFailed."""
        limit = timeout_s or self.settings.search_timeout_s
        deadline = time.monotonic() + limit
        statuses = []
        for shard in shards:
            while (status := self._status(shard)) is None:
                if time.monotonic() > deadline:
                    raise RefreshFailed(f"shard {shard.number} did not answer for {limit:.0f} s")
                time.sleep(POLL_S)
            statuses.append(status)
        return statuses


def _staged_all(shard: ShardPort, status: ShardStatus, generation: int) -> bool:
    return status.staged.get(generation, 0) == shard.stop - shard.start


def _has_prepared(generation: int) -> Callable[[ShardPort, ShardStatus], bool]:
    return lambda shard, status: generation in status.prepared


def _version(statuses: Iterable[ShardStatus], generation: int) -> int:
    """Weights version of a generation that some shard has."""
    return next(s.generations[generation] for s in statuses if generation in s.generations)
