"""Holds the table of one shard: the generations that serve, their users, and the passages that none returns any more.

A search pins the generation that it asks, so that it is not freed meanwhile. `release` takes a generation off the table
at once and waits, with a bound, until the last user that pinned it is done; `hide` waits likewise for the searches that
began before it. The end of those unblocks them; nothing here waits for anything else.

`lock` guards the table and is taken for moments only. What a shard stages changes together with the table, so that it
takes the same lock. Methods that say so are called with it held.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from indexing.shard.generation import Generation

MAX_COMMITTED = 2  # big indexes that are served
MAX_OPEN = 16  # generations that are served; those derived from one another share their big index


class GenerationGone(Exception):
    """The generation asked for is not, or no longer, served; `committed` is the newest that is (-1: none)."""

    def __init__(self, generation: int, committed: int) -> None:
        super().__init__(generation, committed)
        self.generation, self.committed = generation, committed

    def __str__(self) -> str:
        return f"generation {self.generation} is not served, the newest is {self.committed}"


@dataclass
class Served:
    """A generation on the table."""

    generation: Generation
    users: int = 0
    released: bool = False


class ServingTable:
    """The table of one shard."""

    def __init__(self, shard_number: int) -> None:
        self.shard_number = shard_number
        self.lock = threading.Condition()
        self.served: dict[int, Served] = {}
        self.hidden, self.hidden_version = np.empty(0, np.int64), 0
        self._era = 0  # grows with every `hide`
        self._searching: Counter[int] = Counter()  # searches under way, by the era that they began in

    def newest(self) -> int:
        """Return the newest generation that serves, -1 without one. Call with the lock held."""
        return max((number for number, served in self.served.items() if not served.released), default=-1)

    def is_open(self, generation: int) -> bool:
        """Return True if it serves and was not released. With the lock held."""
        return generation in self.served and not self.served[generation].released

    def open_ones(self) -> dict[int, Generation]:
        """Return the generations that serve and were not released, by number. Call with the lock held."""
        return {number: one.generation for number, one in self.served.items() if not one.released}

    def add(self, number: int, generation: Generation) -> None:
        """Put a generation on the table, without what was deleted. Raises ValueError where two big indexes serve
        already, and for vectors of another number of dimensions. With the lock held."""
        indexes = {one.generation.base.key for one in self.served.values()} | {generation.base.key}
        if len(indexes) > MAX_COMMITTED or len(self.served) >= MAX_OPEN:
            raise ValueError(
                f"shard {self.shard_number} serves generations {sorted(self.served)}: release the older one before "
                f"{number} comes"
            )
        for other_number, other in self.served.items():
            dims = {other.generation.dim, generation.dim} - {0}
            if len(dims) > 1:
                raise ValueError(
                    f"generation {other_number} has {other.generation.dim} dimensions, {number} {generation.dim}"
                )
        if len(self.hidden):
            generation.hide(self.hidden)
        self.served[number] = Served(generation)
        self.lock.notify_all()

    def release(self, generation: int, timeout_s: float) -> None:
        """Stop serving `generation` and free it when its users are done. Errors as `Shard.release`."""
        with self.lock:
            served = self.served.get(generation)
            if served is None:
                return
            if generation == self.newest():
                raise ValueError(f"generation {generation} is the newest on shard {self.shard_number}: it has to serve")
            served.released = True
            self._free(generation)
            if not self.lock.wait_for(lambda: self.served.get(generation) is not served, timeout_s):
                raise TimeoutError(f"generation {generation} still has {served.users} users after {timeout_s:g} s")

    def hide(self, corpus_version: int, numbers: np.ndarray, timeout_s: float) -> None:
        """Return none of these sorted passage numbers any more. Errors as `Shard.hide`."""
        with self.lock:
            if corpus_version > self.hidden_version:
                self.hidden, self.hidden_version = np.asarray(numbers, np.int64), corpus_version
                for served in self.served.values():
                    served.generation.hide(self.hidden)
                self._era += 1
            now = self._era

            def earlier() -> bool:
                return any(count for era, count in self._searching.items() if era < now)

            if not self.lock.wait_for(lambda: not earlier(), timeout_s):
                raise TimeoutError(f"searches that began before {corpus_version} was hidden last {timeout_s:g} s")

    @contextmanager
    def pinned(self, generation: int | None) -> Iterator[tuple[int, Generation]]:
        """Keep a generation (None: the newest) from being freed while the block runs. Raises GenerationGone."""
        with self.lock:
            number = self.newest() if generation is None else generation
            served = self.served.get(number)
            if served is None or served.released:
                raise GenerationGone(number, self.newest())
            served.users += 1
        try:
            yield number, served.generation
        finally:
            with self.lock:
                served.users -= 1
                if served.released:
                    self._free(number)

    @contextmanager
    def counted(self) -> Iterator[int]:
        """Let `hide` know of a search that began before it; which corpus version's deletions the search keeps to."""
        with self.lock:
            era, hidden = self._era, self.hidden_version
            self._searching[era] += 1
        try:
            yield hidden
        finally:
            with self.lock:
                self._searching[era] -= 1
                if era < self._era and not self._searching[era]:
                    del self._searching[era]
                    self.lock.notify_all()

    def _free(self, generation: int) -> None:
        """Forget a released generation without users. With the lock held."""
        served = self.served.get(generation)
        if served is not None and served.released and not served.users:
            del self.served[generation]
            self.lock.notify_all()
