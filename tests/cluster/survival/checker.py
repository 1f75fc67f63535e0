"""A client that searches all the time and checks every answer against brute force.

An answer names its generation and weights version. Its scores must be those of brute force over the vectors of exactly
that version, so that one shard's hits of another generation are seen; which versions the generations were made of is
compared at the end with the events. Wrong is also an answer that comes later than its bound, or goes back to an older
generation (unless a coordinator took that over: the newer one was then lost before it was on disk).

A corpus that changes meanwhile says which passages must be found and which must not (`Oracle`); a passage whose change
is under way may be found or not.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.service.search import IndexClient
from indexing.hits import Hits

TOLERANCE = 1e-4  # of a score: an encoder's batches have other shapes here than in a refresh worker
BATCH, K = 4, 9
COMMITS = ("refresh_committed", "corpus_changed", "passages_encoded_again", "index_taken_over")  # name a generation


class Oracle(Protocol):
    """What a search must find. May be called from any thread."""

    def gone(self) -> np.ndarray:
        """Numbers that no search finds which begins now."""
        ...

    def found_in(self, generation: int) -> np.ndarray:
        """Numbers that a search is sure to find which was answered by now, if their scores are high enough."""
        ...

    def vectors(self, weights_version: int, num_numbers: int) -> np.ndarray:
        """float32 [numbers, dim] of at least so many passages, by number."""
        ...


class Versions:
    """A corpus that does not change: vectors by weights version, made when they are first needed."""

    def __init__(self, make: Callable[[int], np.ndarray]) -> None:
        self._make, self._made = make, dict[int, np.ndarray]()
        self._lock = threading.Lock()

    def gone(self) -> np.ndarray:
        return np.empty(0, np.int64)

    def found_in(self, generation: int) -> np.ndarray:
        return np.arange(len(next(iter(self._made.values()))))

    def vectors(self, weights_version: int, num_numbers: int = 0) -> np.ndarray:
        with self._lock:
            if weights_version not in self._made:
                self._made[weights_version] = self._make(weights_version)
            return self._made[weights_version]


def wrong(hits: Hits, queries: np.ndarray, oracle: Oracle, gone: np.ndarray | None = None) -> str:
    """What is wrong with `hits` of a search that began when `gone` was gone; empty: nothing.

    Passages whose scores differ by less than TOLERANCE may change places.
    """
    where = f"generation {hits.generation}, weights version {hits.weights_version}"
    vectors = oracle.vectors(hits.weights_version, int(hits.ids.max()) + 1)
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    if (false := np.abs(hits.scores - np.take_along_axis(scores, hits.ids, axis=1)).max()) > TOLERANCE:
        return f"{where}: a score is {false:.2g} off that of its own passage"
    if any(len(set(line)) < len(line) for line in hits.ids.tolist()):
        return f"{where}: a passage comes twice"
    if (np.diff(hits.scores, axis=1) > 0).any():
        return f"{where}: scores are not in order"
    if gone is not None and np.isin(hits.ids, gone).any():
        return f"{where}: passages {np.intersect1d(hits.ids, gone)} were gone"
    sure = oracle.found_in(hits.generation)
    sure = sure[sure < len(vectors)]  # more may have come since
    for line, row, last in zip(hits.ids, scores, hits.scores[:, -1], strict=True):
        missing = np.setdiff1d(sure[row[sure] > last + TOLERANCE], line)
        if len(missing):
            return (
                f"{where}: passages {missing[:5]} are missing, with scores up to {row[missing].max() - last:.2g} higher"
            )
    return ""


def events_of(path: str | Path, *kinds: str) -> list[dict[str, Any]]:
    """Whole lines of an event log, of these kinds."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1] if Path(path).exists() else []
    return [row for row in map(json.loads, lines) if row["event"] in kinds]


class Checker(threading.Thread):
    """Searches until `finish`; as a context manager it ends with the block, which fails on violations."""

    def __init__(self, client: IndexClient, oracle: Oracle, bound_s: float, dim: int = 16, seed: int = 0) -> None:
        """`bound_s`: no search may take longer."""
        super().__init__(daemon=True)
        self._client, self._oracle, self._bound_s = client, oracle, bound_s
        self._dim, self._chance = dim, np.random.default_rng(seed)
        self._ended = threading.Event()
        self.violations: list[str] = []
        self.answered: dict[int, int] = {}  # generation -> weights version
        self.searches = 0
        self.longest_s = 0.0
        self._steps_back: list[tuple[int, int]] = []
        self.back = 0  # how often an older generation answered because a newer one was lost

    def run(self) -> None:
        newest = -1
        while not self._ended.is_set():
            queries = self._chance.normal(size=(BATCH, self._dim)).astype(np.float32)
            gone, begin = self._oracle.gone(), time.monotonic()
            try:
                hits = self._client.submit(queries, K).result()
                why = wrong(hits, queries, self._oracle, gone)
            except Exception as error:  # a violation like a wrong answer
                self.violations.append(f"{type(error).__name__}: {error}")
                continue
            seconds = time.monotonic() - begin
            self.longest_s = max(self.longest_s, seconds)
            self.searches += 1
            if seconds > self._bound_s:
                self.violations.append(f"a search took {seconds:.1f} s")
            if hits.generation < newest:
                self._steps_back.append((newest, hits.generation))
            newest = hits.generation
            if self.answered.setdefault(hits.generation, hits.weights_version) != hits.weights_version:
                self.violations.append(f"generation {hits.generation} has two weights versions")
            if why:
                self.violations.append(why)

    def finish(self) -> None:
        """End, and compare the generations with the events."""
        self._ended.set()
        self.join(self._bound_s + 10)
        if self.is_alive():
            self.violations.append("a search hangs")
        rows = events_of(self._client.address.events_path, *COMMITS)
        taken_over = {row["generation"] for row in rows if row["event"] == "index_taken_over"}
        for newer, older in self._steps_back:
            self.back += older in taken_over
            if older not in taken_over:
                self.violations.append(f"generation {older} answered after {newer}")
        committed = {(row["generation"], row["weights_version"]) for row in rows}
        self.violations += [
            f"generation {generation} of weights version {version} was answered and never committed"
            for generation, version in self.answered.items()
            if (generation, version) not in committed
        ]

    def __enter__(self) -> "Checker":
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.finish()
        if kind is None:  # else the block's own failure is told
            assert not self.violations, self.violations[:5]
            assert self.searches
