"""Holds the vectors of a generation while they arrive: in the storage of the coming index if it keeps them as they are
(`Flat`, `SQfp16` on CPU), otherwise in float32 rows beside it, which are let go when it is built."""

import time
from typing import Any

import numpy as np

from indexing.declare import refuse
from indexing.dense.faiss_build import FLOAT16_MAX, Index, build_index
from indexing.dense.faiss_indexes import empty_exhaustive
from indexing.dense.faiss_library import stored_vectors
from indexing.dense.faiss_storage import room_for
from indexing.dense.kinds import EXHAUSTIVE
from indexing.dense.probe import Figures, probe_recall
from indexing.indexing_settings import IndexConfig


class WaitingVectors:
    """Room for `num_rows` vectors of `dim` numbers. No locks: its owner holds one."""

    def __init__(self, num_rows: int, dim: int, config: IndexConfig) -> None:
        self._config, self.num_rows = config, num_rows
        self._faiss_index: Any = None
        self._too_large = np.zeros(0, bool)
        if num_rows and config.device == "cpu" and config.factory in EXHAUSTIVE:
            self._faiss_index = empty_exhaustive(dim, config.factory)
            room_for(self._faiss_index, num_rows)
            self._rows = stored_vectors(self._faiss_index, num_rows)
        else:
            self._rows = np.empty((num_rows, dim), np.float32)
        if self._rows.dtype == np.float16:
            self._too_large = np.zeros(num_rows, bool)

    def put(self, rows: np.ndarray | slice, vectors: np.ndarray) -> None:
        """Write float32 `vectors` [n, dim] to `rows`."""
        if self._rows.dtype == np.float16:
            with np.errstate(invalid="ignore"):  # NaN is the caller's to find
                self._too_large[rows] = np.abs(vectors).max(axis=1, initial=0.0) > FLOAT16_MAX
            codes = self._faiss_index.sa_encode(np.ascontiguousarray(vectors))  # FAISS rounds halves in its own way
            self._rows[rows] = codes.view(np.float16)
        else:
            self._rows[rows] = vectors

    def build(self, seed: int, recent: np.ndarray | None = None) -> tuple[Index, Figures]:
        """Return the index over all rows, measured with the `recent` queries [any, dim]. Raises ValueError as
        `build_index`; all rows stay then."""
        if self._too_large.any():
            allowed = f"must be Flat: a vector has a number beyond {FLOAT16_MAX}"
            raise refuse("index.factory", self._config.factory, allowed)
        begin = time.perf_counter()
        if self._faiss_index is None:
            index = build_index(self._rows, self._config, seed)
        else:
            self._faiss_index.ntotal = self.num_rows
            index = Index(self._faiss_index, self._config)
        seconds = time.perf_counter() - begin
        found = probe_recall(index, self._rows, num_queries=self._config.probe_queries, recent=recent, seed=seed)
        return index, Figures(index.num_bytes / self.num_rows, seconds, found)
