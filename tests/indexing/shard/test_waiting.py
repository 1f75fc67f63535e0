"""Vectors that wait: they become the same index as all at once, without a second copy and without slack."""

from pathlib import Path

import numpy as np
import pytest

from indexing.dense.faiss_build import FLOAT16_MAX, Index, build_index
from indexing.dense.faiss_indexes import empty_exhaustive
from indexing.dense.faiss_library import load_faiss, stored_vectors
from indexing.dense.faiss_storage import add_to_lists
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard
from indexing.shard.waiting import WaitingVectors
from tests.indexing.helpers import unit_vectors

DIM = 24


def bytes_of(index: Index, folder: Path, name: str) -> bytes:
    index.write(folder / name)
    return (folder / name).read_bytes()


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF20,Flat", "IVF20,SQ8"])
def test_the_same_index_as_all_at_once(factory: str, tmp_path: Path) -> None:
    """Byte for byte, from parts in any order, some of them twice."""
    vectors, config = unit_vectors(3000, DIM), IndexConfig(factory=factory)
    waiting = WaitingVectors(len(vectors), DIM, config)
    for start, stop in ((1000, 3000), (0, 700), (600, 1100)):
        waiting.put(slice(start, stop), vectors[start:stop])
    built = bytes_of(waiting.build(seed=3)[0], tmp_path, "parts")
    assert built == bytes_of(build_index(vectors, config, seed=3), tmp_path, "whole")


def test_an_exhaustive_index_is_where_its_vectors_waited() -> None:
    for factory, size in (("Flat", 4), ("SQfp16", 2)):
        index = empty_exhaustive(DIM, factory)
        waiting = WaitingVectors(50, DIM, IndexConfig(factory=factory))
        address, nbytes = waiting._rows.ctypes.data, waiting._rows.nbytes
        assert nbytes == 50 * DIM * size == 50 * index.code_size
        waiting.put(slice(0, 50), unit_vectors(50, DIM))
        built, _ = waiting.build(seed=0)
        assert stored_vectors(built._index, 50).ctypes.data == address


def test_lists_hold_what_they_need() -> None:
    """Twenty times more vectors than centroids: FAISS's own lists would have room for more."""
    faiss = load_faiss()
    vectors = unit_vectors(2000, DIM)
    index = faiss.index_factory(DIM, "IVF10,PQ4x4", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    grown = faiss.clone_index(index)
    grown.add(vectors)
    add_to_lists(faiss, index, vectors)
    assert index.ntotal == 2000
    assert faiss.serialize_index(index).tobytes() == faiss.serialize_index(grown).tobytes()
    add_to_lists(faiss, index, vectors[:5])  # not empty: as FAISS does it
    assert index.ntotal == 2005


def test_halves_that_are_too_large_are_refused_until_they_are_replaced() -> None:
    waiting = WaitingVectors(2, 2, IndexConfig(factory="SQfp16"))
    waiting.put(slice(0, 2), np.array([[1, 2], [3, 2 * FLOAT16_MAX]], np.float32))
    with pytest.raises(ValueError, match=r"index\.factory=SQfp16: must be Flat: a vector has a number beyond 65504"):
        waiting.build(seed=0)
    waiting.put(slice(1, 2), np.array([[3, 4]], np.float32))
    assert waiting.build(seed=0)[0].num_vectors == 2


def test_a_build_that_fails_keeps_what_waits() -> None:
    shard = Shard(0, 0, stop=4, config=IndexConfig(factory="SQfp16"))
    shard.stage(1, 10, 0, np.full((4, 2), 1e6, np.float32))
    for _ in range(2):
        with pytest.raises(ValueError, match="beyond 65504"):
            shard.prepare(1)
    shard.stage(1, 10, 0, np.ones((4, 2), np.float32))
    shard.prepare(1)
    shard.commit(1)
    assert shard.search(np.ones((1, 2), np.float32), 4).ids.tolist() == [[0, 1, 2, 3]]
