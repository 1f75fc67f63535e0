"""Sets how the processes of a Ray that is started here get their memory.

By default glibc maps a large tensor when it is made and unmaps it when it is freed: every step faults the same memory
in again, page by page, and the kernel clears it. Here freed memory stays with the process, and is backed by huge pages
if the kernel gives them on request; only a block of a gigabyte, such as a large index, goes back to the system. Nothing
happens under another C library, which does not read the variable.
"""

import os
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"  # read once, when a process starts
OF_THE_USER = ("MALLOC_", "LD_PRELOAD", VARIABLE)
TUNABLES = {
    "arena_max": 1,  # the arena of a thread is made of 64 MiB pieces and maps larger blocks
    "mmap_threshold": 1 << 30,  # bytes
    "trim_threshold": 1 << 32,
    "hugetlb": 1,  # requested by madvise; glibc 2.35 and later
}


def keeping_freed_memory(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables to start a process with; none if `environment` has chosen already."""
    if any(name.startswith(OF_THE_USER) for name in environment):
        return {}
    return {VARIABLE: ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}
