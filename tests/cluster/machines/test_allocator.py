"""The processes of a Ray that is started here keep the memory that they free."""

import platform
import resource
import threading
from typing import Any

import pytest
import ray
import torch

from cluster.machines.allocator import VARIABLE, keeping_freed_memory
from cluster.machines.session import Session

NUMBERS = 12_000_000  # of float32, 48 MB: mapped each time by default, whatever was freed before


class Computing:
    """An actor that makes and frees large tensors."""

    def faults(self) -> int:
        """Pages that are faulted in for ten tensors, one after another, in a thread, as a trainer computes."""
        counted: list[int] = []

        def work() -> None:
            torch.ones(NUMBERS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(NUMBERS)
            counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return counted[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="waits for glibc, the C library that reads the variable")
def test_a_freed_tensor_serves_the_next_one(ray_session: Session) -> None:
    """An actor of a Ray that was started here, and one that was started with glibc's own ways."""
    remote: Any = ray.remote
    plain = {"env_vars": {VARIABLE: "glibc.malloc.check=0"}}
    actors = [remote(Computing).options(num_cpus=0, **options).remote() for options in ({"runtime_env": plain}, {})]
    mapped, kept = ray.get([actor.faults.remote() for actor in actors], timeout=240)
    assert kept < 1000 < 10_000 < mapped


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "LD_PRELOAD", VARIABLE])
def test_who_chose_an_allocator_keeps_it(name: str) -> None:
    assert keeping_freed_memory({"HOME": "/", name: "x"}) == {}
