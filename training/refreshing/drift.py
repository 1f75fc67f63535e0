"""Drift: the distance of the encoders from the index that serves, measured on a fixed set of questions.

The probe's questions are searched with today's query encoder; the candidates (more than are read, see PROBE_FACTOR)
are scored again by today's passage encoder. Nothing beyond the candidates is seen: the overlap is at least that of a
ranking of the whole corpus, and equal to it once the candidates are all passages.

    drift/overlap           share of the index's k best that are among the k best by fresh scores
    drift/rank_correlation  Spearman's rho of both orders, over the candidates of a question
    drift/passage_shift     mean 1 - cosine of a candidate's indexed and fresh vectors; if the kind of index keeps no
                            vectors, of its vectors at the newest publish and now, if it is a candidate again
    drift/query_shift       mean 1 - cosine of a question's vectors at the newest publish and now

Every method is collective; each rank probes its share, and all ranks have the same result.
"""

from dataclasses import dataclass

import numpy as np

from training.retrieving.rescore import FreshVectors, candidate_vectors, overlap_of, pair_scores
from training.retrieving.retrieve import IndexService

PROBE_FACTOR = 4  # Number of candidates for each k; retrieval.rescore if that is larger


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Means over the probe; NaN where there was nothing to compare with."""

    overlap: float
    rank_correlation: float
    passage_shift: float
    query_shift: float
    weights_version: int  # of the generation that answered rank 0

    def metrics(self) -> dict[str, float]:
        """Return the means by metric key; unknown ones are left out."""
        names = ("overlap", "rank_correlation", "passage_shift", "query_shift")
        return {f"drift/{name}": value for name in names if not np.isnan(value := getattr(self, name))}


@dataclass(frozen=True)
class _Vectors:
    """Vectors of this rank's questions and of their candidates, by the encoders of one moment."""

    questions: np.ndarray  # float32 [questions of this rank, dim]
    passages: dict[int, np.ndarray]


class DriftProbe:
    """Probes an index with the same questions each time."""

    def __init__(self, fresh: FreshVectors, service: IndexService, *, numbers: np.ndarray, k: int, depth: int) -> None:
        """Take the question `numbers`, the same on every rank, and search `depth` candidates for each, k of which are
        read."""
        self.fresh, self.service, self.numbers, self.k, self.depth = fresh, service, numbers, k, depth
        engine = fresh.engine
        share = -(-len(numbers) // engine.world_size)
        padded = np.resize(numbers, share * engine.world_size)  # repeats from the front: equal shares
        self._mine = padded[engine.rank :: engine.world_size]
        self._repeated = (np.arange(len(padded)) >= len(numbers))[engine.rank :: engine.world_size]
        self._now: _Vectors | None = None
        self._published: _Vectors | None = None

    def measure(self) -> Drift:
        """Probe the generation that serves. Raises what a search raises."""
        queries = self.fresh.questions(self._mine)
        depth = min(self.depth, self.service.num_passages)  # fewer where passages were deleted meanwhile
        hits = self.service.submit(queries, depth, depth).result()
        vectors = candidate_vectors(self.fresh, hits.ids)
        scores = pair_scores(queries, vectors, hits.ids)
        order = np.lexsort((hits.ids, -scores), axis=-1)[:, : self.k]
        best = np.take_along_axis(hits.ids, order, axis=1)
        known = hits.ids >= 0
        correlations = [spearman(hits.scores[row], scores[row], known[row]) for row in range(len(scores))]
        overlaps = overlap_of(hits.ids[:, : self.k], best)
        columns = np.stack([overlaps, np.array(correlations), self._query_shift(queries)], axis=1)
        self._now = _Vectors(queries, _by_number(hits.ids, vectors))
        stale = hits.vectors if hits.vectors is not None and hits.vectors.shape[1] == depth else None
        shifts = self._passage_shifts(stale, vectors, np.where(self._repeated[:, None], -1, hits.ids))
        measured_here = (dict(zip(self._mine.tolist(), columns, strict=True)), shifts, hits.weights_version)
        everyone = self.fresh.engine.gather_objects(measured_here)
        by_number = {number: row for rows, _, _ in everyone for number, row in rows.items()}
        means = _mean(np.stack(list(by_number.values())))
        passage_shift = _mean(np.concatenate([found for _, found, _ in everyone])[:, None])[0]
        return Drift(
            overlap=means[0],
            rank_correlation=means[1],
            passage_shift=passage_shift,
            query_shift=means[2],
            weights_version=everyone[0][2],
        )

    def remember(self) -> None:
        """Take the vectors that `measure` has just seen as the origin of the shifts: their weights were published."""
        self._published = self._now

    def _query_shift(self, queries: np.ndarray) -> np.ndarray:
        if self._published is None:
            return np.full(len(queries), np.nan)
        return shift(self._published.questions, queries)

    def _passage_shifts(self, stale: np.ndarray | None, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the shift of each candidate whose former vector is known; float64 [any]."""
        if stale is not None:
            return shift(stale, vectors)[ids >= 0]
        former = self._published.passages if self._published is not None else {}
        now = _by_number(ids, vectors)
        both = sorted(former.keys() & now.keys())
        if not both:
            return np.empty(0)
        return shift(np.stack([former[number] for number in both]), np.stack([now[number] for number in both]))


def shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of vectors [..., dim] as float64 [...]: 0 for equal directions, at most 2."""
    before, after = before.astype(np.float64), after.astype(np.float64)
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return 1 - (before * after).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)


def spearman(first: np.ndarray, second: np.ndarray, known: np.ndarray) -> float:
    """Return Spearman's rank correlation of two rows of scores [n] where `known` is true. Equal scores share their mean
    rank; NaN if a row has fewer than two different scores."""
    if known.sum() < 2:
        return float("nan")
    a, b = (_ranks(line[known]) for line in (first, second))
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _mean(columns: np.ndarray) -> list[float]:
    """Return the mean of each column [rows, columns] over the rows that have it; NaN if none has."""
    there = ~np.isnan(columns)
    totals = np.where(there, columns, 0.0).sum(axis=0)
    return [float(t / n) if n else float("nan") for t, n in zip(totals, there.sum(axis=0), strict=True)]


def _by_number(ids: np.ndarray, vectors: np.ndarray) -> dict[int, np.ndarray]:
    found = zip(ids.reshape(-1).tolist(), vectors.reshape(-1, vectors.shape[-1]), strict=True)
    return {number: vector for number, vector in found if number >= 0}
