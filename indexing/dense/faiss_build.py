"""Builds a FAISS index from vectors and a factory string (`indexing/dense/kinds.py`), on CPU or GPU.

Scores are inner products. An exhaustive index (`Flat`, `SQfp16`) on CPU answers exactly, ties by row, also under a
filter (`indexing/dense/exhaustive.py`). A compressed index proposes `index.rescore_candidates`, which are scored again
from float16 vectors beside it: they take 2 bytes per number in memory while the generation is new, and are a memory map
once it was read from disk.
"""

import errno
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.snapshot import sync_directory, write_file
from indexing.declare import check_values, refuse
from indexing.dense.approximate import Approximate
from indexing.dense.exact import score_pairs
from indexing.dense.exhaustive import Exhaustive
from indexing.dense.faiss_indexes import (
    empty_index,
    exhaustive_on_cpu,
    exhaustive_on_gpu,
    memory_of,
    to_gpu,
    vectors_in,
)
from indexing.dense.faiss_library import check_faiss_install, check_gpu, load_faiss, whole_vectors
from indexing.dense.faiss_storage import add_to_lists
from indexing.dense.kinds import check_dim, check_kind, check_products, parse
from indexing.hits import best_first
from indexing.indexing_settings import IndexConfig

__all__ = ["Index", "bad_rows", "build_index", "check_config", "check_faiss_install", "check_vectors", "load_faiss"]

FLOAT16_MAX = 65504.0
HALVES = ".f16"  # ending of the file with the float16 vectors beside an index


class Index:
    """One FAISS index over rows 0..n-1. Searching is safe from several threads; nothing changes after it is built."""

    def __init__(self, faiss_index: Any, config: IndexConfig, halves: np.ndarray | None = None) -> None:
        """Wrap an index. `halves` are float16 [n, dim] beside a compressed index, by which its proposals are scored
        again."""
        self._index, self._config = faiss_index, config
        self.kind = parse(config.factory)
        self.num_vectors: int = faiss_index.ntotal
        self.dim: int = faiss_index.d
        self.halves = halves
        self._approximate = Approximate(
            faiss_index, self.kind, device=config.device, nprobe=config.nprobe, ef_search=config.ef_search
        )
        # whole vectors, if the index keeps them
        self._stored = None if config.device == "gpu" else vectors_in(faiss_index, self.kind)
        self._exhaustive: Exhaustive | None = None
        if self._stored is not None and self.kind.exhaustive:
            self._exhaustive = Exhaustive(faiss_index, self._stored, config.products)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the `k` best rows for each of float32 `queries` [batch, dim], among those that are true in `allowed`,
        bool [num_vectors] (None: all).

        Returns scores float32 [batch, k], falling, and rows int64 [batch, k], equal scores by row. If k is more than
        the number of (allowed) rows, the last columns are row -1 with score -inf. Raises ValueError for a wrong shape
        and numbers that are not finite.
        """
        queries = check_vectors(queries, "query", self.dim, first_number=0)
        if k < 1:
            raise refuse("retrieval.k", k, "must be at least 1")
        count = self.num_vectors
        if allowed is not None:
            allowed, count = self._check_allowed(allowed)
        columns = min(k, count)
        if not len(queries) or not columns:
            return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if count == self.num_vectors:
            allowed = None
        fine = self._stored if self.halves is None else self.halves
        if self._exhaustive is not None:
            scores, rows = self._exhaustive.search(queries, columns, allowed, count)
        elif fine is not None:
            candidates = min(max(columns, self._config.rescore_candidates), count)
            _, rows = self._approximate.search(queries, candidates, allowed)
            scores, rows = best_first(score_pairs(fine, queries, rows), rows, columns)
        else:
            scores, rows = best_first(*self._approximate.search(queries, columns, allowed), columns)
        missing = ((0, 0), (0, k - columns))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)

    def vectors(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the vectors of `rows` int64 [...], float32 [..., dim]; None if the kind keeps no whole vectors or they
        are not in memory."""
        return self._stored[rows] if self._stored is not None and self._stored.dtype == np.float32 else None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of vectors, lists and links, and of the 16-bit vectors beside them."""
        beside = 0 if self.halves is None else self.halves.nbytes
        return memory_of(self._index, self.kind) + beside + (self._exhaustive.num_bytes if self._exhaustive else 0)

    def _check_allowed(self, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """Return `allowed`, and the number of rows that it holds. Raises ValueError for another shape or type."""
        if allowed.shape != (self.num_vectors,) or allowed.dtype != bool:
            raise ValueError(
                f"allowed rows are {allowed.dtype} {allowed.shape}: needed is bool [{self.num_vectors}], one a vector"
            )
        return allowed, int(np.count_nonzero(allowed))

    def write(self, path: str | Path) -> None:
        """Write the index as a FAISS file, atomically; a GPU index as its CPU copy. float16 vectors beside it go into a
        file of the same name that ends with .f16. OSError names the path."""
        path = Path(path)
        faiss, index = load_faiss(), self._index
        if self._config.device == "gpu":
            with self._approximate.lock:
                index = faiss.index_gpu_to_cpu(index)
            if self.kind.exhaustive and self.kind.float16:
                index = exhaustive_on_cpu(whole_vectors(index), self.kind.factory)
        if self.halves is not None:
            write_file(halves_path(path), [self.halves])
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            try:
                faiss.write_index(index, str(temporary))
            except RuntimeError as error:
                full = "space" in str(error).lower()
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def read(path: str | Path, config: IndexConfig) -> "Index":
        """Read what `write` wrote. Only for files that `snapshot.verify` has passed: FAISS trusts what it reads."""
        try:
            index = load_faiss().read_index(str(path))
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
        return place(index, config, _read_halves(Path(path), index) if config.rescore_candidates else None)

    @property
    def faiss_index(self) -> Any:
        """Return FAISS's index; only for one that nobody searches."""
        return self._index


def build_index(vectors: np.ndarray, config: IndexConfig, seed: int = 0) -> Index:
    """Return an index over `vectors` float32 [n, dim], n >= 1. IVF kinds are trained on a sample drawn with `seed`.

    Raises ValueError for a factory that FAISS does not know or that does not fit the number of vectors, for a wrong
    shape, and for numbers that are not finite (naming the row).
    """
    vectors = check_vectors(vectors, "vector", None, first_number=0)
    check_config(config, len(vectors))
    kind = parse(config.factory)
    check_dim(kind, vectors.shape[1])
    for needs_halves, setting in (
        (kind.float16, f"index.factory is {config.factory}"),
        (config.rescore_candidates > 0, f"index.rescore_candidates is {config.rescore_candidates}"),
    ):
        if needs_halves and max(vectors.max(), -vectors.min()) > FLOAT16_MAX:
            raise ValueError(f"{setting}, but a vector has a number beyond {FLOAT16_MAX}: use Flat")
    if kind.exhaustive:
        if config.device == "gpu":
            return Index(exhaustive_on_gpu(vectors, config.factory), config)
        return Index(exhaustive_on_cpu(vectors, config.factory), config)
    index = empty_index(kind, vectors.shape[1], config, seed)
    try:
        if not index.is_trained:
            chosen = np.random.default_rng(seed).permutation(len(vectors))[: config.training_sample]
            index.train(vectors[np.sort(chosen)])
        add_to_lists(load_faiss(), index, vectors)
    except RuntimeError as error:
        raise refuse("index.factory", config.factory, f"must fit vectors {vectors.shape}: {error}") from error
    halves = vectors.astype(np.float16) if config.rescore_candidates else None
    return place(index, config, halves)


def place(index: Any, config: IndexConfig, halves: np.ndarray | None) -> Index:
    """Return a FAISS index on CPU as an `Index` on the device of `index.device`."""
    return Index(to_gpu(index, config.factory) if config.device == "gpu" else index, config, halves)


def check_config(config: IndexConfig, num_vectors: int) -> None:
    """Raise ValueError if the settings cannot give an index of `num_vectors` (for instance of the smallest shard)."""
    check_values(config, "index.")
    if num_vectors < 1:
        raise ValueError("an index needs at least one vector")
    check_products(config.products, parse(config.factory), config.device)
    check_kind(
        parse(config.factory),
        config.device,
        num_vectors=num_vectors,
        training_sample=config.training_sample,
        rescore_candidates=config.rescore_candidates,
    )
    if config.device == "gpu":
        check_gpu()


def check_vectors(vectors: np.ndarray, what: str, dim: int | None, first_number: int) -> np.ndarray:
    """Return `vectors` as contiguous float32 [n, dim]. Raises ValueError for another shape or a number that is not
    finite."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"{what} array has shape {vectors.shape}: needed is [n, {'dim' if dim is None else dim}]")
    bad = bad_rows(vectors)
    if len(bad):
        raise ValueError(f"{what} {first_number + int(bad[0])} is not finite ({len(bad)} of {len(vectors)} are not)")
    return vectors


def bad_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of [n, dim] that hold NaN or infinity."""
    if np.isfinite(vectors.sum(dtype=np.float64)):  # NaN and infinity remain in a sum, which takes one pass
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1))


def halves_path(path: Path) -> Path:
    """Return the path of the float16 vectors beside the index file `path`."""
    return path.with_suffix(HALVES)


def _read_halves(path: Path, index: Any) -> np.ndarray:
    file = halves_path(path)
    if not file.is_file():
        raise ValueError(
            f"{path} was saved without the vectors that index.rescore_candidates scores again: set it to 0, or let the "
            "index be built anew"
        )
    return np.memmap(file, np.float16, mode="r", shape=(index.ntotal, index.d))
