"""Vectors to a FAISS index, from one factory string, on CPU or GPU: the only file that knows FAISS.

Scores are inner products. An exhaustive index (`Flat`, `SQfp16`) on CPU answers exactly, ties by row: FAISS proposes
a few candidates more than asked for, they are scored again independently of batch and matrix shapes
(`indexing/exact.py`), and where a rounding error could hide a better row the query is searched by brute force.
"""

import errno
import functools
import importlib.metadata
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any

import numpy as np

from indexing.adding import add_to_lists
from indexing.exact import score_pairs, search_exactly
from indexing.merge import best_first
from indexing.settings import IndexConfig
from indexing.snapshot import sync_directory

EXHAUSTIVE = ("Flat", "SQfp16")
SPARE_CANDIDATES = 16  # that FAISS proposes beyond k
QUERIES_WITHOUT_BLAS = 3  # so few are quicker one by one than as a matrix product (measured, one thread)
GPU_MAX_K = 2048
GPU_SCRATCH_BYTES = 256 << 20
FLOAT16_MAX = 65504.0


class Index:
    """One FAISS index over rows 0..n-1. Searching is safe from several threads; nothing changes after it is built."""

    def __init__(self, faiss_index: Any, config: IndexConfig) -> None:
        self._index, self._config = faiss_index, config
        self.num_vectors: int = faiss_index.ntotal
        self.dim: int = faiss_index.d
        self._gpu_lock = threading.Lock()  # FAISS's GPU resources serve one thread at a time
        self._stored = _stored(faiss_index) if config.device == "cpu" and config.factory in EXHAUSTIVE else None
        self._largest_norm = 0.0 if self._stored is None else _largest_norm(self._stored)
        lists = faiss_index if hasattr(faiss_index, "nprobe") else load_faiss().try_extract_index_ivf(faiss_index)
        if lists is not None:
            lists.nprobe = min(config.nprobe, lists.nlist)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best rows for each of float32 `queries` [batch, dim].

        Returns scores float32 [batch, k], falling, and rows int64 [batch, k], equal scores by row. Where k > n the
        last columns are row -1 with score -inf. Raises ValueError for a wrong shape and numbers that are not finite.
        """
        queries = check_vectors(queries, "query", self.dim, first_number=0)
        columns = min(k, self.num_vectors)
        if columns < 1:
            raise ValueError(f"retrieval.k is {k}: allowed is 1 or more")
        if not len(queries):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        if self._stored is None:
            scores, rows = self._search_faiss(queries, columns)
        else:
            scores, rows = self._search_exhaustively(queries, columns, self._stored)
        missing = ((0, 0), (0, k - columns))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)

    def vectors(self, rows: np.ndarray) -> np.ndarray | None:
        """The vectors of `rows` int64 [...], float32 [..., dim]; None where the kind keeps others, or not at hand."""
        return self._stored[rows] if self._stored is not None and self._stored.dtype == np.float32 else None

    def _search_exhaustively(self, queries: np.ndarray, k: int, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_candidates = min(k + SPARE_CANDIDATES, self.num_vectors)
        tune_blas(self.dim)
        proposed, rows = self._index.search(queries, num_candidates)
        if rows.min() < 0:  # scores that overflow float32
            return search_exactly(stored, queries, k)
        scores, rows = best_first(score_pairs(stored, queries, rows), rows, k)
        if num_candidates == self.num_vectors:
            return scores, rows
        # A float32 inner product of dim terms is off by at most dim * 2^-24 * |q| |x| (Higham 2002, section 3.1).
        error = 1.01 * self.dim * 2.0**-24 * np.linalg.norm(queries, axis=1) * self._largest_norm
        unsure = np.flatnonzero(~(scores[:, -1] > proposed[:, -1] + 2 * error))
        if len(unsure):
            scores[unsure], rows[unsure] = search_exactly(stored, queries[unsure], k)
        return scores, rows

    def _search_faiss(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._config.device == "gpu":
            if k > GPU_MAX_K:
                raise ValueError(f"retrieval.k is {k}: allowed are 1 to {GPU_MAX_K} with index.device gpu")
            with self._gpu_lock:
                scores, rows = self._search_lists(queries, k)
        else:
            tune_blas(self.dim)
            scores, rows = self._search_lists(queries, k)
        return best_first(scores, rows, k)

    def _search_lists(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's own search; a query whose visited lists hold fewer than k vectors is searched in all lists."""
        scores, rows = self._index.search(queries, k)
        short = np.flatnonzero(rows.min(axis=1) < 0)
        if len(short) and hasattr(self._index, "nprobe"):
            everywhere = load_faiss().SearchParametersIVF(nprobe=self._index.nlist)
            scores[short], rows[short] = self._index.search(queries[short], k, params=everywhere)
        return scores, rows

    def write(self, path: str | Path) -> None:
        """Write the index as a FAISS file, atomically; a GPU index as its CPU twin. OSError names the path."""
        path = Path(path)
        faiss, index = load_faiss(), self._index
        if self._config.device == "gpu":
            with self._gpu_lock:
                index = faiss.index_gpu_to_cpu(index)
            if self._config.factory == "SQfp16":
                index = _exhaustive_on_cpu(_stored(index), "SQfp16")
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
        return Index(_to_gpu(index, config.factory) if config.device == "gpu" else index, config)


def build_index(vectors: np.ndarray, config: IndexConfig, seed: int = 0) -> Index:
    """An index over `vectors` float32 [n, dim], n >= 1. IVF kinds are trained on a sample drawn with `seed`.

    Raises ValueError for a factory that FAISS does not know or that does not fit the number of vectors, for a wrong
    shape, and for numbers that are not finite (naming the row).
    """
    vectors = check_vectors(vectors, "vector", None, first_number=0)
    check_config(config, len(vectors))
    if config.factory == "SQfp16" and max(vectors.max(), -vectors.min()) > FLOAT16_MAX:
        raise ValueError(f"index.factory is SQfp16, but a vector has a number beyond {FLOAT16_MAX}: use Flat")
    if config.factory in EXHAUSTIVE:
        if config.device == "gpu":
            return Index(_exhaustive_on_gpu(vectors, config.factory), config)
        return Index(_exhaustive_on_cpu(vectors, config.factory), config)
    faiss = load_faiss()
    index = _factory(vectors.shape[1], config.factory)
    try:
        if not index.is_trained:
            ivf = faiss.try_extract_index_ivf(index)
            if ivf is not None:
                ivf.cp.seed = seed + 1
                ivf.cp.min_points_per_centroid = 1  # no warning on the console
            chosen = np.random.default_rng(seed).permutation(len(vectors))[: config.training_sample]
            index.train(vectors[np.sort(chosen)])
        add_to_lists(faiss, index, vectors)
    except RuntimeError as error:
        raise ValueError(f"index.factory is {config.factory!r}, with {vectors.shape} vectors: {error}") from error
    return Index(_to_gpu(index, config.factory) if config.device == "gpu" else index, config)


def check_config(config: IndexConfig, num_vectors: int) -> None:
    """Raise ValueError where the settings cannot give an index of `num_vectors` (the smallest shard's, say)."""
    if config.device not in ("cpu", "gpu"):
        raise ValueError(f"index.device is {config.device!r}: allowed are cpu, gpu")
    if config.device == "gpu":
        _check_gpu()
    for name in ("nprobe", "training_sample", "num_shards"):
        value = vars(config)[name]
        if value < 1:
            raise ValueError(f"index.{name} is {value}: allowed is 1 or more")
    if num_vectors < 1:
        raise ValueError("an index needs at least one vector")
    lists = re.search(r"IVF(\d+)", config.factory)
    if lists is None:
        return
    if int(lists[1]) > num_vectors:
        raise ValueError(
            f"index.factory is {config.factory!r}, which trains {lists[1]} lists, but a shard holds {num_vectors} "
            f"vectors: allowed are 1 to {num_vectors} lists"
        )
    if int(lists[1]) > config.training_sample:
        raise ValueError(
            f"index.training_sample is {config.training_sample}: {config.factory!r} needs {lists[1]} or more"
        )


def check_vectors(vectors: np.ndarray, what: str, dim: int | None, first_number: int) -> np.ndarray:
    """`vectors` as contiguous float32 [n, dim]. ValueError for another shape or a number that is not finite."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"{what} array has shape {vectors.shape}: needed is [n, {'dim' if dim is None else dim}]")
    bad = bad_rows(vectors)
    if len(bad):
        raise ValueError(f"{what} {first_number + int(bad[0])} is not finite ({len(bad)} of {len(vectors)} are not)")
    return vectors


def bad_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of [n, dim] that hold NaN or infinity."""
    if np.isfinite(vectors.sum(dtype=np.float64)):  # one pass; NaN and infinity survive a sum
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1))


@functools.cache
def load_faiss() -> Any:
    """The FAISS module, after `check_faiss_install`."""
    check_faiss_install()
    import faiss

    return faiss


def check_faiss_install() -> None:
    """Raise ImportError, naming the extras, unless exactly one of faiss-cpu and faiss-gpu is installed.

    The two wheels share one folder: the last one installed wins, and removing one breaks the other.
    """
    names = {str(package.metadata["Name"]).lower() for package in importlib.metadata.distributions()}
    found = sorted(name for name in names if re.fullmatch(r"faiss-(cpu|gpu.*)", name))
    if len(found) > 1:
        raise ImportError(
            f"{' and '.join(found)} are both installed and overwrite each other: "
            f"run `pip uninstall {' '.join(found)}`, then install tandem-rag[cpu] or tandem-rag[gpu]"
        )
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise ImportError(f"FAISS is missing ({error}): install tandem-rag[cpu] or tandem-rag[gpu]") from error


def _factory(dim: int, factory: str) -> Any:
    faiss = load_faiss()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"index.factory is {factory!r}, which FAISS cannot make for {dim} dimensions: "
            f"try Flat, SQfp16 or IVFn,Flat ({str(error).splitlines()[0][:200]})"
        ) from error


def empty_exhaustive(dim: int, factory: str) -> Any:
    """A CPU FAISS index of an exhaustive kind (neither is trained on vectors), without any."""
    index = _factory(dim, factory)
    index.train(np.zeros((1, dim), np.float32))
    return index


def stored_vectors(index: Any, num_rows: int) -> np.ndarray:
    """The storage of a CPU Flat (float32) or SQfp16 (float16) index: [num_rows, dim], a view that lives as long."""
    faiss = load_faiss()
    codes = faiss.rev_swig_ptr(index.codes.data(), num_rows * index.code_size)
    return codes.view(np.float16 if index.code_size == 2 * index.d else np.float32).reshape(num_rows, index.d)


def _exhaustive_on_cpu(vectors: np.ndarray, factory: str) -> Any:
    index = empty_exhaustive(vectors.shape[1], factory)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def _stored(index: Any) -> np.ndarray:
    """The vectors of a CPU Flat or SQfp16 index."""
    return stored_vectors(index, index.ntotal)


def _largest_norm(vectors: np.ndarray) -> float:
    blocks = (vectors[start : start + 65536].astype(np.float32, copy=False) for start in range(0, len(vectors), 65536))
    return float(np.sqrt(max(np.einsum("nd,nd->n", block, block, dtype=np.float64).max() for block in blocks)))


def tune_blas(dim: int) -> None:
    """Have FAISS compute batches by matrix product; its default does so only above about 128,000 numbers.

    The threshold is one number per process: in queries before FAISS 1.15, in queries times dimensions since.
    """
    faiss = load_faiss()
    unit = dim if _threshold_counts_numbers() else 1
    faiss.cvar.distance_compute_blas_threshold = (QUERIES_WITHOUT_BLAS + 1) * unit


@functools.cache
def _threshold_counts_numbers() -> bool:
    """Whether the threshold, as it is before the first `tune_blas`, counts numbers (128,000) or queries (20)."""
    return load_faiss().cvar.distance_compute_blas_threshold > 1000


def _check_gpu() -> None:
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise ValueError(
            "index.device is gpu, but FAISS is installed for CPU: install tandem-rag[gpu] instead of [cpu]"
        )
    if faiss.get_num_gpus() < 1:
        raise ValueError("index.device is gpu, but FAISS sees no GPU: use cpu")


@functools.cache
def _gpu_resources() -> Any:
    """One per process; FAISS keeps its scratch memory here."""
    resources = load_faiss().StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH_BYTES)
    return resources


def _exhaustive_on_gpu(vectors: np.ndarray, factory: str) -> Any:
    faiss = load_faiss()
    options = faiss.GpuIndexFlatConfig()
    options.device = 0  # the one that CUDA_VISIBLE_DEVICES leaves visible
    options.useFloat16 = factory == "SQfp16"
    index = faiss.GpuIndexFlatIP(_gpu_resources(), vectors.shape[1], options)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def _to_gpu(index: Any, factory: str) -> Any:
    """The GPU twin of a CPU index."""
    _check_gpu()
    if factory in EXHAUSTIVE:
        return _exhaustive_on_gpu(_stored(index), factory)
    return load_faiss().index_cpu_to_gpu(_gpu_resources(), 0, index)
