"""What the training loop asks of an index: hits for query vectors now, and a newer index later.

The loop produces query vectors and encoder weights; the service (Ray actors in a run, a plain object in a test)
answers searches and rebuilds itself. `submit` and `publish` return at once; the only calls that wait are
`PendingHits.result`, `wait_for_version` and `save_generation`, and each wait is bounded.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from indexing.merge import Hits


@dataclass(frozen=True)
class IndexStatus:
    """A cheap, possibly slightly old, view of the index for the metrics."""

    generation: int
    weights_version: int
    generations_committed: int  # in this run
    refresh_seconds: float  # of the newest committed generation
    refresh_passages_per_s: float
    failures: int


class PendingHits(Protocol):
    """A search under way."""

    def result(self) -> Hits:
        """Wait for the hits. Raises TimeoutError that names `index.search_timeout_s`."""
        ...


class IndexService(Protocol):
    """A sharded index that follows the encoder."""

    num_passages: int

    def submit(self, queries: np.ndarray, k: int) -> PendingHits:
        """Start a search of float32 `queries` [batch, dim]; every query is answered by one generation."""
        ...

    def publish(self, weights_version: int, weights: dict[str, np.ndarray]) -> None:
        """Hand out the passage encoder's weights of optimiser step `weights_version`; returns at once."""
        ...

    def wait_for_version(self, weights_version: int, timeout_s: float) -> None:
        """Wait until a generation of that version or a newer one serves. Raises TimeoutError."""
        ...

    def save_generation(self, generation: int, timeout_s: float) -> str:
        """Make sure that `generation` is on disk; returns its directory."""
        ...

    def status(self) -> IndexStatus:
        """The newest known state; never waits."""
        ...
