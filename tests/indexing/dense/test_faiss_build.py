"""Indexes against brute force: exact where they are exhaustive, ties by row, near where they are not."""

import errno
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from indexing.dense import faiss_build
from indexing.dense.exact import recall, search_exactly
from indexing.dense.faiss_build import Index, build_index, check_config, check_faiss_install
from indexing.indexing_settings import IndexConfig
from tests.indexing.helpers import unit_vectors


@pytest.mark.parametrize("num_queries", [1, 3, 4, 40])
@pytest.mark.parametrize("k", [1, 20, 150])
@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_exhaustive_equals_brute_force(factory: str, k: int, num_queries: int) -> None:
    """More than 100 candidates and more than 3 queries take other paths through FAISS."""
    vectors, queries = unit_vectors(3000, 24), unit_vectors(num_queries, 24, seed=1)
    if factory == "SQfp16":  # FAISS rounds halves to float16 in its own way
        vectors = vectors.astype(np.float16).astype(np.float32)
    index = build_index(vectors, IndexConfig(factory=factory))
    expected_scores, expected_rows = search_exactly(vectors, queries, k)
    scores, rows = index.search(queries, k)
    assert rows.tolist() == expected_rows.tolist()
    assert scores.tolist() == expected_scores.tolist()
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize("num_queries", [1, 16])
def test_ties_by_row(factory: str, num_queries: int) -> None:
    """Every vector stands 40 times, more often than there are spare candidates."""
    vectors = np.tile(unit_vectors(25, 16).astype(np.float16).astype(np.float32), (40, 1))
    queries = unit_vectors(num_queries, 16, seed=1)
    index = build_index(vectors, IndexConfig(factory=factory))
    _, rows = index.search(queries, 50)
    best = rows[:, 0]
    assert rows[:, :40].tolist() == [[row + 25 * copy for copy in range(40)] for row in best]
    assert rows.tolist() == search_exactly(vectors, queries, 50)[1].tolist()


def test_all_vectors_equal() -> None:
    index = build_index(np.ones((500, 8), np.float32), IndexConfig())
    assert index.search(np.ones((2, 8), np.float32), 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_scores_beyond_float32_still_rank() -> None:
    vectors = np.float32(1e30) * unit_vectors(100, 8)
    scores, rows = build_index(vectors, IndexConfig()).search(vectors[:2], 3)
    assert rows.min() >= 0
    assert np.isinf(scores[:, 0]).all()


def test_k_above_n_pads() -> None:
    vectors = unit_vectors(5, 8)
    for factory in ("Flat", "SQfp16", "IVF2,Flat"):
        scores, rows = build_index(vectors, IndexConfig(factory=factory, nprobe=2)).search(vectors[:2], 7)
        assert rows[:, 5:].tolist() == [[-1, -1]] * 2
        assert np.isneginf(scores[:, 5:]).all()
        assert sorted(rows[0, :5].tolist()) == [0, 1, 2, 3, 4]


def test_ivf() -> None:
    vectors, queries = unit_vectors(3000, 16), unit_vectors(50, 16, seed=1)
    expected_scores, expected = search_exactly(vectors, queries, 10)
    few, many, every = (IndexConfig(factory="IVF32,Flat", nprobe=nprobe) for nprobe in (1, 8, 99))
    found = [recall(build_index(vectors, config).search(queries, 10)[1], expected) for config in (few, many)]
    assert 0.2 < found[0] < found[1]
    assert found[1] > 0.8
    scores, rows = build_index(vectors, every).search(queries, 10)
    assert rows.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_ivf_is_the_same_for_the_same_seed() -> None:
    vectors, queries = unit_vectors(1000, 16), unit_vectors(20, 16, seed=1)
    config = IndexConfig(factory="IVF16,Flat", nprobe=2, training_sample=300)
    answers = [build_index(vectors, config, seed).search(queries, 10)[1].tolist() for seed in (5, 5, 6)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_ivf_looks_further_where_the_visited_lists_are_too_short() -> None:
    vectors = unit_vectors(100, 8)
    index = build_index(vectors, IndexConfig(factory="IVF20,Flat", nprobe=1))
    _, rows = index.search(vectors[:10], 60)
    assert rows.tolist() == search_exactly(vectors, vectors[:10], 60)[1].tolist()


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF8,Flat"])
def test_write_and_read(tmp_path: Path, factory: str) -> None:
    vectors, queries = unit_vectors(300, 16), unit_vectors(10, 16, seed=1)
    config = IndexConfig(factory=factory, nprobe=2)
    index = build_index(vectors, config)
    index.write(tmp_path / "index.faiss")
    again = Index.read(tmp_path / "index.faiss", config)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    assert (again.num_vectors, again.dim) == (300, 16)
    for one, other in zip(index.search(queries, 20), again.search(queries, 20), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_full_disk_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_build.secrets, "token_hex", lambda _: "x")
    (tmp_path / ".index.faiss.x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"index\.faiss") as caught:
        build_index(unit_vectors(5000, 16), IndexConfig()).write(tmp_path / "index.faiss")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


GOOD = unit_vectors(10, 4)
NAN, INFINITE = GOOD.copy(), GOOD.copy()
NAN[7, 2], INFINITE[3, 0] = np.nan, -np.inf


@pytest.mark.parametrize(
    ("vectors", "settings", "message"),
    [
        (NAN, {}, "vector 7 is not finite"),
        (INFINITE, {}, "vector 3 is not finite"),
        (GOOD[0], {}, r"shape \(4,\): needed is \[n, dim\]"),
        (GOOD[:0], {}, "at least one vector"),
        (GOOD, {"factory": "IVF11,Flat"}, r"index\.factory=IVF11,Flat: must have 1 to 10 lists"),
        (GOOD, {"factory": "IVF4,Flat", "training_sample": 3}, r"index\.training_sample=3: must be at least 4"),
        (GOOD, {"factory": "Flatt"}, r"index\.factory=Flatt: must be one of Flat, SQfp16, SQ8"),
        (
            GOOD,
            {"factory": "PQ4x8"},
            r"index\.factory=PQ4x8: must train on at most 10 vectors, .* needs 256",
        ),
        (GOOD * 1e6, {"factory": "IVF2,SQfp16"}, "beyond 65504.0: use Flat"),
        (GOOD, {"ef_search": 0}, r"index\.ef_search=0"),
        (GOOD * 1e6, {"factory": "SQfp16"}, "beyond 65504.0: use Flat"),
        (GOOD, {"device": "tpu"}, r"index\.device=tpu: must be one of cpu, gpu"),
        (GOOD, {"nprobe": 0}, r"index\.nprobe=0"),
    ],
)
def test_refused(vectors: np.ndarray, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(vectors, IndexConfig(**settings))


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (NAN, 1, "query 7 is not finite"),
        (GOOD[:, :3], 1, r"query array has shape \(10, 3\): needed is \[n, 4\]"),
        (GOOD, 0, r"retrieval\.k=0"),
    ],
)
def test_refused_queries(queries: np.ndarray, k: int, message: str) -> None:
    index = build_index(GOOD, IndexConfig())
    with pytest.raises(ValueError, match=message):
        index.search(queries, k)


def test_no_queries() -> None:
    scores, rows = build_index(GOOD, IndexConfig()).search(GOOD[:0], 3)
    assert scores.shape == rows.shape == (0, 3)


def test_gpu_without_one_is_refused() -> None:
    if hasattr(faiss_build.load_faiss(), "StandardGpuResources") and faiss_build.load_faiss().get_num_gpus():
        pytest.skip("waits for a machine without a GPU")
    with pytest.raises(ValueError, match=r"index\.device=gpu: must be cpu.* FAISS"):
        check_config(IndexConfig(device="gpu"), 10)


def test_both_wheels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    installed = [Package("faiss-cpu"), Package("numpy"), Package("Faiss-GPU")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    with pytest.raises(ImportError, match=r"faiss-cpu and faiss-gpu are both installed.*tandem-rag\[cpu\]"):
        check_faiss_install()


def test_no_wheel_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", list)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"install tandem-rag\[cpu\] or tandem-rag\[gpu\]"):
        check_faiss_install()


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF8,Flat"])
def test_gpu_equals_brute_force(tmp_path: Path, factory: str) -> None:
    vectors, queries = unit_vectors(5000, 64), unit_vectors(40, 64, seed=1)
    config = IndexConfig(factory=factory, device="gpu", nprobe=8)
    stored = vectors.astype(np.float16) if factory == "SQfp16" else vectors
    expected_scores, expected = search_exactly(stored, queries, 20)
    index = build_index(vectors, config)
    index.write(tmp_path / "index.faiss")
    on_cpu = Index.read(tmp_path / "index.faiss", IndexConfig(factory=factory, nprobe=8))
    for one in (index, Index.read(tmp_path / "index.faiss", config), on_cpu):
        scores, rows = one.search(queries, 20)
        assert recall(rows, expected) > 0.99
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"retrieval\.k=3000: must be at most 2048"):
        index.search(queries, 3000)
