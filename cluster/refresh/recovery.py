"""A starting coordinator finds out what serves: from the shards, which outlive it, and from the snapshots.

In this order:
1. The newest generation that every shard has committed or prepared. Its commit was decided or was due, and is now
   driven to its end. (A coordinator that died between two shards' commits leaves exactly this.)
2. The newest generation of this service on disk that every shard can load: each compares the contents of its part. A
   shard that is ahead of it, because the rest of a commit died with its prepared index, starts again empty.
3. What some shards serve; the others died before it was on disk. The repair then asks for a new publish.
4. The snapshot that the run was told to start from.
5. Nothing: the first publish makes the first generation.
What was staged and not prepared is aborted by the next refresh.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from cluster.refresh.ports import Events, Serving, ShardLost, ShardPort
from cluster.refresh.shards import ShardGroup
from cluster.refresh.snapshots import Snapshots, Wish
from indexing.corpus.snapshot import TornSnapshot
from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus


def take_over(
    group: ShardGroup,
    snapshots: Snapshots,
    *,
    events: Events,
    first_generation: int,
    initial: tuple[Wish, str] | None,
    timeout_s: float,
    hung_s: float,
    hide: Callable[[ShardPort, ShardStatus], int],
) -> tuple[Serving | None, int, int]:
    """Return the serving generation, which all living shards then have, the number of the next one, and the version of
    the corpus up to which every shard hides what was deleted.

    `initial` is a snapshot and its directory; `hide` makes sure that a shard returns nothing that was deleted. A shard
    that is silent for `hung_s` is killed: the one who would do that in a run, the repair, starts after this. Raises
    RefreshFailed when a shard does not answer, and what a shard raised that could not load.
    """
    statuses = group.wait(timeout_s, hung_s=hung_s, events=events)
    hidden = [status.hidden for status in statuses]
    for number, (shard, status) in enumerate(zip(group, statuses, strict=True)):
        with suppress(ShardLost):  # it comes back empty, and is told by the repair
            hidden[number] = hide(shard, status)
    served = [set(status.generations) for status in statuses]
    ready = [
        numbers | {staging.generation for staging in status.staged if staging.prepared}
        for numbers, status in zip(served, statuses, strict=True)
    ]
    seen = max(max(status.committed, *(staging.generation for staging in status.staged), -1) for status in statuses)
    directory = None
    load = partial(_load, group, timeout_s=timeout_s)
    if (common := max(set.intersection(*ready), default=None)) is not None:
        group.each(lambda shard: shard.call(Shard.commit, common))
        wish = _wish(statuses, common)
    elif (wish := _newest_that_loads(snapshots, first_generation, load)) is not None:
        directory = str(snapshots.path(wish.generation))
    elif any(served):
        newest = max(set[int]().union(*served))
        wish = _wish(statuses, newest)
    elif initial is not None:
        wish, directory = initial
        load(wish.generation, directory)
    else:
        return None, first_generation, min(hidden)
    serving = Serving(
        generation=wish.generation,
        weights_version=wish.weights_version,
        publish_id=0,
        weights=None,
        corpus_version=wish.corpus_version,
    )
    if directory is None:
        snapshots.want(serving)
    events("index_taken_over", generation=wish.generation, weights_version=wish.weights_version, directory=directory)
    return serving, max(first_generation, seen + 1, wish.generation + 1), min(hidden)


def _newest_that_loads(snapshots: Snapshots, first: int, load: Callable[[int, str], None]) -> Wish | None:
    """Have every shard load the newest generation on disk, from number `first` on, whose contents are whole."""
    for wish in snapshots.on_disk(first):
        try:
            load(wish.generation, str(snapshots.path(wish.generation)))
        except (TornSnapshot, ValueError, OSError) as error:
            snapshots.refuse(str(error))
        else:
            return wish
    return None


def _load(group: ShardGroup, generation: int, directory: str, *, timeout_s: float) -> None:
    """Have every shard load its part. Raises what a shard raised that could not."""
    for shard, status in zip(group, group.wait(timeout_s), strict=True):
        if status.committed > generation:
            shard.restart()
    group.wait(timeout_s, lambda status: status.committed <= generation)
    for error in group.each(lambda shard: shard.call(Shard.load, generation, directory)).values():
        if error is not None and not isinstance(error, ShardLost):  # what is lost, the repair loads
            raise error


def _wish(statuses: Sequence[ShardStatus], generation: int) -> Wish:
    """Return a generation that some shard serves, or has prepared."""
    for status in statuses:
        if generation in status.generations:
            return Wish(generation, status.generations[generation], status.corpora[generation])
        for staging in status.staged:
            if staging.generation == generation and staging.prepared:
                return Wish(generation, staging.weights_version, staging.corpus_version)
    raise AssertionError(f"no shard has generation {generation}")
