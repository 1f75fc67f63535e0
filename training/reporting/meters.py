"""Measures what a step costs: its time part by part, and the memory of this process."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 1024**3


class Timer:
    """Adds up the wall time of a step's named parts.

    Work on a GPU is measured where the CPU waits for it, unless `synchronize` (such as torch.cuda.synchronize) is
    called at the edges of every part, which costs overlap.
    """

    def __init__(
        self, synchronize: Callable[[], object] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time inside the `with` block to part `name`."""
        start = self._now()
        try:
            yield
        finally:
            self.add(name, self._now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to part `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def pop(self) -> dict[str, float]:
        """Return the seconds of every part since the last pop, by name."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()


def memory_metrics() -> dict[str, float]:
    """Return the resident memory of this process and, if torch uses a GPU, the peak of what it allocated there, in
    GiB."""
    metrics = {"perf/memory_rss_gib": _resident_bytes() / GIB}
    torch = sys.modules.get("torch")  # never imported from here: a process without torch holds no GPU memory
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["perf/memory_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
    return metrics


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak stands in for the present
    return peak if sys.platform == "darwin" else peak * 1024
