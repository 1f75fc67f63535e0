"""The ports: the calls that the refresh makes to other processes, and the types that it exchanges with them.

In a run the ports are Ray handles (`cluster/service/ray_ports.py`); a test may put plain objects behind them. Every
call is bounded: it returns, or raises `ShardLost` or `WorkerLost` when the process died, is being restarted, or stays
silent. A shard's interface is written once, in `indexing.shard.shard.Shard`: a port takes any method of it, with the
arguments that the type checker knows from there, and forwards the call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import numpy as np

from indexing.shard.shard import Shard
from indexing.shard.shard_status import ShardStatus

P = ParamSpec("P")
T = TypeVar("T")
ShardMethod: TypeAlias = Callable[Concatenate[Shard, P], T]  # such as Shard.commit


def has_prepared(status: ShardStatus, generation: int) -> bool:
    """Return True if the shard could commit `generation` at once."""
    return any(staging.prepared and staging.generation == generation for staging in status.staged)


def has_staged_all(status: ShardStatus, generation: int, corpus_version: int = 0) -> bool:
    """Return True if every row that `generation` has at `corpus_version` is staged. (A shard that came back empty may
    have been sent rows before it learnt again which passages the generation has.)"""
    found = [staging for staging in status.staged if staging.generation == generation]
    return bool(found) and (found[-1].rows, found[-1].corpus_version) == (found[-1].wanted, corpus_version)


class ShardLost(Exception):
    """A shard died, is being restarted, or did not answer in time (`silent`). It comes back empty."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class WorkerLost(Exception):
    """A refresh worker died, is being restarted, or did not answer in time."""


class RefreshFailed(Exception):
    """This attempt at a generation is over, and the one before goes on serving. `final`: another would end alike."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True)
class Weights:
    """Published encoder weights, and what is to be encoded with them. `publish_id` is never 0 and tells two publishes
    of one version apart."""

    version: int  # optimiser step
    publish_id: int
    reference: Any  # how a worker gets at the arrays; the refresh only hands it on
    # int64, sorted: passages to encode, where the others are to keep their vectors; None: all
    only: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The generation that answers searches. `weights` is None when a restarted coordinator no longer has them."""

    generation: int
    weights_version: int
    publish_id: int
    weights: Weights | None
    corpus_version: int = 0  # it has every passage that was living then


@dataclass(frozen=True)
class Chunk:
    """Passage numbers start to stop - 1, or those of them that `numbers` names; all of one shard."""

    shard: int
    start: int
    stop: int
    numbers: tuple[int, ...] | None = None

    @property
    def num_passages(self) -> int:
        """Number of passages."""
        return self.stop - self.start if self.numbers is None else len(self.numbers)


class Events(Protocol):
    """The log to which a refresh reports what happened."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Note one event; never raises."""
        ...


class ShardPort(Protocol):
    """One shard in another process: passage numbers `start` to `stop` - 1 of the base corpus."""

    number: int
    start: int
    stop: int

    @property
    def doing(self) -> str:
        """Return what a long step that is waited for is at, for messages; empty: there is none."""
        ...

    def call(self, method: ShardMethod[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Carry out `method`, as in `port.call(Shard.commit, 3)`. Raises what the method raises, and ShardLost."""
        ...

    def status(self) -> ShardStatus:
        """Return what is served and staged. Raises ShardLost."""
        ...

    def lacking(self, generation: int) -> str:
        """Return the names, as used in messages, of the processes that do not serve `generation`; empty if all do."""
        ...

    def restart(self) -> None:
        """Kill a shard that stays silent; an empty one takes its place."""
        ...


class WorkerPort(Protocol):
    """One refresh worker."""

    name: str

    def encode(self, chunk: Chunk, generation: int, weights: Weights, shard: ShardPort) -> None:
        """Encode the chunk's passages with `weights` and stage the vectors at `shard`.

        Raises WorkerLost, ShardLost, or what the encoder raised.
        """
        ...

    def recover(self) -> None:
        """Make sure that the worker answers. Raises WorkerLost while it does not."""
        ...
