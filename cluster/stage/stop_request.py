"""Carries the request to stop from the driver of a stage to its trainers, on whatever machine they are.

    driver                      `run_until_stopped` runs the trainers in a thread; a signal interrupts its wait
      |-- StopDesk (actor)      `ask` by the driver; `asked` is awaited by every trainer
      '-- trainer               a thread of each waits for `asked`; the stage looks at the flag between two batches

The driver waits for the trainers to save and end, bounded by `cluster.stop_timeout_s`, and not at all where no trainer
has begun.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from cluster.machines import stopping
from cluster.service.ray_ports import get

TEARDOWN_S = 10.0  # of the bound: ending the index service and Ray takes a few seconds
CALL_S = 5.0  # for a call that never waits, on a machine that may be loaded


class StopDesk:
    """An actor that knows of the request, and whether a trainer has begun."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._begun = False

    async def ask(self) -> bool:
        """Ask for the stop. Returns true if a trainer will answer."""
        self._asked.set()
        return self._begun

    async def asked(self) -> None:
        """Wait for the request."""
        self._begun = True
        await self._asked.wait()


def make_desk() -> ActorHandle:
    """Start the actor; it ends when the driver drops the handle."""
    remote: Any = ray.remote  # its stubs know no concurrency of actors
    return remote(num_cpus=0, max_concurrency=1000)(StopDesk).remote()


def watch(desk: ActorHandle) -> Callable[[], bool]:
    """Return what tells a trainer, without waiting, whether it is to stop."""
    flag = threading.Event()

    def wait() -> None:
        try:
            ray.get(desk.asked.remote())
        except RayError:  # the driver has gone, and takes the trainers with it
            return
        flag.set()

    threading.Thread(target=wait, name="stop-request", daemon=True).start()
    return flag.is_set


def run_until_stopped(work: Callable[[], None], desk: ActorHandle) -> None:
    """Run `work`, which trains, in a thread, so that signals are answered at once. Raises what it raises. A
    KeyboardInterrupt asks the trainers to stop, waits for them, and is raised again."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # the edge of a thread: raised below
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="trainers", daemon=True).start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        if _ask(desk):
            ended.wait(max(1.0, stopping.left_s() - TEARDOWN_S))
        raise
    if failures:
        raise failures[0]


def _ask(desk: ActorHandle) -> bool:
    """Send the request. Returns true if a trainer may answer it."""
    try:
        return bool(get(desk.ask.remote(), CALL_S))
    except GetTimeoutError:  # it arrives all the same
        return True
    except RayError:
        return False
