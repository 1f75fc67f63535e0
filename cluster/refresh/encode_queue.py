"""The queue of passages to encode, and the threads that hand them to the refresh workers.

Producers: `EncodePool.run`, called by the refresh (one whole generation) and by the repair of a shard (one shard of the
serving generation, urgent because searches wait for it). Consumers: one thread per refresh worker.

- A worker's thread waits for a chunk; a new job or `stop` wakes it. While its worker encodes it waits for that worker,
  bounded by refresh.chunk_timeout_s in the port.
- `run` waits until each of its chunks is staged or belongs to a lost shard. It is woken by the threads; if no chunk
  gets done for `stall_s` it gives up with a message.
- `claim` takes a shard away from the jobs under way, as if it had been lost to them, and waits for chunks in flight to
  it: a shard stages one generation at a time, and the repair's comes first.
- A lost worker costs its chunk, which goes back to the front of the queue; its thread then waits for the worker to
  come back, while the others go on.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.refresh.ports import Chunk, Events, RefreshFailed, ShardLost, ShardPort, Weights, WorkerLost, WorkerPort
from indexing.shard.shard import NotBegun

RETRY_S = 0.5  # Seconds between attempts to reach a worker that was lost
STALL_FACTOR = 3.0  # of refresh.chunk_timeout_s without any chunk done: the job is given up


def split(shards: Iterable[ShardPort], chunk_passages: int) -> list[Chunk]:
    """Return the passages of `shards` in chunks that never cross a shard's border."""
    return [
        Chunk(shard.number, start, min(start + chunk_passages, shard.stop))
        for shard in shards
        for start in range(shard.start, shard.stop, chunk_passages)
    ]


def split_numbers(shard: int, numbers: np.ndarray, chunk_passages: int, base: int = 0) -> list[Chunk]:
    """Sorted passage numbers of one shard in chunks; those without a gap, all below `base`, do not list them."""
    chunks: list[Chunk] = []
    for first in range(0, len(numbers), chunk_passages):
        part = numbers[first : first + chunk_passages]
        start, stop = int(part[0]), int(part[-1]) + 1
        listed = None if stop <= base and stop - start == len(part) else tuple(part.tolist())
        chunks.append(Chunk(shard, start, stop, listed))
    return chunks


class Job:
    """The chunks of one generation on their way; guarded by the pool's lock."""

    def __init__(self, generation: int, weights: Weights, chunks: Iterable[Chunk]) -> None:
        self.generation = generation
        self.weights = weights
        self.waiting = deque(chunks)
        self.underway: set[Chunk] = set()
        self.lost_shards: set[int] = set()
        self.losses: Counter[Chunk] = Counter()
        self.error: Exception | None = None
        self.progress = time.monotonic()

    def drop_shard(self, shard: int) -> None:
        """Chunks of `shard` are not wanted any more."""
        self.lost_shards.add(shard)
        self.waiting = deque(chunk for chunk in self.waiting if chunk.shard != shard)
        self.progress = time.monotonic()

    @property
    def finished(self) -> bool:
        """Nothing waits and nothing is under way, or it failed."""
        return self.error is not None or not (self.waiting or self.underway)


class EncodePool:
    """Refresh workers behind one queue."""

    def __init__(
        self,
        workers: Sequence[WorkerPort],
        shards: Iterable[ShardPort],
        *,
        events: Events,
        max_failures: int,
        chunk_timeout_s: float,
    ) -> None:
        self._shards = {shard.number: shard for shard in shards}
        self._events = events
        self._max_failures = max_failures
        self._stall_s = STALL_FACTOR * chunk_timeout_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self.passages_encoded = 0  # by all jobs so far
        for worker in workers:
            threading.Thread(target=self._serve, args=(worker,), name=f"chunks-{worker.name}", daemon=True).start()

    def run(self, generation: int, weights: Weights, chunks: Iterable[Chunk], urgent: bool = False) -> set[int]:
        """Encode and stage `chunks`; returns the numbers of shards that were lost on the way.

        Urgent chunks are taken before all others. Raises RefreshFailed when a chunk was lost too often, when the
        encoder refuses, or when nothing gets done.
        """
        job = Job(generation, weights, chunks)
        with self._changed:
            if urgent:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            self._changed.notify_all()
            while not job.finished:
                self._wait(job)
            self._jobs.remove(job)
        if job.error is not None:
            raise RefreshFailed(str(job.error), final=isinstance(job.error, ValueError)) from job.error
        return job.lost_shards

    def claim(self, shard: int, timeout_s: float) -> None:
        """Drop the chunks of `shard` from all jobs, and wait for those under way. Raises RefreshFailed."""
        with self._changed:
            jobs = list(self._jobs)
            for job in jobs:
                job.drop_shard(shard)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: all(c.shard != shard for j in jobs for c in j.underway), timeout_s):
                raise RefreshFailed(f"chunks for shard {shard} were still under way after {timeout_s:.0f} s")

    def _wait(self, job: Job) -> None:
        """Wait for a change, a second at most; a job without progress fails. Call with the lock held."""
        self._changed.wait(timeout=1.0)
        if self._stopped:
            job.error = RefreshFailed("the index service stops")
        elif time.monotonic() - job.progress > self._stall_s:
            job.error = RefreshFailed(f"no chunk was encoded for {self._stall_s:.0f} s (refresh.chunk_timeout_s)")

    def stop(self) -> None:
        """Fail what runs, and end the threads as soon as their workers answer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _serve(self, worker: WorkerPort) -> None:
        """Run the thread of one worker."""
        while (taken := self._take()) is not None:
            job, chunk = taken
            try:
                worker.encode(chunk, job.generation, job.weights, self._shards[chunk.shard])
            except WorkerLost as lost:
                self._return(job, chunk, lost)
                self._recover(worker, lost)
            except (ShardLost, NotBegun):
                self._finish(job, chunk, None, shard_lost=True)
            except Exception as error:  # the edge of a thread: what the encoder raised belongs to `run`
                self._finish(job, chunk, error)
            else:
                self._finish(job, chunk, None)

    def _take(self) -> tuple[Job, Chunk] | None:
        """Wait for the next chunk and return it; None: stop."""
        with self._changed:
            while not self._stopped:
                for job in self._jobs:
                    if job.waiting and job.error is None:
                        chunk = job.waiting.popleft()
                        job.underway.add(chunk)
                        return job, chunk
                self._changed.wait()
        return None

    def _finish(self, job: Job, chunk: Chunk, error: Exception | None, shard_lost: bool = False) -> None:
        with self._changed:
            job.underway.discard(chunk)
            job.error = job.error or error
            if error is None and not shard_lost:
                self.passages_encoded += chunk.num_passages
            for running in self._jobs:  # urgent chunks hold the others up
                running.progress = time.monotonic()
            if shard_lost:
                job.drop_shard(chunk.shard)
            self._changed.notify_all()

    def _return(self, job: Job, chunk: Chunk, lost: WorkerLost) -> None:
        """Put a lost chunk back in front, unless it was lost too often (perhaps it is what kills the workers)."""
        with self._changed:
            job.underway.discard(chunk)
            job.losses[chunk] += 1
            if job.losses[chunk] > self._max_failures:
                where = f"passages {chunk.start} to {chunk.stop - 1}"
                job.error = RefreshFailed(f"{where} were lost {job.losses[chunk]} times (refresh.max_failures): {lost}")
            elif chunk.shard not in job.lost_shards:
                job.waiting.appendleft(chunk)
            self._changed.notify_all()

    def _recover(self, worker: WorkerPort, lost: WorkerLost) -> None:
        """Wait for a lost worker; the others take its chunk meanwhile."""
        self._events("worker_lost", worker=worker.name, why=str(lost))
        begin = time.monotonic()
        while not self._stopped:
            try:
                worker.recover()
            except WorkerLost:
                time.sleep(RETRY_S)
            else:
                self._events("worker_restarted", worker=worker.name, seconds=round(time.monotonic() - begin, 3))
                return
