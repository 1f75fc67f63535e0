"""The refresh contract, and the coordinator that keeps it.

1. The trainer publishes encoder weights version v through Ray's object store and goes on at once.
2. Refresh workers pull chunks of passages from one queue, encode them, hand vectors to the shard that owns them. A
   worker that dies costs its chunk, which another takes.
3. When every shard has staged all its rows of generation g, the coordinator commits: all switch, or none.
4. A query is answered by exactly one generation on every shard. g-1 stays open until no request names it.
5. Training never waits for a refresh, unless refresh.max_staleness_steps is set, and then says so.
6. A failed refresh leaves the old generation serving, is retried, is an event in the metrics, and ends the run only
   when the staleness bound is passed. Nothing hangs: every wait has a bound and a message.
7. When to refresh: every N steps, or when measured drift passes a threshold (the training loop decides, by publishing;
   `training/refreshing/policy.py`). It may name the passages to encode: the generation then has their new vectors
   beside all others' old ones, goes by the new version, and each hit tells its own.
8. A newer version that arrives while one is being built is kept, older waiting ones are dropped. What a dropped or
   failed one was to encode is encoded with the next weights.
9. The corpus may change at any time (`cluster/refresh/live_corpus.py`). A deleted passage is in no answer from the
   moment that its change is served, whichever generation answers; an added one is committed in a generation that is
   derived from the serving one and shares its big indexes. A refresh that was under way is brought up to the newest
   version before it commits, and starts without what was deleted before it began. A lexical index
   (`cluster/service/lexical_actor.py`) is no part of a generation: it follows the same log, and answers for the
   passages that the generation has.

How all or none is kept: `prepare` on every shard builds generation g beside the serving one; only when every shard
reports it as prepared is the commit decided, and a decided commit is driven to its end: a shard that dies in it comes
back empty and is given g by the repair (`cluster/refresh/repair.py`), and a coordinator that dies in it is followed by
one that completes it (`cluster/refresh/recovery.py`). Until the last shard has switched, searches are answered by g-1,
which every living shard still has. Before the decision any failure aborts g everywhere.

Who waits for whom (`cluster/service/actors.py` starts the threads):
- `publish`, `status`, `keep_newest` and `save_generation` are called by Ray; they hold the lock for a moment only.
- The refresh thread waits for a publish, then for workers and shards, each bounded by its port.
- The corpus thread (`cluster/refresh/live_corpus.py`) follows the changes of the corpus and commits them beside a
  refresh.
- The repair thread ticks about once a second; it may wait for chunks, which it queues before those of a refresh.
- The snapshot thread waits for a commit or a wish, then for the shards' disks.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cluster.refresh.build_generation import Builder
from cluster.refresh.encode_queue import EncodePool
from cluster.refresh.live_corpus import LiveCorpus
from cluster.refresh.ports import Events, RefreshFailed, Serving, Weights
from cluster.refresh.recovery import take_over
from cluster.refresh.repair import Repair
from cluster.refresh.serving_generation import ServingGeneration
from cluster.refresh.shards import ShardGroup
from cluster.refresh.snapshots import Snapshots, Wish
from indexing.corpus.snapshot import TornSnapshot
from indexing.corpus.stores.changes import ChangeLog
from indexing.dense.probe import UNKNOWN, Figures
from indexing.shard.shard_status import ShardStatus

RETRY_S = 1.0  # Seconds before a failed refresh is tried again: a moment for what failed to end
NOT_GIVEN_UP = "", 0  # the reason, and the publish that was given up: neither


@dataclass(frozen=True, kw_only=True)
class RefreshSettings:
    """The coordinator's share of the settings."""

    chunk_passages: int
    max_failures: int
    chunk_timeout_s: float
    search_timeout_s: float
    first_generation: int  # this service's numbers begin here
    grace_s: float
    snapshot_wait_s: float
    snapshot_every: int  # commits from one that is written to disk to the next


@dataclass(frozen=True, kw_only=True)
class CoordinatorStatus:
    """The state that clients poll."""

    generation: int = -1
    weights_version: int = -1
    publish_id: int = 0  # of the serving generation; 0: unknown
    generations_committed: int = 0
    refresh_seconds: float = 0.0
    refresh_passages_per_s: float = 0.0
    failures: int = 0
    given_up: str = ""  # why the newest publish will not become a generation
    given_up_publish: int = 0  # which publish that is; 0: unknown
    needs_weights: bool = False  # the serving generation cannot be completed without a new publish
    passages_encoded: int = 0  # by this coordinator so far: grows while a generation is built
    corpus_version: int = 0  # of the live corpus, that is served
    num_passages: int = 0  # living ones
    oldest_version: int = -1  # weights version of the passage of the serving generation that was encoded longest ago
    figures: Figures = UNKNOWN  # of the serving generation
    doing: str = ""  # what a shard is at that takes as long as its index is large


class RefreshCoordinator:
    """Turns published weights into committed generations. Knows no Ray: ports stand for the other processes."""

    def __init__(
        self,
        settings: RefreshSettings,
        shards: ShardGroup,
        *,
        pool: EncodePool,
        snapshots: Snapshots,
        keep_weights: Callable[[Weights], Weights],
        events: Events,
        log: ChangeLog,
    ) -> None:
        """`keep_weights` makes a copy that outlives the trainer; it raises RefreshFailed when the original is gone.
        `log`: the changes of the corpus, which other processes write."""
        self.settings = settings
        self.shards = shards
        self.pool = pool
        self.snapshots = snapshots
        self.log = log
        self.changing = (
            threading.RLock()
        )  # held by a change of the corpus, and by a refresh from its last look at it on
        self.serving = ServingGeneration(shards, snapshots, events, settings.first_generation)
        self._builder = Builder(
            shards,
            pool,
            log=log,
            events=events,
            in_order=self._in_order,
            chunk_passages=settings.chunk_passages,
            max_failures=settings.max_failures,
            wait_s=settings.search_timeout_s,
        )
        self.repair = Repair(
            shards,
            pool,
            snapshots=snapshots,
            serving=self.serving,
            events=events,
            builder=self._builder,
            hung_s=settings.search_timeout_s / 4,
        )
        self.live = LiveCorpus(
            self._builder,
            shards,
            serving=self.serving,
            events=events,
        )
        self._keep_weights = keep_weights
        self._events = events
        self._changed = threading.Condition()
        self._waiting: Weights | None = None
        self._newest_publish_id = 0
        self._owed: Weights | None = None  # given up: the next publish does its part
        self._given_up = NOT_GIVEN_UP
        self._committed = 0
        self._failures = 0
        self._seconds = 0.0
        self._passages_per_s = 0.0

    # What clients ask. Never waits.

    def publish(self, weights: Weights) -> None:
        """Take note of new weights; older ones that still wait are dropped."""
        with self._changed:
            if weights.publish_id == self._newest_publish_id:
                return  # sent again by a client that was not sure
            dropped = self._waiting
            for older in (dropped, self._owed):
                weights = weights if older is None else with_those_of(older, weights)
            self._waiting, self._owed = weights, None
            self._newest_publish_id = weights.publish_id
            self._given_up = NOT_GIVEN_UP
            self._changed.notify_all()
        if dropped is not None:
            self._events("publish_dropped", weights_version=dropped.version, newer=weights.version)

    def status(self) -> CoordinatorStatus:
        """Return the newest state."""
        served = self.live.served
        serving, oldest_version, figures = self.serving.view()
        with self._changed:
            return CoordinatorStatus(
                generation=serving.generation if serving else -1,
                weights_version=serving.weights_version if serving else -1,
                publish_id=serving.publish_id if serving else 0,
                generations_committed=self._committed,
                refresh_seconds=self._seconds,
                refresh_passages_per_s=self._passages_per_s,
                failures=self._failures,
                given_up=self._given_up[0],
                given_up_publish=self._given_up[1],
                needs_weights=self.repair.beyond_repair or self.live.needs_weights,
                passages_encoded=self.pool.passages_encoded,
                corpus_version=served.version,
                num_passages=served.num_passages,
                oldest_version=oldest_version,
                figures=figures,
                doing=next(filter(None, (shard.doing for shard in self.shards)), ""),
            )

    def keep_newest(self) -> int:
        """Protect the newest generation on disk, which a checkpoint is about to name. Returns its number, -1 if there
        is none."""
        newest = next(self.snapshots.on_disk(), None)
        if newest is None:
            return -1
        self.snapshots.protect(newest.generation)
        return newest.generation

    def save_generation(self, generation: int) -> str | None:
        """Return the directory of a generation that is on disk, which is protected from now on; None while it is
        written.

        Raises OSError when it is neither served nor on disk, or could not be written.
        """
        snapshots, serving = self.snapshots, self.serving.now
        if snapshots.saved(generation):
            snapshots.protect(generation)
            return str(snapshots.path(generation))
        if generation in snapshots.pending():
            snapshots.keep_wish(generation)
            return None
        if (failure := snapshots.failure(generation)) is not None:
            raise OSError(f"index generation {generation} could not be saved: {failure}")
        if serving is None or serving.generation != generation:
            now = serving.generation if serving else "none"
            raise OSError(f"index generation {generation} is neither on disk nor serving (serving: {now})")
        snapshots.want(serving, asked=True)
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
                    if self._waiting is not None:
                        self._waiting = with_those_of(weights, self._waiting)
                    elif last:
                        self._owed = replace(weights, reference=None)
                    self._given_up = (str(failed), weights.publish_id) if last and not overtaken else NOT_GIVEN_UP
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
        if weights.only is not None and self.serving.now is not None:
            self._renew(weights, weights.only)
            return
        try:
            self.log.refresh()
        except (TornSnapshot, ValueError) as torn:
            raise RefreshFailed(f"the changes of the corpus cannot be read: {torn}") from torn
        generation, corpus_version = self.serving.next_number(), self.log.version
        self._events("refresh_started", generation=generation, weights_version=weights.version)
        begin = time.monotonic()
        self.serving.clear(keep=self.snapshots.pending(), abort=True)
        plan = self._builder.whole(generation, weights, corpus_version)
        try:
            self._builder.build(plan)
            self._make_room()
            with self.changing:
                built = Serving(
                    generation=generation,
                    weights_version=weights.version,
                    publish_id=weights.publish_id,
                    weights=weights,
                    corpus_version=corpus_version,
                )
                new = self.live.caught_up(built, lambda: self._builder.build(plan))
                self._commit(new, begin)
        except Exception as error:  # whatever it was, nothing of the generation may stay
            self.serving.abort(generation)
            if isinstance(error, RefreshFailed):
                raise
            raise RefreshFailed(f"{type(error).__name__}: {error}") from error

    def _renew(self, weights: Weights, numbers: np.ndarray) -> None:
        """Commit a generation in which the passages `numbers` alone are encoded anew. Raises RefreshFailed."""
        begin = time.monotonic()
        try:
            with self.changing:
                generation = self.live.encode_again(numbers, weights, adopt=True)
        except RefreshFailed:
            raise
        except Exception as error:
            raise RefreshFailed(f"{type(error).__name__}: {error}") from error
        self._note_committed(generation, weights.version, time.monotonic() - begin, len(numbers), partial=True)

    def _make_room(self) -> None:
        """Close the generation before the serving one: a shard holds two, and one being built."""
        deadline = time.monotonic() + self.settings.snapshot_wait_s
        serving = self.serving.number
        while any(generation < serving for generation in self.snapshots.pending()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.snapshots.forget(before=serving)
        self.serving.clear(keep=set(), abort=False)

    def _commit(self, new: Serving, begin: float) -> None:
        """Switch every shard to a whole generation. The decision is made: a shard that dies here is repaired, not
        waited for."""
        self.serving.switch(new)
        passages = self.log.num_living(new.corpus_version)
        if self._committed % self.settings.snapshot_every == 0:
            self.snapshots.want(new)
        self._note_committed(new.generation, new.weights_version, time.monotonic() - begin, passages)

    def _note_committed(self, generation: int, version: int, seconds: float, passages: int, **fields: object) -> None:
        _, _, figures = self.serving.view()
        with self._changed:
            self._committed += 1
            self._seconds, self._passages_per_s = seconds, passages / seconds
        self._events(
            "refresh_committed",
            generation=generation,
            weights_version=version,
            seconds=round(seconds, 3),
            passages=passages,
            passages_per_s=round(passages / seconds, 1),
            bytes_per_passage=round(figures.bytes_per_passage, 1),
            build_s=round(figures.build_s, 3),
            recall=None if figures.recall is None else round(figures.recall, 4),
            **fields,
        )

    def _in_order(self, status: ShardStatus) -> bool:
        """Give a shard that lost the serving generation this generation back first, if that is possible."""
        serving = self.serving.now
        return serving is None or serving.generation in status.generations or self.repair.beyond_repair

    # The corpus thread, and whoever wants passages encoded again.

    def follow_corpus(self) -> bool:
        """Bring what is served up to the newest version of the corpus; returns whether there was something to do."""
        if not self.live.is_behind():
            return False
        done = self.live.hide()
        if done:
            with self.changing:
                done = self.live.add()
        if not done:
            time.sleep(RETRY_S)
        return True

    def encode_again(self, numbers: np.ndarray, weights: Weights, adopt: bool = False) -> int:
        """Commit a generation in which the passages `numbers` alone are encoded anew, with `weights`; returns its
        number. See `LiveCorpus.encode_again`. Waits for the encoding; raises RefreshFailed."""
        with self.changing:
            return self.live.encode_again(numbers, self._keep_weights(weights), adopt)

    # The repair thread.

    def tick(self) -> None:
        """Repair lost shards; close a generation that nobody names any more."""
        self.repair.check()
        if time.monotonic() - self.serving.replaced_at > self.settings.grace_s:
            self.serving.clear(keep=self.snapshots.pending(), abort=False)

    # Before the threads start.

    def recover(self, timeout_s: float, initial: tuple[Wish, str] | None = None) -> None:
        """Find out what serves (`cluster/refresh/recovery.py`). Raises RefreshFailed when a shard does not answer."""
        self.snapshots.tidy()
        first = self.settings.first_generation
        hung_s, hide = self.settings.search_timeout_s / 4, self._builder.hide
        serving, number, hidden = take_over(
            self.shards,
            self.snapshots,
            events=self._events,
            first_generation=first,
            initial=initial,
            timeout_s=timeout_s,
            hung_s=hung_s,
            hide=hide,
        )
        self.serving.take_over(serving, number)
        self.live.hidden = hidden

    def remember(self, committed: int, failures: int) -> None:
        """Counters of the coordinator that was here before."""
        self._committed, self._failures = committed, failures


def with_those_of(older: Weights, newer: Weights) -> Weights:
    """`newer`, with which also the passages of `older` are to be encoded, that is dropped."""
    if older.only is None or newer.only is None:
        return replace(newer, only=None)
    return replace(newer, only=np.union1d(older.only, newer.only))
