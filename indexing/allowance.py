"""Tells how many processors and how much memory this process may use, which may be less than its machine has.

Containers, pods, jobs of a scheduler and units of systemd are limited by control groups, of version 1 or 2, and a group
obeys the limits of all groups above it, too (https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/). A
processor affinity (`taskset`, a job of Slurm) is a limit of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")  # where /proc and /sys lie
# In version 2 and in version 1: limit, bytes in use, and the part of them that the kernel gives back when it is asked
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def usable_cpus(root: Path = ROOT) -> int:
    """Return the number of processors that this process can keep busy: those of its affinity, or as many whole ones as
    the quota of its control groups gives, at least 1."""
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota = _numbers(group / "cpu.max") or [
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0] > 0:  # without a limit: "max 100000", or -1
            cpus = min(cpus, quota[0] / quota[1])
    return max(1, int(cpus))


def usable_memory(root: Path = ROOT) -> tuple[float, float]:
    """Return the bytes of memory that this process may use, together with all others of its control groups, and those
    of them that are free now."""
    machine = psutil.virtual_memory()
    total, free = float(machine.total), float(machine.available)
    for group in _groups(root, "memory"):
        for limit_file, used_file, cached in MEMORY_FILES:
            limit, used = _numbers(group / limit_file), _numbers(group / used_file)
            if limit and used and limit[0] < machine.total:
                words = _text(group / "memory.stat").split()
                kept = used[0] - (float(words[words.index(cached) + 1]) if cached in words else 0.0)
                total, free = min(total, limit[0]), max(0.0, min(free, limit[0] - kept))
    return total, free


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders in which the control group of this process, and those above it, may lie; a container sees only
    some of them."""
    for entry in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = entry.split(":", 2)
        if not controllers or controller in controllers.split(","):
            here = PurePosixPath(path.lstrip("/"))
            for top in {controllers, controller} if controllers else ("", "unified"):
                yield from (root / "sys/fs/cgroup" / top / group for group in (here, *here.parents))


def _text(path: Path) -> str:
    """Return the text of a file, none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _numbers(path: Path) -> list[float]:
    """Return the numbers of a file; the word "max" is none."""
    return [float(word) for word in _text(path).split() if word != "max"]
