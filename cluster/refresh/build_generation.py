"""A generation is made on all shards, up to the commit: begun, its rows staged, prepared; again if a shard is lost.

Two kinds share these steps: a whole generation (a refresh), and one that is derived from another (a change of the
corpus, or passages that are encoded again). `GenerationPlan` says what differs. Both may be under way at the same time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cluster.refresh.encode_queue import EncodePool, split_numbers
from cluster.refresh.ports import (
    Chunk,
    Events,
    RefreshFailed,
    ShardLost,
    ShardPort,
    Weights,
    has_prepared,
    has_staged_all,
)
from cluster.refresh.shards import ShardGroup
from indexing.corpus.stores.changes import ChangeLog
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """One generation that is to be made."""

    generation: int
    weights: Weights  # that its rows are encoded with
    corpus_version: int
    begin: Callable[[ShardPort], None]  # tells a shard what it will have
    chunks: Callable[[ShardPort], list[Chunk]]
    urgent: bool = False  # encoded before what others wait for
    before: Callable[[], None] = lambda: None  # what has to be there, made again before each attempt


class Builder:
    """Makes plans of generations, and prepares them on every shard."""

    def __init__(
        self,
        shards: ShardGroup,
        pool: EncodePool,
        *,
        log: ChangeLog,
        events: Events,
        in_order: Callable[[ShardStatus], bool],
        chunk_passages: int,
        max_failures: int,
        wait_s: float,
    ) -> None:
        """`in_order`: a shard has what searches need of it; each attempt waits for that, `wait_s` at most."""
        self._shards, self._pool, self.log, self._events = shards, pool, log, events
        self._in_order, self._chunk_passages = in_order, chunk_passages
        self._max_failures, self._wait_s = max_failures, wait_s

    def whole(self, generation: int, weights: Weights, corpus_version: int, urgent: bool = False) -> GenerationPlan:
        """Return the plan of a generation of all passages that are living at `corpus_version`: a new big index, without
        deleted rows."""

        def begin(shard: ShardPort) -> None:
            shard.call(Shard.begin, generation, weights.version, self._owned(shard, corpus_version), corpus_version)

        def chunks(shard: ShardPort) -> list[Chunk]:
            numbers = self._owned(shard, corpus_version)
            every = np.arange(shard.start, shard.stop) if numbers is None else numbers
            return split_numbers(shard.number, every, self._chunk_passages, base=shard.stop)

        return GenerationPlan(
            generation=generation,
            weights=weights,
            corpus_version=corpus_version,
            begin=begin,
            chunks=chunks,
            urgent=urgent,
        )

    def derived(
        self,
        generation: int,
        origin: int,
        *,
        numbers: np.ndarray,
        weights: Weights,
        weights_version: int,
        corpus_version: int,
        before: Callable[[], None] = lambda: None,
    ) -> GenerationPlan:
        """Generation `origin` with the passages `numbers` (sorted) encoded with `weights`: added, or in place of what
        they were. It goes by `weights_version`, and shares the big indexes of `origin`."""

        def begin(shard: ShardPort) -> None:
            shard.call(Shard.derive, generation, origin, self._mine(shard, numbers), weights_version, corpus_version)

        def chunks(shard: ShardPort) -> list[Chunk]:
            return split_numbers(shard.number, self._mine(shard, numbers), self._chunk_passages)

        return GenerationPlan(
            generation=generation,
            weights=weights,
            corpus_version=corpus_version,
            begin=begin,
            chunks=chunks,
            urgent=True,
            before=before,
        )

    def build(self, plan: GenerationPlan) -> None:
        """Stage and prepare on every shard; one that is lost on the way is filled again. Raises RefreshFailed."""
        generation, lost = plan.generation, dict[int, str]()  # shard -> why
        for attempt in range(self._max_failures + 1):
            plan.before()
            unprepared = self._shards.lacking(has_prepared, generation)
            if not unprepared:
                return
            missing = self._shards.pick(unprepared & self._unstaged(plan))
            if attempt and missing:
                self._events("shards_filled_again", generation=generation, shards=[one.number for one in missing])
            self._shards.wait(self._wait_s, self._in_order, shards=missing)
            lost = self._begin(plan, missing)
            there = [shard for shard in missing if shard.number not in lost]
            chunks = [chunk for shard in there for chunk in plan.chunks(shard)]
            died = self._pool.run(generation, plan.weights, chunks, plan.urgent)
            died |= self._unstaged(plan) & {shard.number for shard in there}
            lost |= dict.fromkeys(died, "it died before it had all its rows")
            if not lost:  # contract 3: only when every shard has staged all its rows
                lost = self._prepare(plan, self._shards.pick(self._shards.lacking(has_prepared, generation)))
                lost = dict.fromkeys(self._shards.lacking(has_prepared, generation), "it came back empty") | lost
            if not lost:
                return
        why = "; ".join(f"shard {number}: {reason}" for number, reason in sorted(lost.items()))
        raise RefreshFailed(f"index shards were lost {self._max_failures + 1} times (refresh.max_failures): {why}")

    def hide(self, shard: ShardPort, status: ShardStatus) -> int:
        """Make sure that `shard` returns nothing that was deleted, before it is given a generation. Returns the version
        of the corpus up to which that holds."""
        version = self.log.version
        if status.hidden < version:
            shard.call(Shard.hide, version, self.log.deleted_at(version))
        return max(status.hidden, version)

    def _begin(self, plan: GenerationPlan, shards: Iterable[ShardPort]) -> dict[int, str]:
        """Tell shards what they will have; returns why others were lost. Raises RefreshFailed when one refuses."""

        def begin(shard: ShardPort) -> None:
            self.hide(shard, shard.status())
            plan.begin(shard)

        lost = dict[int, str]()
        for number, error in self._shards.each(begin, list(shards)).items():
            if isinstance(error, ShardLost | GenerationGone):
                lost[number] = str(error)  # it died, or came back without what is to be derived from
            elif error is not None:
                raise RefreshFailed(f"shard {number} refuses generation {plan.generation}: {error}") from error
        return lost

    def _prepare(self, plan: GenerationPlan, shards: list[ShardPort]) -> dict[int, str]:
        """Build the staged rows on `shards`; returns why some were lost. Raises RefreshFailed when one refuses."""
        generation, lost = plan.generation, dict[int, str]()
        for number, error in self._shards.each(lambda shard: shard.call(Shard.prepare, generation), shards).items():
            if error is None:
                continue
            if not isinstance(error, ShardLost) and number not in self._unstaged(plan):
                final = isinstance(error, ValueError)
                raise RefreshFailed(f"shard {number} refuses generation {generation}: {error}", final) from error
            lost[number] = str(error)  # it died, or came back without its rows
        return lost

    def _unstaged(self, plan: GenerationPlan) -> set[int]:
        """Return the shards that lack rows of a plan."""
        version = plan.corpus_version
        return self._shards.lacking(
            lambda status, generation: has_staged_all(status, generation, version), plan.generation
        )

    def _owned(self, shard: ShardPort, corpus_version: int) -> np.ndarray | None:
        return self.log.owned(
            shard.number, len(self._shards), start=shard.start, stop=shard.stop, version=corpus_version
        )

    def _mine(self, shard: ShardPort, numbers: np.ndarray) -> np.ndarray:
        """Return those of sorted passage numbers that belong to a shard."""
        in_base = (numbers >= shard.start) & (numbers < shard.stop)
        added = numbers >= self.log.num_base
        return numbers[in_base | (added & ((numbers - self.log.num_base) % len(self._shards) == shard.number))]
