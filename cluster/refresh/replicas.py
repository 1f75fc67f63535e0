"""One shard in several processes: each replica stages, prepares and commits alike, so that any of them may answer.

To the refresh they are one shard (`ReplicatedShard` is a `ShardPort`): it has a generation when every replica has it,
and is lost while one of them is. All or none then holds over replicas as it does over shards. What is done again at a
replica that has it already does nothing (`indexing.shard.shard.Shard`), so a replica that comes back empty is filled by
filling the shard. Searches meanwhile are answered by the others (`cluster/service/fanout.py`).

Who waits for whom: each call goes to all replicas at the same time and waits for all, as long as the ports allow.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from cluster.refresh.ports import ShardLost, ShardPort
from indexing.shard.serving import MAX_COMMITTED, GenerationGone
from indexing.shard.shard import ShardStatus
from indexing.shard.staging import StagingStatus

T = TypeVar("T")


class Replica(ShardPort, Protocol):
    """One process of a shard."""

    def stage(self, generation: int, weights_version: int, start: int | np.ndarray, vectors: Any) -> None: ...


class ReplicatedShard:
    """Two or more replicas of one shard as a `ShardPort`."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.number, self.start, self.stop = replicas[0].number, replicas[0].start, replicas[0].stop
        self._replicas = tuple(replicas)
        self._silent: set[int] = set()  # replicas that did not answer when they were last asked

    def status(self) -> ShardStatus:
        """What all replicas have. Raises ShardLost when one does not answer."""
        return in_common(self._each(lambda replica: replica.status()))

    def lacking(self, generation: int) -> str:
        return " and ".join(filter(None, self._each(lambda replica: replica.lacking(generation))))

    def stage(self, generation: int, weights_version: int, start: int | np.ndarray, vectors: Any) -> None:
        """Have every replica take the vectors."""
        self._each(lambda replica: replica.stage(generation, weights_version, start, vectors))

    def begin(self, generation: int, weights_version: int, numbers: np.ndarray | None, corpus_version: int) -> None:
        self._each(lambda replica: replica.begin(generation, weights_version, numbers, corpus_version))

    def derive(
        self, generation: int, origin: int, numbers: np.ndarray, weights_version: int, corpus_version: int
    ) -> None:
        self._each(lambda replica: replica.derive(generation, origin, numbers, weights_version, corpus_version))

    def hide(self, corpus_version: int, numbers: np.ndarray) -> None:
        self._each(lambda replica: replica.hide(corpus_version, numbers))

    def prepare(self, generation: int) -> None:
        self._each(lambda replica: replica.prepare(generation))

    def commit(self, generation: int) -> None:
        self._each(lambda replica: _commit(replica, generation))

    def abort(self, generation: int) -> None:
        self._each(lambda replica: replica.abort(generation))

    def release(self, generation: int) -> None:
        self._each(lambda replica: replica.release(generation))

    def load(self, generation: int, directory: str) -> None:
        self._each(lambda replica: replica.load(generation, directory))

    def save(self, generation: int, directory: str, earlier: str | None = None) -> None:
        """Have one replica write its files: they are all alike."""
        for number, replica in enumerate(self._replicas):
            try:
                replica.save(generation, directory, earlier)
            except (ShardLost, GenerationGone):
                if number == len(self._replicas) - 1:
                    raise
            else:
                return

    def restart(self) -> None:
        """Kill the replicas that stay silent; all of them where none does."""
        silent = sorted(self._silent) or range(len(self._replicas))
        for number in silent:
            self._replicas[number].restart()

    def _each(self, call: Callable[[Replica], T]) -> list[T]:
        """What each replica answered. Raises what one of them refused, else ShardLost when one was lost."""

        def guarded(number: int) -> T | Exception:
            try:
                answer = call(self._replicas[number])
            except ShardLost as lost:
                if lost.silent:
                    self._silent.add(number)
                return lost
            except Exception as error:  # the edge of a thread: raised below
                return error
            self._silent.discard(number)
            return answer

        with ThreadPoolExecutor(len(self._replicas)) as threads:
            answers = list(threads.map(guarded, range(len(self._replicas))))
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:
            raise next((error for error in errors if not isinstance(error, ShardLost)), _worst(errors))
        return [answer for answer in answers if not isinstance(answer, Exception)]


def _commit(replica: Replica, generation: int) -> None:
    """Commit, where there is no room after closing the oldest generation: the replicas that lost it cannot serve it
    either."""
    try:
        replica.commit(generation)
    except ValueError:
        served = replica.status().generations
        if len(served) < MAX_COMMITTED:
            raise
        replica.release(min(served))
        replica.commit(generation)


def _worst(errors: list[Exception]) -> Exception:
    """A loss that came with silence, which alone ends in a restart, before others."""
    return next((error for error in errors if isinstance(error, ShardLost) and error.silent), errors[0])


def in_common(statuses: Sequence[ShardStatus]) -> ShardStatus:
    """The status of a shard whose replicas have these: served, staged and prepared is what all of them have.

    A replica that serves a generation counts as having staged and prepared it; one that does not know it has -1 rows.
    `committed` is the newest of any replica.
    """
    first = statuses[0]
    generations = {
        number: version
        for number, version in first.generations.items()
        if all(status.generations.get(number) == version for status in statuses)
    }
    newest = [status for status in statuses if status.committed == max(one.committed for one in statuses)]
    return ShardStatus(
        shard_number=first.shard_number,
        start=first.start,
        stop=first.stop,
        committed=newest[0].committed,
        generations=generations,
        in_flight=sum(status.in_flight for status in statuses),
        building=_staged_by_all(statuses, [status.building for status in statuses]),
        deriving=_staged_by_all(statuses, [status.deriving for status in statuses]),
        corpora={number: first.corpora.get(number, 0) for number in generations},
        hidden=min(status.hidden for status in statuses),
        num_living=min(status.num_living for status in statuses),
        oldest_version=min(status.oldest_version for status in newest),
        figures=next((s.figures for s in newest if s.figures.recall is not None), newest[0].figures),
    )


def _staged_by_all(statuses: Sequence[ShardStatus], stagings: Sequence[StagingStatus | None]) -> StagingStatus | None:
    """Return what all replicas have of the newest generation of `stagings`, which are theirs in the same order.

    Its corpus version is -1 if the replicas differ in it.
    """
    newest = max((one for one in stagings if one is not None), key=lambda one: one.generation, default=None)
    if newest is None:
        return None
    parts = list[StagingStatus]()
    for status, staging in zip(statuses, stagings, strict=True):
        if newest.generation in status.generations:
            corpus_version = status.corpora.get(newest.generation, 0)
            parts.append(replace(newest, rows=newest.wanted, corpus_version=corpus_version, prepared=True))
        elif staging is not None and staging.generation == newest.generation:
            parts.append(staging)
        else:
            parts.append(replace(newest, rows=-1, corpus_version=-1, prepared=False))
    corpora = {part.corpus_version for part in parts}
    return replace(
        newest,
        rows=min(part.rows for part in parts),
        corpus_version=corpora.pop() if len(corpora) == 1 else -1,
        prepared=all(part.prepared for part in parts),
    )
