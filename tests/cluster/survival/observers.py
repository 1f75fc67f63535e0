"""The actors of a running service as a test sees them: their processes and states, and a hand on a shard's steps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError as ActorError

from cluster.service.search import IndexClient
from cluster.service.start import IndexServiceHandle
from indexing.shard.shard_status import ShardStatus

WAIT_S = 90.0
POLL_S = 0.002


def actor(name: str) -> Any:
    """Handle of a named actor."""
    return ray.get_actor(name, namespace="tests")


def patiently(submit: Callable[[], Any], timeout_s: float) -> Any:
    """What a call of an actor returns, which may just be starting again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(submit(), timeout=max(0.1, deadline - time.monotonic()))
        except ActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def inside(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(actor's object, *arguments)`, run in the process of an actor."""
    return patiently(lambda: actor(name).__ray_call__.remote(function, *arguments), 60)


def process_of(name: str, timeout_s: float = 60.0) -> int:
    """Process id of an actor that works."""
    return patiently(lambda: actor(name).__ray_call__.remote(_pid), timeout_s)


def kill(name: str) -> int:
    """SIGKILL; returns the process id."""
    process = process_of(name)
    os.kill(process, signal.SIGKILL)
    return process


def status_of(name: str) -> ShardStatus:
    """Status of a shard actor that answers."""
    return patiently(lambda: actor(name).status.remote(), 60)


def staged_rows(name: str) -> int:
    """Number of rows that a shard actor has staged of a generation that is to be built."""
    building = status_of(name).building
    return 0 if building is None else building.rows


def is_prepared(name: str) -> bool:
    """True if a shard actor has prepared a generation that is to be built."""
    building = status_of(name).building
    return building is not None and building.prepared


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait until `condition()` is true, and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} after {timeout_s:.0f} s"
        time.sleep(POLL_S)
    return found


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """SIGSTOP while the block runs; one that was killed meanwhile is left alone."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            try:
                os.kill(process, signal.SIGCONT)
            except ProcessLookupError:
                continue


class Held:
    """A shard whose next step of a refresh waits until it is let go on: a real one, slow at a known place."""

    def __init__(self, name: str, step: str) -> None:
        """`step`: prepare (all rows are staged then, on all shards) or commit (all are prepared then)."""
        self._name = name
        inside(name, _hold, step)

    def reached(self) -> bool:
        """Whether the shard is there, and waits."""
        return inside(self._name, _is_held)

    def release(self) -> None:
        """Let it go on; harmless after its death."""
        inside(self._name, _release)


def serve(service: IndexServiceHandle, version: int, weights: Any) -> IndexClient:
    """A client of a service that serves this weights version, also on disk."""
    client = service.connect()
    client.publish(version, weights)
    client.wait_for_version(version, WAIT_S)
    client.save_generation(client.status().generation, WAIT_S)
    return client


def _pid(_: Any) -> int:
    return os.getpid()


def _hold(actor: Any, step: str) -> None:
    shard, method = actor._shard, getattr(actor._shard, step)
    actor.test_held, actor.test_release = held, release = threading.Event(), threading.Event()

    def hold(*arguments: Any) -> Any:
        setattr(shard, step, method)
        held.set()
        release.wait(60)
        return method(*arguments)

    setattr(shard, step, hold)


def _is_held(actor: Any) -> bool:
    return hasattr(actor, "test_held") and actor.test_held.is_set()


def _release(actor: Any) -> None:
    if hasattr(actor, "test_release"):
        actor.test_release.set()
