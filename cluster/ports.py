"""What the refresh asks of the other processes, and the words that it uses with them.

In a run the ports are Ray handles (`cluster/handles.py`); a test may put plain objects behind them. Every call is
bounded: it returns, or raises `ShardLost` or `WorkerLost` when the process died, is being restarted, or stays silent.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from indexing.shard import ShardStatus


def has_prepared(status: ShardStatus, generation: int) -> bool:
    """Whether the shard could commit `generation` at once."""
    return status.prepared and status.staged == generation


def has_staged_all(status: ShardStatus, generation: int) -> bool:
    """Whether every row of `generation` is staged."""
    return status.staged == generation and status.staged_rows == status.stop - status.start


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
    """Published encoder weights. `publish_id` is never 0 and tells two publishes of one version apart."""

    version: int  # optimiser step
    publish_id: int
    reference: Any  # how a worker gets at the arrays; the refresh only hands it on


@dataclass(frozen=True)
class Chunk:
    """Passage numbers start to stop - 1, all of one shard."""

    shard: int
    start: int
    stop: int


class Events(Protocol):
    """Where a refresh reports what happened."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Note one event; never raises."""
        ...


class ShardPort(Protocol):
    """One shard: passage numbers start to stop - 1. See `indexing.shard.Shard` for what the calls do."""

    number: int
    start: int
    stop: int

    def status(self) -> ShardStatus: ...

    def prepare(self, generation: int) -> None: ...

    def commit(self, generation: int) -> None: ...

    def abort(self, generation: int) -> None: ...

    def release(self, generation: int) -> None: ...

    def save(self, generation: int, directory: str) -> None: ...

    def load(self, generation: int, directory: str) -> None: ...

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
