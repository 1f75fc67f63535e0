"""Searches the kinds of index that do not compare every vector exactly, and all kinds on GPU.

Rows that FAISS leaves empty (-1) are never returned: the query is searched again, in all lists of an IVF index, vector
by vector in a graph. Under a filter, lists and graphs are searched wider from the start, in proportion to the share
that the filter leaves out: about as many allowed vectors are compared as without a filter. If FAISS takes no filter (PQ
codes, a GPU), more rows are proposed and those that are not allowed dropped. Queries that lack rows even so, and those
with a narrow filter, are searched among the codes of the allowed rows alone; a GPU index keeps a copy in the CPU's
memory for that, made when it is first needed.
"""

import math
import threading
from typing import Any

import numpy as np

from indexing.declare import refuse
from indexing.dense.faiss_library import codes_of, inner_of, load_faiss, selector, tune_blas
from indexing.dense.kinds import Kind

GPU_MAX_K = GPU_MAX_NPROBE = 2048
SPARE = 16  # Number of rows proposed beyond those that a filter leaves
WIDE_SHARE = 0.5  # Share of all rows: a filter that allows fewer is searched among its codes alone
GRAPH_SHARE = 0.25  # Share of all vectors: a graph search that would visit more compares the allowed ones one by one


class Approximate:
    """FAISS's approximate searches in one index. Safe from several threads."""

    def __init__(self, index: Any, kind: Kind, *, device: str, nprobe: int, ef_search: int) -> None:
        self._index, self._kind, self._gpu = index, kind, device == "gpu"
        self._inner = inner_of(index)
        self._rotation = load_faiss().downcast_VectorTransform(index.chain.at(0)) if kind.rotated else None
        self._nprobe, self._ef_search = min(nprobe, max(1, kind.lists)), ef_search
        self._twin: Approximate | None = None  # copy on CPU of a GPU index that was searched with a narrow filter
        self.lock = threading.Lock()  # FAISS's GPU resources serve one thread at a time

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32 and rows int64 [batch, k] of float32 `queries` [batch, dim], in FAISS's order.
        `allowed`, bool [n], holds `k` rows or more. Raises ValueError for a k that a GPU does not take."""
        if self._gpu:
            return self._search_gpu(queries, k, allowed)
        tune_blas(self._inner.d)
        if self._rotation is not None:
            queries = self._rotation.apply(queries)
        share = 1.0 if allowed is None else float(np.count_nonzero(allowed)) / len(allowed)
        only, _bits = (None, None) if allowed is None else selector(allowed)
        if self._kind.lists:
            return self._search_lists(queries, k, only, share)
        if self._kind.links:
            return self._search_graph(queries, k, only, share)
        if self._kind.codec == "PQ" and allowed is not None:
            return self._search_codes(queries, k, allowed, share)
        return self._inner.search(queries, k, params=_parameters(only))

    def _search_lists(self, queries: np.ndarray, k: int, only: Any, share: float) -> tuple[np.ndarray, np.ndarray]:
        faiss, lists = load_faiss(), min(self._kind.lists, GPU_MAX_NPROBE if self._gpu else self._kind.lists)
        nprobe = min(lists, math.ceil(self._nprobe / share))
        scores, rows = self._inner.search(queries, k, params=faiss.SearchParametersIVF(sel=only, nprobe=nprobe))
        short = np.flatnonzero(rows.min(axis=1) < 0)
        if len(short) and nprobe < lists:
            everywhere = faiss.SearchParametersIVF(sel=only, nprobe=lists)
            scores[short], rows[short] = self._inner.search(queries[short], k, params=everywhere)
        return scores, rows

    def _search_graph(self, queries: np.ndarray, k: int, only: Any, share: float) -> tuple[np.ndarray, np.ndarray]:
        faiss, storage = load_faiss(), load_faiss().downcast_index(self._inner.storage)
        visited = math.ceil(max(self._ef_search, k) / share)
        if only is not None and visited > GRAPH_SHARE * self._inner.ntotal:
            return storage.search(queries, k, params=_parameters(only))
        wide = faiss.SearchParametersHNSW(sel=only, efSearch=visited)
        scores, rows = self._inner.search(queries, k, params=wide)
        short = np.flatnonzero(rows.min(axis=1) < 0)  # links that lead nowhere
        if len(short):
            scores[short], rows[short] = storage.search(queries[short], k, params=_parameters(only))
        return scores, rows

    def _search_codes(
        self, queries: np.ndarray, k: int, allowed: np.ndarray, share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        if share < WIDE_SHARE:
            return self._search_some_codes(queries, k, np.flatnonzero(allowed))
        scores, rows = self._inner.search(queries, min(len(allowed), math.ceil(k / share) + SPARE))
        scores, rows, short = _allowed_first(scores, rows, k, allowed)
        if len(short):
            scores[short], rows[short] = self._search_some_codes(queries[short], k, np.flatnonzero(allowed))
        return scores, rows

    def _search_some_codes(self, queries: np.ndarray, k: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        faiss = load_faiss()
        part = faiss.IndexPQ(self._inner.d, self._kind.parts, self._kind.bits, faiss.METRIC_INNER_PRODUCT)
        part.pq, part.is_trained = self._inner.pq, True
        part.add_sa_codes(np.ascontiguousarray(codes_of(self._inner)[chosen]))
        scores, rows = part.search(queries, k)
        return scores, np.where(rows < 0, -1, chosen[rows])

    def _search_gpu(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        total = self._index.ntotal
        count = total if allowed is None else int(np.count_nonzero(allowed))
        wide = k if allowed is None else min(total, GPU_MAX_K, math.ceil(k * total / count) + SPARE)
        if max(k, wide) > GPU_MAX_K:
            raise refuse("retrieval.k", k, f"must be at most {GPU_MAX_K} with index.device=gpu")
        with self.lock:
            scores, rows = self._propose_gpu(queries, wide)
            scores, rows, short = _allowed_first(scores, rows, k, allowed)
            if len(short) and self._twin is None:
                on_cpu = load_faiss().index_gpu_to_cpu(self._index)
                self._twin = Approximate(
                    on_cpu, self._kind, device="cpu", nprobe=self._nprobe, ef_search=self._ef_search
                )
        if len(short):
            assert self._twin is not None
            scores[short], rows[short] = self._twin.search(queries[short], k, allowed)
        return scores, rows

    def _propose_gpu(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search on the GPU, in all lists if the visited ones hold fewer than `k`. Call with the lock held."""
        if self._rotation is not None:
            queries = self._rotation.apply(queries)
        if not self._kind.lists:
            return self._inner.search(queries, k)
        return self._search_lists(queries, k, None, 1.0)


def _allowed_first(
    scores: np.ndarray, rows: np.ndarray, k: int, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first `k` columns of the proposed rows [batch, any] that are allowed (None: all real rows), in their
    order, and the queries that have fewer."""
    kept = rows >= 0 if allowed is None else (rows >= 0) & allowed[rows]
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return scores, rows, np.flatnonzero(kept.sum(axis=1) < k)


def _parameters(only: Any) -> Any:
    return None if only is None else load_faiss().SearchParameters(sel=only)
