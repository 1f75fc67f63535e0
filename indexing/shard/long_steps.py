"""The steps of a shard that take as long as its index is large: a build, a save, a load.

A shard reports them in its status, so that the process that waits for one can tell a large index from a hung process,
and say what it waits for.
"""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Bytes a second that an index is read and written with, where it is not slow: half of a common network disk's 100 MB/s,
# since a save reads its files once more for their checksums.
DISK_BYTES_PER_S = 50e6


@dataclass(frozen=True, kw_only=True)
class LongStep:
    """A view of a step that is under way."""

    name: str  # prepare | save | load
    generation: int
    seconds: float  # since it began
    expected_s: float  # seconds that it is estimated to take

    def __str__(self) -> str:
        doing = {"prepare": "builds", "save": "writes", "load": "reads"}[self.name]
        return f"{doing} generation {self.generation}: {self.seconds:.0f} s of about {self.expected_s:.0f} s"


class LongSteps:
    """The steps of one shard that are under way; may be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[tuple[str, int], tuple[float, float]] = {}  # -> time.monotonic(), estimate in seconds

    @contextmanager
    def under_way(self, name: str, generation: int, expected_s: float, alone: bool = False) -> Iterator[None]:
        """Report a step while the block runs. With `alone`, raises OSError while another one of this name is under
        way."""
        key = name, generation
        with self._lock:
            others = [other for kind, other in self._begun if kind == name]
            if alone and others:
                raise OSError(errno.EBUSY, f"generation {others[0]} is still being written")
            self._begun[key] = time.monotonic(), expected_s
        try:
            yield
        finally:
            with self._lock:
                self._begun.pop(key, None)

    def now(self) -> tuple[LongStep, ...]:
        """Return the steps under way, the oldest first."""
        now = time.monotonic()
        with self._lock:
            return tuple(
                LongStep(name=name, generation=generation, seconds=now - begun, expected_s=expected_s)
                for (name, generation), (begun, expected_s) in self._begun.items()
            )
