"""The ports of the refresh as Ray actor handles. Every wait is bounded, and Ray's errors become `...Lost`.

A call to an actor that died ends with an error within seconds; one to an actor that is stopped never ends, which is
why each has a timeout. Errors that the called method raised itself arrive as what they were.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from cluster.machines.processes import Place, end
from cluster.refresh.ports import (
    Chunk,
    P,
    RefreshFailed,
    ShardLost,
    ShardMethod,
    ShardPort,
    T,
    Weights,
    WorkerLost,
)
from cluster.refresh.replicas import ReplicatedShard
from indexing.corpus.snapshot import named_errors
from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus

STATUS_S = 10.0  # Seconds for a status, which waits for nothing; a loaded machine is slow
QUICK_S = 90.0  # Seconds for calls that wait for a search or a lock at most (release: 60)
LOOK_S = 5.0  # Seconds between two looks at a long step
LONG = (Shard.prepare, Shard.save, Shard.load)  # as long as the index is large


@dataclass(frozen=True)
class Patience:
    """Bounds of what takes as long as an index is large."""

    base_s: float  # refresh.chunk_timeout_s
    slack: float  # refresh.estimate_slack

    def limit_s(self, expected_s: float) -> float:
        """Return the seconds after which a step that is estimated to take `expected_s` is given up."""
        return self.base_s + self.slack * expected_s


class NamedActor:
    """A named actor, looked up when it is first called: the one who refers to it may be older than the actor."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name = name
        self._namespace = namespace
        self._handle: ActorHandle | None = None
        self.place: Place | None = None  # where its process is, if somebody has asked

    def handle(self) -> ActorHandle:
        """Return the handle; it stays good when the actor is restarted. Raises ValueError when there is no such
        actor."""
        if self._handle is None:
            self._handle = ray.get_actor(self.name, namespace=self._namespace)
        return self._handle

    def submit(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method; returns its reference (or references)."""
        return getattr(self.handle(), method).remote(*arguments, **named)

    def find_place(self) -> None:
        """Ask the actor where it is, unless that is known; `kill` may need it when it answers no more."""
        if self.place is None:
            self.place = get(self.submit("place"), STATUS_S)

    def kill(self) -> None:
        """End the process, whatever it does; Ray starts another one."""
        place, self.place = self.place, None
        ray.kill(self.handle(), no_restart=False)
        if place is not None:
            end(place)


def get(reference: Any, timeout_s: float | None = None) -> Any:
    """Return the value (or values) behind a reference (or references)."""
    return ray.get(reference, timeout=timeout_s)


def own_error(error: RayTaskError) -> Exception:
    """Return the error that the remote method raised."""
    return error.cause if isinstance(error.cause, Exception) else error


class RayShard:
    """A `ShardPort`."""

    def __init__(
        self, number: int, start: int, *, stop: int, actor: NamedActor, patience: Patience, name: str = ""
    ) -> None:
        """`patience` bounds what builds, reads or writes an index; `name` is for messages."""
        self.number, self.start, self.stop = number, start, stop
        self._name = name or f"shard {number}"
        self.actor = actor
        self._patience = patience
        self._doing = dict[str, str]()  # method -> sentence

    @property
    def doing(self) -> str:
        return "; ".join(list(self._doing.values()))

    def status(self) -> ShardStatus:
        return self._call("status", timeout_s=STATUS_S)

    def lacking(self, generation: int) -> str:
        return "" if generation in self.status().generations else self._name

    def call(self, method: ShardMethod[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Have the actor carry out `method`, within a bound that depends on what it does. A build that passes its bound
        costs the shard, which then comes back empty; of a save or load that does, TimeoutError is raised."""
        if method in LONG:
            return self._long(method.__name__, *arguments, **named)
        return self._call(method.__name__, *arguments, timeout_s=QUICK_S, **named)

    def restart(self) -> None:
        try:
            self.actor.kill()
        except (RayError, ValueError) as error:
            raise ShardLost(f"{self._name} cannot be killed: {error}") from error

    def _long(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method once, and wait as long as the shard reports that it is at it, within the bound of its
        estimate."""
        with self._losses(method, STATUS_S):
            self.actor.find_place()
            reference = self.actor.submit(method, *arguments, **named)
        begin = heard = time.monotonic()
        expected_s = 0.0
        try:
            while True:
                with self._losses(method, LOOK_S), suppress(GetTimeoutError):
                    return get(reference, LOOK_S)
                now = time.monotonic()
                try:
                    steps = [step for step in self.status().steps if step.name == method]
                    heard = now
                except ShardLost as lost:
                    if not lost.silent or now - heard > QUICK_S:
                        raise
                    continue
                if steps:
                    expected_s = steps[-1].expected_s
                    self._doing[method] = f"{self._name} {steps[-1]}"
                if now - begin > self._patience.limit_s(expected_s):
                    raise self._overdue(method, now - begin, expected_s)
        finally:
            self._doing.pop(method, None)

    def _overdue(self, method: str, seconds: float, expected_s: float) -> Exception:
        """Return the error of a long step that passed its bound."""
        why = f"{self._name} has been at {method} for {seconds:.0f} s; about {expected_s:.0f} s were expected"
        why += f" (refresh.chunk_timeout_s={self._patience.base_s:g}, refresh.estimate_slack={self._patience.slack:g})"
        if method != Shard.prepare.__name__:
            return TimeoutError(why)
        self.restart()  # the build would go on beside the next one
        return ShardLost(why)

    def _call(self, method: str, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        with self._losses(method, timeout_s):
            self.actor.find_place()
            return get(self.actor.submit(method, *arguments, **named), timeout_s)

    @contextmanager
    def _losses(self, method: str, timeout_s: float) -> Iterator[None]:
        """Raise Ray's errors of the block, which calls `method`, as those of a port."""
        try:
            yield
        except GetTimeoutError:
            raise ShardLost(f"{self._name} did not answer {method} in {timeout_s:g} s", silent=True) from None
        except RayTaskError as error:
            raise own_error(error) from error
        except RayError as error:
            self.actor.place = None
            # A stopped process takes no new connection: who has none yet is told that it is unavailable.
            silent = isinstance(error, ActorUnavailableError)
            raise ShardLost(f"{self._name}: {type(error).__name__} in {method}", silent=silent) from error


def ray_shard(
    number: int, start: int, *, stop: int, names: Sequence[str], namespace: str, patience: Patience
) -> RayShard | ReplicatedShard:
    """Return the port of a shard whose replicas have these names."""
    labels = [f"shard {number}, replica {replica}" for replica in range(len(names))] if len(names) > 1 else [""]
    replicas = [
        RayShard(number, start, stop=stop, actor=NamedActor(name, namespace), patience=patience, name=label)
        for name, label in zip(names, labels, strict=True)
    ]
    return ReplicatedShard(replicas) if len(replicas) > 1 else replicas[0]


class RayWorker:
    """A `WorkerPort`. The vectors go from the worker's memory to the shard's, never through the caller."""

    def __init__(self, actor: NamedActor, chunk_timeout_s: float) -> None:
        self.name = actor.name
        self._actor = actor
        self._chunk_timeout_s = chunk_timeout_s

    def encode(self, chunk: Chunk, generation: int, weights: Weights, shard: ShardPort) -> None:
        limit = self._chunk_timeout_s
        try:
            self._actor.find_place()
            numbers = None if chunk.numbers is None else np.array(chunk.numbers, np.int64)
            vectors, done = self._actor.submit("encode", chunk.start, chunk.stop, weights, numbers)
            ray.get(done, timeout=limit)
        except GetTimeoutError:
            self._actor.kill()
            raise WorkerLost(f"{self.name} took longer than {limit:g} s (refresh.chunk_timeout_s)") from None
        except RayTaskError as error:
            raise own_error(error) from error
        except RayError as error:
            self._actor.place = None
            raise WorkerLost(f"{self.name}: {type(error).__name__}") from error
        try:
            shard.call(Shard.stage, generation, weights.version, chunk.start if numbers is None else numbers, vectors)
        except RayError as error:  # the vectors were lost with the worker's machine
            raise WorkerLost(f"{self.name}: {type(error).__name__}") from error

    def recover(self) -> None:
        try:
            self._actor.place = None
            self._actor.find_place()
        except GetTimeoutError:
            self._actor.kill()
            raise WorkerLost(f"{self.name} is silent") from None
        except (RayError, ValueError) as error:
            raise WorkerLost(f"{self.name}: {type(error).__name__}") from error


def write_weights(weights: Weights, path: Path, timeout_s: float) -> None:
    """Write published weights to one file. Raises OSError, where they are gone too."""
    try:
        arrays: dict[str, Any] = ray.get(weights.reference[0], timeout=timeout_s)  # arrays by name
    except RayError as error:
        raise OSError(f"weights of version {weights.version} are lost: {type(error).__name__}") from error
    with named_errors(path), path.open("wb") as file:
        np.savez(file, **arrays)


def read_weights(version: int, publish_id: int, path: Path) -> Weights:
    """Read what `write_weights` wrote into objects that this process owns. Raises OSError."""
    with named_errors(path), np.load(path, allow_pickle=False) as arrays:
        return Weights(version, publish_id, [ray.put({name: arrays[name] for name in arrays})])


def keep_weights(weights: Weights, timeout_s: float) -> Weights:
    """Return a copy of published weights that this process owns: the trainer may die while they are used."""
    try:
        arrays = ray.get(weights.reference[0], timeout=timeout_s)
        return replace(weights, reference=[ray.put(arrays)])
    except RayError as error:
        why = f"weights of version {weights.version} are lost: {type(error).__name__}"
        raise RefreshFailed(why, final=True) from error
