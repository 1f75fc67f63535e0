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
back empty and is given g by the repair (`cluster/repair.py`), and a coordinator that dies in it is followed by one that
completes it (`cluster/takeover.py`). Until the last shard has switched, searches are answered
by g-1, which every living shard still has. Before the decision any failure aborts g everywhere.

Who waits for whom (`cluster/actors.py` starts the threads):
- `publish`, `status` and `save_generation` are called by Ray; they take the lock for a moment and never wait.
- The refresh thread waits for a publish, then for workers and shards, each bounded by its port.
- The repair thread ticks about once a second; it may wait for chunks, which it queues before those of a refresh.
- The snapshot thread waits for a commit or a wish, then for the shards' disks.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.chunks import EncodePool, split
from cluster.ports import Events, RefreshFailed, ShardLost, ShardPort, Weights, has_prepared, has_staged_all
from cluster.repair import Repair, Serving
from cluster.shards import ShardGroup
from cluster.snapshots import Snapshots, Wish
from cluster.takeover import take_over
from indexing.probe import UNKNOWN, Figures
from indexing.shard import ShardStatus

GRACE_S = 10.0  # that a replaced generation stays open for clients that have not heard of the next one
RETRY_S = 1.0  # before a failed refresh is tried again
DISK_S = 60.0  # that a commit waits for the snapshot of a generation that has to make room


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
    generations_committed: int = 0
    refresh_seconds: float = 0.0
    refresh_passages_per_s: float = 0.0
    failures: int = 0
    given_up: str = ""  # why the newest publish will not become a generation
    needs_weights: bool = False  # the serving generation cannot be completed without a new publish
    passages_encoded: int = 0  # by this coordinator so far: grows while a generation is built
    figures: Figures = UNKNOWN  # of the newest generation that this coordinator committed


class RefreshCoordinator:
    """Turns published weights into committed generations. Knows no Ray: ports stand for the other processes."""

    def __init__(
        self,
        settings: RefreshSettings,
        shards: ShardGroup,
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
        self.repair = Repair(
            shards,
            pool,
            snapshots,
            lambda: self._serving,
            events,
            settings.chunk_passages,
            settings.search_timeout_s / 4,
        )
        self._keep_weights = keep_weights
        self._events = events
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
        self._figures = UNKNOWN

    # What clients ask. Never waits.

    def publish(self, weights: Weights) -> None:
        """Take note of new weights; older ones that still wait are dropped."""
        with self._changed:
            if weights.publish_id == self._newest_publish_id:
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
                generations_committed=self._committed,
                refresh_seconds=self._seconds,
                refresh_passages_per_s=self._passages_per_s,
                failures=self._failures,
                given_up=self._given_up,
                needs_weights=self.repair.beyond_repair,
                passages_encoded=self.pool.passages_encoded,
                figures=self._figures,
            )

    def save_generation(self, generation: int) -> str | None:
        """The directory of a generation that is on disk, which is protected from now on; None while it is written.

        Raises OSError when it is neither served nor on disk, or could not be written.
        """
        snapshots, serving = self.snapshots, self._serving
        if snapshots.saved(generation):
            snapshots.protect(generation)
            return str(snapshots.path(generation))
        if generation in snapshots.pending():
            return None
        if (failure := snapshots.failure(generation)) is not None:
            raise OSError(f"index generation {generation} could not be saved: {failure}")
        if serving is None or serving.generation != generation:
            now = serving.generation if serving else "none"
            raise OSError(f"index generation {generation} is neither on disk nor serving (serving: {now})")
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
                if attempt == 0:
                    weights = self._keep_weights(weights)
                self._attempt(weights)
            except RefreshFailed as failed:
                last = failed.final or attempt == self.settings.max_failures
                with self._changed:
                    self._failures += 1
                    overtaken = self._waiting is not None
                    self._given_up = str(failed) if last and not overtaken else ""
                self._events(
                    "refresh_failed", weights_version=weights.version, why=str(failed), given_up=last or overtaken
                )
                if last or overtaken:
                    return
                time.sleep(RETRY_S)
            else:
                return

    def _attempt(self, weights: Weights) -> None:
        """Build and commit one generation, or raise RefreshFailed with nothing left of it."""
        with self._changed:
            generation, self._next_generation = self._next_generation, self._next_generation + 1
        self._events("refresh_started", generation=generation, weights_version=weights.version)
        begin = time.monotonic()
        self._clear(keep=self.snapshots.pending(), abort=True)
        try:
            self._build(generation, weights)
            self._make_room()
        except Exception as error:  # whatever it was, nothing of the generation may stay
            self.shards.call(lambda shard: shard.abort(generation))
            if isinstance(error, RefreshFailed):
                raise
            raise RefreshFailed(f"{type(error).__name__}: {error}") from error
        self._commit(Serving(generation, weights.version, weights.publish_id, weights), begin)

    def _build(self, generation: int, weights: Weights) -> None:
        """Stage and prepare on every shard; a shard that is lost on the way is filled again."""
        missing, lost = list(self.shards), set()
        for _ in range(self.settings.max_failures + 1):
            self.shards.wait(self.settings.search_timeout_s, self._in_order, missing)
            lost = self.pool.run(generation, weights, split(missing, self.settings.chunk_passages))
            lost |= self.shards.lacking(has_staged_all, generation)
            if not lost:  # contract 3: only when every shard has staged all its rows
                unprepared = self.shards.lacking(has_prepared, generation)
                lost = self._prepare(generation, self.shards.pick(unprepared))
                lost |= self.shards.lacking(has_prepared, generation)
            if not lost:
                return
            missing = self.shards.pick(lost)
            self._events("shards_filled_again", generation=generation, shards=sorted(lost))
        raise RefreshFailed(f"index shards {sorted(lost)} were lost again and again (refresh.max_failures)")

    def _prepare(self, generation: int, shards: list[ShardPort]) -> set[int]:
        """Build the staged rows on `shards`; returns those that were lost. Raises RefreshFailed when one refuses."""
        lost = set()
        for number, error in self.shards.call(lambda shard: shard.prepare(generation), shards).items():
            if error is None:
                continue
            if not isinstance(error, ShardLost) and number not in self.shards.lacking(has_staged_all, generation):
                final = isinstance(error, ValueError)
                raise RefreshFailed(f"shard {number} refuses generation {generation}: {error}", final) from error
            lost.add(number)  # it died, or came back without its rows
        return lost

    def _make_room(self) -> None:
        """Close the generation before the serving one: a shard holds two, and one being built."""
        deadline = time.monotonic() + DISK_S
        serving = self._serving.generation if self._serving else -1
        while any(generation < serving for generation in self.snapshots.pending()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.snapshots.forget(before=serving)
        self._clear(keep=set(), abort=False)

    def _commit(self, new: Serving, begin: float) -> None:
        """Switch every shard. The decision is made: a shard that dies here is repaired, not waited for."""
        self.shards.call(lambda shard: shard.commit(new.generation))
        seconds, passages = time.monotonic() - begin, self.shards.num_passages
        figures = self.shards.figures(new.generation)
        with self._changed:
            self._serving = new
            self._replaced_at = time.monotonic()
            self._committed += 1
            self._seconds, self._passages_per_s, self._figures = seconds, passages / seconds, figures
        self.snapshots.want(new.generation, new.weights_version)
        self._events(
            "refresh_committed",
            generation=new.generation,
            weights_version=new.weights_version,
            seconds=round(seconds, 3),
            passages=passages,
            passages_per_s=round(passages / seconds, 1),
            bytes_per_passage=round(figures.bytes_per_passage, 1),
            build_s=round(figures.build_s, 3),
            recall=None if figures.recall is None else round(figures.recall, 4),
        )

    def _clear(self, keep: set[int], abort: bool) -> None:
        """Release what is older than the serving generation, but `keep`; with `abort` forget what else is staged."""
        serving = self._serving.generation if self._serving else -1

        def clear_one(shard: ShardPort) -> None:
            status = shard.status()
            if abort and status.staged not in (-1, serving):
                shard.abort(status.staged)
            for generation in status.generations:
                if generation < serving and generation not in keep:
                    shard.release(generation)

        self.shards.call(clear_one)

    def _in_order(self, status: ShardStatus) -> bool:
        """A shard that lost the serving generation gets it back first, if that is possible."""
        serving = self._serving
        return serving is None or serving.generation in status.generations or self.repair.beyond_repair

    # The repair thread.

    def tick(self) -> None:
        """Repair lost shards; close a generation that nobody names any more."""
        self.repair.check()
        if time.monotonic() - self._replaced_at > GRACE_S:
            self._clear(keep=self.snapshots.pending(), abort=False)

    # Before the threads start.

    def recover(self, timeout_s: float, initial: tuple[Wish, str] | None = None) -> None:
        """Find out what serves (`cluster/takeover.py`). Raises RefreshFailed when a shard does not answer."""
        self.snapshots.tidy()
        first = self.settings.first_generation
        serving, number = take_over(self.shards, self.snapshots, self._events, first, initial, timeout_s)
        with self._changed:
            self._serving, self._next_generation = serving, number

    def remember(self, committed: int, failures: int) -> None:
        """Counters of the coordinator that was here before."""
        self._committed, self._failures = committed, failures
