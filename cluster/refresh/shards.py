"""All shards of an index, as the refresh talks to them: at the same time, each answer with its error."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.refresh.ports import Events, RefreshFailed, ShardLost, ShardPort
from indexing.dense.probe import Figures, combined
from indexing.shard.shard_status import ShardStatus

POLL_S = 0.2  # Seconds between two looks at a shard that is awaited


class ShardGroup:
    """Shards 0..n-1, together the whole corpus."""

    def __init__(self, shards: Sequence[ShardPort]) -> None:
        self._shards = tuple(shards)
        self.num_passages = sum(shard.stop - shard.start for shard in shards)

    def __iter__(self) -> Iterator[ShardPort]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def pick(self, numbers: Iterable[int]) -> list[ShardPort]:
        """Return the shards with these numbers."""
        return [self._shards[number] for number in sorted(numbers)]

    def each(
        self, call: Callable[[ShardPort], object], shards: Sequence[ShardPort] | None = None
    ) -> dict[int, Exception | None]:
        """`call` on each of `shards` (all of them), at the same time; what each raised, by shard number."""

        def guarded(shard: ShardPort) -> Exception | None:
            try:
                call(shard)
            except Exception as error:  # the edge of a thread: the caller looks at the error of each shard
                return error
            return None

        chosen = self._shards if shards is None else tuple(shards)
        if not chosen:
            return {}
        with ThreadPoolExecutor(len(chosen)) as threads:
            return dict(zip((shard.number for shard in chosen), threads.map(guarded, chosen), strict=True))

    def lacking(self, has: Callable[[ShardStatus, int], bool], generation: int) -> set[int]:
        """Return the numbers of shards that do not answer, or of which `has(status, generation)` is not true."""
        statuses = self.statuses()
        return {number for number, status in statuses.items() if status is None or not has(status, generation)}

    def serving(self, generation: int) -> list[ShardStatus]:
        """Return the status of each shard that answers, with `generation` as its newest."""
        statuses = self.statuses().values()
        return [status for status in statuses if status is not None and status.committed == generation]

    def statuses(self) -> dict[int, ShardStatus | None]:
        """Return the status of each shard, by number, None for one that is lost; all are asked at the same time, so
        that silent ones cost one wait."""
        statuses = dict[int, ShardStatus | None]()

        def ask(shard: ShardPort) -> None:
            statuses[shard.number] = status_or_none(shard)

        self.each(ask)
        return {shard.number: statuses.get(shard.number) for shard in self._shards}

    def wait(
        self,
        timeout_s: float,
        in_order: Callable[[ShardStatus], bool] = lambda status: True,
        *,
        shards: Sequence[ShardPort] | None = None,
        hung_s: float = math.inf,
        events: Events | None = None,
    ) -> list[ShardStatus]:
        """Wait until `shards` (all of them) answer and are `in_order`; one that stays silent for `hung_s` is killed,
        which `events` are told. Raises RefreshFailed."""
        deadline = time.monotonic() + timeout_s
        statuses = []
        for shard in self._shards if shards is None else shards:
            silent_since = time.monotonic()
            while isinstance(status := _status_or_loss(shard), ShardLost) or not in_order(status):
                if not isinstance(status, ShardLost) or not status.silent:
                    silent_since = time.monotonic()
                elif (silent_s := time.monotonic() - silent_since) > hung_s:
                    if events is not None:
                        events("shard_killed", shard=shard.number, why=f"silent for {silent_s:.0f} s")
                    shard.restart()
                    silent_since = time.monotonic()
                if time.monotonic() > deadline:
                    raise RefreshFailed(f"index shard {shard.number} did not come back within {timeout_s:.0f} s")
                time.sleep(POLL_S)
            statuses.append(status)
        return statuses


def figures_of(statuses: Iterable[ShardStatus]) -> Figures:
    """Return cost and recall of the newest generation, over these shards."""
    return combined([(status.num_living, status.figures) for status in statuses if status.num_living])


def status_or_none(shard: ShardPort) -> ShardStatus | None:
    """Return the shard's status, None while it is lost."""
    status = _status_or_loss(shard)
    return None if isinstance(status, ShardLost) else status


def _status_or_loss(shard: ShardPort) -> ShardStatus | ShardLost:
    try:
        return shard.status()
    except ShardLost as lost:
        return lost
