"""One question to every shard: which replica is asked, and what is done while one does not answer.

Each shard is asked once, at the replica that answered last. One that died, or does not serve the generation, is
followed by the next replica at once. A shard that has not answered for index.slow_after_s is slow: counted, an event
(of each shard at most one in EVENT_S, with how many searches it stands for), and with index.on_slow=hedge the next
replica is asked too; the first answer counts, and that replica is asked first from then on. Generations are compared by
the caller: a hedged answer is one of the pinned generation, or none.

Who waits for whom: `PendingAnswers.answers` waits for one answer of each shard, until the caller's deadline. Nobody
waits for the answer of a replica that was overtaken.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.machines.events import EventLog
from cluster.service.actors import Gone
from cluster.service.ray_ports import NamedActor, get
from indexing.hits import ShardHits, ShardIndexed

EVENT_S = 10.0  # Seconds between two events of one slow shard
Answer = ShardHits | ShardIndexed | Gone


class SearchRefused(TimeoutError):
    """A shard was slow, and `index.on_slow` is refuse."""


@dataclass(frozen=True)
class Slowness:
    """When a shard is slow, and what a search does then; see `IndexConfig`."""

    after_s: float = 0.0
    action: str = "wait"


WAIT = Slowness()


class Fanout:
    """The shards of an index, each with its replicas, as one client asks them. May be used from several threads."""

    def __init__(self, shards: Sequence[Sequence[NamedActor]], slowness: Slowness, events: EventLog) -> None:
        self.shards, self.slowness = shards, slowness
        self.preferred = [os.getpid() % len(replicas) for replicas in shards]  # clients spread over replicas
        self.counts: Counter[str] = Counter()  # slow, hedged, refused: searches of this client
        self._events = events
        self._lock = threading.Lock()
        self._unreported: Counter[int] = Counter()  # slow searches of a shard since its last event
        self._reported_at: dict[int, float] = {}

    def ask(self, method: str, *arguments: Any) -> "PendingAnswers":
        """Call `method` (of `ShardActor`: search | indexed) of every shard. Returns at once."""
        return PendingAnswers(self, method, arguments)

    def count(self, what: str) -> None:
        """Count one more search that was slow, hedged or refused."""
        with self._lock:
            self.counts[what] += 1

    def note_slow(self, shard: int) -> None:
        """Note a search that this shard holds up."""
        with self._lock:
            self._unreported[shard] += 1
            if time.monotonic() - self._reported_at.get(shard, -EVENT_S) < EVENT_S:
                return
            self._reported_at[shard] = time.monotonic()
            searches = self._unreported.pop(shard)
        limit, action = self.slowness.after_s, self.slowness.action
        self._events("shard_slow", shard=shard, searches=searches, slow_after_s=limit, on_slow=action)


@dataclass(kw_only=True)
class _Asked:
    """One shard's part of a question."""

    shard: int
    untried: list[int]  # replicas, the next one first
    open: dict[Any, int] = field(default_factory=dict)  # reference of an answer under way -> its replica
    answer: Answer | RayError | None = None
    slow: bool = False


class PendingAnswers:
    """One search under way at every shard."""

    def __init__(self, fanout: Fanout, method: str, arguments: tuple[Any, ...]) -> None:
        self._fanout, self._method, self._arguments = fanout, method, arguments
        self._since = time.monotonic()
        self._slow = self._hedged = False
        self._asked = []
        for shard, replicas in enumerate(fanout.shards):
            first, number = fanout.preferred[shard], len(replicas)
            self._asked.append(_Asked(shard=shard, untried=[(first + step) % number for step in range(number)]))
            self._ask_next(self._asked[-1])

    def answers(self, deadline: float) -> list[Answer]:
        """Return one answer of each shard, waiting until `deadline` (time.monotonic).

        Raises GetTimeoutError then, RayTaskError with what a shard refused, and RayError when no replica of a shard is
        there.
        """
        slowness, limit = self._fanout.slowness, deadline
        if slowness.after_s:
            limit = min(deadline, self._since + slowness.after_s)
        try:  # the way of nearly all searches: everybody answers
            answers = get([next(iter(one.open)) for one in self._asked], max(0.0, limit - time.monotonic()))
        except RayTaskError:
            raise
        except GetTimeoutError:
            if not slowness.after_s:
                raise
        except RayError:
            if not any(one.untried for one in self._asked):
                raise
        else:
            if not any(isinstance(answer, Gone) for answer in answers) or not any(one.untried for one in self._asked):
                return answers
        return self._collect(deadline)

    def silent(self) -> list[int]:
        """Return the shards that have not answered, as far as that is known."""
        return [one.shard for one in self._asked if one.answer is None]

    def _collect(self, deadline: float) -> list[Answer]:
        """Answer by answer, looking out for shards that are slow or lost."""
        while late := [one for one in self._asked if one.answer is None]:
            owners = {reference: one for one in late for reference in one.open}
            ready, _ = ray.wait(list(owners), num_returns=1, timeout=self._until_next(late, deadline))
            for reference in ready:
                self._take(owners[reference], reference)
            if ready:
                continue
            self._look_for_slow(late)
            if time.monotonic() >= deadline:
                raise GetTimeoutError(f"index shards {self.silent()} do not answer")
        answers = list[Answer]()
        for one in self._asked:
            if isinstance(one.answer, RayError):
                raise one.answer
            assert one.answer is not None
            answers.append(one.answer)
        return answers

    def _until_next(self, late: list[_Asked], deadline: float) -> float:
        """Seconds until something has to be done about the shards that are `late`."""
        after_s = self._fanout.slowness.after_s
        moment = deadline
        if after_s and not all(one.slow for one in late):
            moment = min(deadline, self._since + after_s)
        return max(0.0, moment - time.monotonic())

    def _look_for_slow(self, late: list[_Asked]) -> None:
        slowness = self._fanout.slowness
        if not slowness.after_s or time.monotonic() < self._since + slowness.after_s:
            return
        for one in late:
            if one.slow:
                continue
            one.slow = True
            self._fanout.note_slow(one.shard)
            if not self._slow:
                self._slow = True
                self._fanout.count("slow")
            if slowness.action == "hedge" and one.untried:
                self._ask_next(one)
                if not self._hedged:
                    self._hedged = True
                    self._fanout.count("hedged")

    def _take(self, one: _Asked, reference: Any) -> None:
        """Look at an answer that has come."""
        replica = one.open.pop(reference)
        if one.answer is not None:
            return
        try:
            answer = get(reference, 0.0)
        except (RayTaskError, GetTimeoutError):
            raise
        except RayError as error:
            answer = error
        if isinstance(answer, ShardHits | ShardIndexed):
            one.answer = answer
            self._fanout.preferred[one.shard] = replica
        elif one.untried:
            self._ask_next(one)
        elif not one.open:
            one.answer = answer

    def _ask_next(self, one: _Asked) -> None:
        replica = one.untried.pop(0)
        actor = self._fanout.shards[one.shard][replica]
        one.open[actor.submit(self._method, *self._arguments)] = replica
