"""One shard in several processes: each replica stages, prepares and commits alike, so that any of them may answer.

To the refresh they are one shard (`ReplicatedShard` is a `ShardPort`): it has a generation when every replica has it,
and is lost while one of them is. All or none then holds over replicas as it does over shards. What is done again at a
replica that has it already does nothing (`indexing.shard.shard.Shard`), so a replica that comes back empty is filled by
filling the shard. Searches meanwhile are answered by the others (`cluster/service/fanout.py`).

Who waits for whom: each call goes to all replicas at the same time and waits for all, as long as the ports allow.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from cluster.refresh.ports import P, ShardLost, ShardMethod, ShardPort, T
from indexing.shard.serving import MAX_COMMITTED, GenerationGone
from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus
from indexing.shard.staging import StagingStatus


class ReplicatedShard:
    """Two or more replicas of one shard as a `ShardPort`."""

    def __init__(self, replicas: Sequence[ShardPort]) -> None:
        self.number, self.start, self.stop = replicas[0].number, replicas[0].start, replicas[0].stop
        self._replicas = tuple(replicas)
        self._silent: set[int] = set()  # replicas that did not answer when they were last asked

    @property
    def doing(self) -> str:
        return "; ".join(filter(None, (replica.doing for replica in self._replicas)))

    def status(self) -> ShardStatus:
        """Return what all replicas have. Raises ShardLost when one does not answer."""
        return in_common(self._each(lambda replica: replica.status()))

    def lacking(self, generation: int) -> str:
        return " and ".join(filter(None, self._each(lambda replica: replica.lacking(generation))))

    def call(self, method: ShardMethod[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Have every replica carry out `method`; `Shard.save` one of them alone, as their files are alike."""
        if method is Shard.save:
            return self._first(lambda replica: replica.call(method, *arguments, **named))
        if method is Shard.commit:
            return self._each(lambda replica: _with_room(replica, lambda: replica.call(method, *arguments, **named)))[0]
        return self._each(lambda replica: replica.call(method, *arguments, **named))[0]

    def restart(self) -> None:
        """Kill the replicas that stay silent; all of them where none does."""
        silent = sorted(self._silent) or range(len(self._replicas))
        for number in silent:
            self._replicas[number].restart()

    def _first(self, call: Callable[[ShardPort], T]) -> T:
        """Return the answer of the first replica that has what is asked for. Raises what the last one raised."""
        for replica in self._replicas[:-1]:
            with suppress(ShardLost, GenerationGone):
                return call(replica)
        return call(self._replicas[-1])

    def _each(self, call: Callable[[ShardPort], T]) -> list[T]:
        """Return the answer of each replica. Raises what one of them refused, else ShardLost when one was lost."""

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


def _with_room(replica: ShardPort, commit: Callable[[], T]) -> T:
    """Commit; if there is no room, close the oldest generation first: the replicas that lost it cannot serve it
    either."""
    try:
        return commit()
    except ValueError:
        served = replica.status().generations
        if len(served) < MAX_COMMITTED:
            raise
        replica.call(Shard.release, min(served))
        return commit()


def _worst(errors: list[Exception]) -> Exception:
    """Return a loss that came with silence, which alone ends in a restart, before others."""
    return next((error for error in errors if isinstance(error, ShardLost) and error.silent), errors[0])


def in_common(statuses: Sequence[ShardStatus]) -> ShardStatus:
    """Return the status of a shard whose replicas have these: served, staged and prepared is what all of them have.

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
        steps=tuple(step for status in statuses for step in status.steps),
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
