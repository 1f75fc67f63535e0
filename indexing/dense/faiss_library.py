"""Loads the FAISS library once, with a clear error if it is missing, and corrects some of its defaults."""

import functools
import importlib.metadata
import os
import re
from typing import Any

import numpy as np

from indexing.allowance import usable_cpus
from indexing.declare import refuse

# Number of queries: so few are quicker one by one than as a matrix product (measured, one thread)
QUERIES_WITHOUT_BLAS = 3
GPU_SCRATCH_BYTES = 256 << 20


@functools.cache
def load_faiss() -> Any:
    """Return the FAISS module, after `check_faiss_install`."""
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
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or str(usable_cpus())  # OpenMP reads it once, and sees no quota by itself
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise ImportError(f"FAISS is missing ({error}): install tandem-rag[cpu] or tandem-rag[gpu]") from error
    finally:
        if given is None:  # child processes choose for themselves
            del os.environ["OMP_NUM_THREADS"]


def tune_blas(dim: int) -> None:
    """Let FAISS compute batches by matrix product; its default does so only above about 128,000 numbers.

    The threshold is one number per process: in queries before FAISS 1.15, in queries times dimensions since.
    """
    faiss = load_faiss()
    unit = dim if _threshold_counts_numbers() else 1
    faiss.cvar.distance_compute_blas_threshold = (QUERIES_WITHOUT_BLAS + 1) * unit


@functools.cache
def _threshold_counts_numbers() -> bool:
    """Return True if the threshold, as it is before the first `tune_blas`, counts numbers (128,000), False for queries
    (20)."""
    return load_faiss().cvar.distance_compute_blas_threshold > 1000


def check_gpu() -> None:
    """Raise ValueError if FAISS has no GPU."""
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        allowed = "must be cpu, since FAISS is installed for CPU: or install tandem-rag[gpu] instead of [cpu]"
        raise refuse("index.device", "gpu", allowed)
    if faiss.get_num_gpus() < 1:
        raise refuse("index.device", "gpu", "must be cpu: FAISS sees no GPU")


@functools.cache
def gpu_resources() -> Any:
    """Return FAISS's GPU resources, one object per process, which holds its scratch memory."""
    resources = load_faiss().StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH_BYTES)
    return resources


def inner_of(index: Any) -> Any:
    """Return the index below a rotation, or `index` itself."""
    faiss = load_faiss()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def codes_of(index: Any) -> np.ndarray:
    """Return the codes of a flat CPU index: uint8 [n, bytes], a view that lives as long as the index."""
    codes = load_faiss().rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return codes.reshape(index.ntotal, index.code_size)


def whole_vectors(index: Any) -> np.ndarray:
    """Return the vectors of a CPU Flat (float32) or SQfp16 (float16) index: [n, dim], a view that lives as long as
    it."""
    return stored_vectors(index, index.ntotal)


def stored_vectors(index: Any, num_rows: int) -> np.ndarray:
    """Return the storage of a CPU Flat or SQfp16 index for `num_rows` vectors, which it may not count yet."""
    codes = load_faiss().rev_swig_ptr(index.codes.data(), num_rows * index.code_size)
    return codes.view(np.float16 if index.code_size == 2 * index.d else np.float32).reshape(num_rows, index.d)


def selector(allowed: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return FAISS's selector of the rows in bool [n], and the bits that it reads: keep both while it is used."""
    bits = np.packbits(allowed, bitorder="little")
    return load_faiss().IDSelectorBitmap(bits), bits
