"""Chooses the passages of a partial refresh: those that training reads most and whose vectors are oldest come first.

priority = (hits since the passage was encoded + the mean over all passages) x steps since then

The batches of all ranks count, and hits fade with the refreshes (`HALF_LIFE`). Nobody knows how far a passage's vector
has moved without encoding it; the distance grows with the steps since it was encoded, which stand for it. A passage
that nobody reads goes by the mean, so that about half of the choice follows age: a stale vector may be the very reason
why it is not read. With hits alone, fresh passages are read, and are encoded again because they were read, while the
rest of the corpus falls behind them (measured: `benchmarks/results/partial.md`).

Ranks note what they read. At a refresh all of it goes to rank 0, which keeps the counts and chooses. A passage counts
as encoded when a status shows the weights version that it was asked for with. If a refresh failed, or a newer one
overtook it, its passages stay as urgent as they were.
"""

from typing import Any

import numpy as np

from training.engine.ranks import Ranks

HALF_LIFE = 4.0  # Number of refreshes after which a hit counts half
FLOOR = 1e-6  # Share of a hit that counts for every passage: age alone decides if nothing was read yet


class Heat:
    """Hit counts and ages of all passages; rank 0 alone has the arrays."""

    def __init__(self, num_passages: int, ranks: Ranks, step: int = 0) -> None:
        """Begin with passages that were all encoded with the weights of `step`."""
        self.num_passages, self.ranks = num_passages, ranks
        self._read: list[np.ndarray] = []  # hits of this rank since the last gathering
        size = num_passages if ranks.rank == 0 else 0
        self.hits = np.zeros(size, np.float32)
        self.encoded_at = np.full(size, step, np.int32)
        self._asked: tuple[int, np.ndarray | None, np.ndarray] | None = None  # version, passages, their hits then

    def read(self, passages: np.ndarray) -> None:
        """Note that this rank's batch held these passage numbers (any shape; -1 is none)."""
        self._read.append(passages[passages >= 0].astype(np.int64))

    def gather(self, serving_version: int) -> None:
        """Count what all ranks have read. `serving_version` is the weights version of the newest index. Collective."""
        mine = np.concatenate(self._read) if self._read else np.empty(0, np.int64)
        self._read = []
        everyone = self.ranks.gather_objects(mine) if self.ranks.world_size > 1 else [mine]
        if self.ranks.rank:
            return
        read = np.bincount(np.concatenate(everyone), minlength=self.num_passages)
        self._grow(len(read), serving_version)
        self._confirm(serving_version)
        self.hits *= 0.5 ** (1 / HALF_LIFE)
        self.hits += read.astype(np.float32)

    def choose(self, share: float, step: int) -> np.ndarray:
        """Return the numbers of the most urgent passages, rising, int64; at least one. For rank 0."""
        number = max(1, round(share * self.num_passages))
        priority = (self.hits + max(FLOOR, float(self.hits.mean()))) * np.maximum(1, step - self.encoded_at)
        return np.sort(np.argsort(-priority, kind="stable")[:number]).astype(np.int64)

    def ask(self, version: int, passages: np.ndarray | None) -> None:
        """Note that passages (None: all) were asked to be encoded with weights of `version`. For rank 0."""
        chosen = slice(None) if passages is None else passages
        self._asked = (version, passages, self.hits[chosen].copy())

    def state(self) -> dict[str, Any]:
        """Return the part of this rank that a resume needs."""
        read = np.concatenate(self._read) if self._read else np.empty(0, np.int64)
        return {"read": read, "hits": self.hits, "encoded_at": self.encoded_at, "asked": self._asked}

    def restore(self, state: dict[str, Any], step: int | None) -> None:
        """Go on where `state` was taken. If `step` is given, all passages were encoded anew with the weights of this
        step."""
        self._read = [state["read"]]
        self.hits, self.encoded_at, self._asked = state["hits"], state["encoded_at"], state["asked"]
        self.num_passages = max(self.num_passages, len(self.hits))
        if step is not None:
            self.encoded_at = np.full_like(self.encoded_at, step)
            self._asked = None

    def _grow(self, num_passages: int, version: int) -> None:
        """Make room for passages that were added later; they were encoded with the weights that served."""
        more = num_passages - self.num_passages
        if more > 0:
            self.hits = np.pad(self.hits, (0, more))
            self.encoded_at = np.pad(self.encoded_at, (0, more), constant_values=version)
            self.num_passages = num_passages

    def _confirm(self, serving_version: int) -> None:
        """Take note of a refresh that has been committed."""
        if self._asked is None or self._asked[0] != serving_version:
            return
        version, passages, counted = self._asked
        chosen = slice(len(counted)) if passages is None else passages  # more passages were added later
        self.encoded_at[chosen] = version
        self.hits[chosen] = np.maximum(0.0, self.hits[chosen] - counted)
        self._asked = None
