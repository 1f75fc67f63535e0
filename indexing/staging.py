"""The next generation of one shard while its rows arrive. No locks: `indexing/shard.py` holds one around every call."""

import numpy as np

from indexing.build import Index, bad_rows
from indexing.settings import IndexConfig
from indexing.waiting import WaitingVectors


class Staging:
    """Vectors of passages `start` to `start` + `num_rows` - 1 of one generation, and exactly which have arrived."""

    def __init__(
        self, generation: int, weights_version: int, start: int, num_rows: int, dim: int, config: IndexConfig
    ) -> None:
        self.generation, self.weights_version = generation, weights_version
        self.start, self.num_rows, self.dim = start, num_rows, dim
        self.num_filled = 0  # different rows that have arrived
        self.index: Index | None = None  # once `build` has run
        self._vectors = WaitingVectors(num_rows, dim, config)
        self._filled = np.zeros(num_rows, bool)
        self._broken = np.zeros(num_rows, bool)  # arrived with NaN or infinity

    @property
    def key(self) -> tuple[int, int]:
        """What orders attempts: the generation, then the weights version."""
        return self.generation, self.weights_version

    def fill(self, start: int, vectors: np.ndarray) -> None:
        """Take vectors of the passages from `start` on; rows that came before are replaced."""
        rows = slice(start - self.start, start - self.start + len(vectors))
        self._vectors.put(rows, vectors)
        self._broken[rows] = False
        self._broken[rows][bad_rows(vectors)] = True
        self._filled[rows] = True
        self.num_filled = int(np.count_nonzero(self._filled))

    def build(self, seed: int) -> None:
        """Build `index` and let the vectors go. Raises ValueError for missing rows and numbers that are not finite."""
        if missing := self.num_rows - self.num_filled:
            raise ValueError(
                f"generation {self.generation} has {self.num_filled} of {self.num_rows} rows, {missing} are missing: "
                f"first passage {self.start + int(self._filled.argmin())}"
            )
        if self._broken.any():
            raise ValueError(
                f"generation {self.generation} has {int(self._broken.sum())} vectors that are not finite, "
                f"first passage {self.start + int(self._broken.argmax())}"
            )
        self.index = self._vectors.build(seed)
