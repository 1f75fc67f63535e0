"""Every kind of index: recall against brute force, saved and read back, filtered, scored again; what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.dense.exact import recall, score_pairs, search_exactly
from indexing.dense.faiss_build import Index, build_index
from indexing.dense.kinds import check_kind, parse
from indexing.indexing_settings import IndexConfig
from tests.indexing.helpers import clustered_vectors

DIM, NUM = 16, 1200
VECTORS, QUERIES = clustered_vectors(NUM, DIM), clustered_vectors(25, DIM, seed=1)
EXACT = search_exactly(VECTORS, QUERIES, 10)[1]
# Recall@10 that each kind reaches at least: measured, and rounded down.
FLOORS = {
    "Flat": 1.0,
    "SQfp16": 0.98,
    "SQ8": 0.95,
    "PQ8x4": 0.38,
    "IVF16,Flat": 0.95,
    "IVF16,SQfp16": 0.95,
    "IVF16,SQ8": 0.93,
    "IVF16,PQ8x4": 0.4,
    "OPQ8,PQ8x4": 0.38,
    "OPQ4,IVF16,PQ4x6": 0.35,
    "HNSW16": 0.98,
    "HNSW16,SQfp16": 0.98,
    "HNSW16,SQ8": 0.93,
}
COMPRESSED = ("SQ8", "PQ8x4", "IVF16,SQ8", "IVF16,PQ8x4", "OPQ8,PQ8x4", "OPQ4,IVF16,PQ4x6", "HNSW16,SQ8")
BUILT: dict[tuple[str, int], Index] = {}


def built(factory: str, rescore_candidates: int = 0) -> Index:
    """An index over VECTORS; built once, since searching changes nothing."""
    key = (factory, rescore_candidates)
    if key not in BUILT:
        BUILT[key] = build_index(VECTORS, config_of(factory, rescore_candidates))
    return BUILT[key]


def config_of(factory: str, rescore_candidates: int = 0) -> IndexConfig:
    return IndexConfig(factory=factory, nprobe=6, rescore_candidates=rescore_candidates)


@pytest.mark.parametrize("factory", FLOORS)
def test_recall(factory: str) -> None:
    scores, rows = built(factory).search(QUERIES, 10)
    assert recall(rows, EXACT) >= FLOORS[factory]
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(line)) == 10 for line in rows.tolist())
    true = score_pairs(VECTORS, QUERIES, rows)
    assert np.abs(scores - true).max() < (0.4 if "PQ" in factory else 0.02)  # inner products, whatever the kind


@pytest.mark.parametrize("factory", COMPRESSED)
def test_scoring_again_raises_recall(factory: str) -> None:
    plain, again = built(factory), built(factory, 120)
    found = recall(again.search(QUERIES, 10)[1], EXACT)
    assert found >= max(0.9, recall(plain.search(QUERIES, 10)[1], EXACT))
    scores, rows = again.search(QUERIES, 10)
    assert scores.tolist() == score_pairs(VECTORS.astype(np.float16), QUERIES, rows).tolist()
    assert again.num_bytes == plain.num_bytes + 2 * NUM * DIM
    assert again.vectors(rows) is None  # float16 is not what was indexed


@pytest.mark.parametrize("factory", FLOORS)
@pytest.mark.parametrize("rescore_candidates", [0, 40])
def test_write_and_read(tmp_path: Path, factory: str, rescore_candidates: int) -> None:
    if rescore_candidates and factory not in COMPRESSED:
        rescore_candidates = 0
    index = built(factory, rescore_candidates)
    index.write(tmp_path / "index.faiss")
    again = Index.read(tmp_path / "index.faiss", config_of(factory, rescore_candidates))
    names = ["index.f16", "index.faiss"] if rescore_candidates else ["index.faiss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (again.num_vectors, again.dim, again.num_bytes) == (NUM, DIM, index.num_bytes)
    for one, other in zip(index.search(QUERIES, 20), again.search(QUERIES, 20), strict=True):
        assert one.tolist() == other.tolist()
    if rescore_candidates:
        assert isinstance(again.halves, np.memmap)


def test_vectors_for_scoring_again_have_to_be_there(tmp_path: Path) -> None:
    built("SQ8").write(tmp_path / "index.faiss")
    with pytest.raises(ValueError, match=r"saved without the vectors that index\.rescore_candidates scores again"):
        Index.read(tmp_path / "index.faiss", config_of("SQ8", 40))


def test_whole_vectors_come_with_the_hits() -> None:
    for factory in ("Flat", "HNSW16"):
        _, rows = built(factory).search(QUERIES, 3)
        assert (built(factory).vectors(rows) == VECTORS[rows]).all()
    for factory in ("SQfp16", "IVF16,Flat", "SQ8", "PQ8x4", "HNSW16,SQfp16"):
        assert built(factory).vectors(EXACT) is None


@pytest.mark.parametrize("factory", FLOORS)
@pytest.mark.parametrize("k", [NUM - 5, NUM, NUM + 7])
def test_no_row_is_missing_however_deep(factory: str, k: int) -> None:
    """Few lists visited and a small graph search are widened; every row comes, once."""
    index = Index(built(factory)._index, IndexConfig(factory=factory, nprobe=1, ef_search=1))
    scores, rows = index.search(QUERIES, k)
    found = min(k, NUM)
    assert rows[:, :found].min() >= 0
    assert all(len(set(line[:found])) == found for line in rows.tolist())
    assert (rows[:, found:] == -1).all()
    assert np.isneginf(scores[:, found:]).all()


@pytest.mark.parametrize("factory", FLOORS)
@settings(max_examples=25, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.45, 0.55, 0.9, 0.999, 1.0]),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_filter(factory: str, share: float, k: int, seed: int) -> None:
    """Only allowed rows, as many as there are, in order; the best of them where the kind is exhaustive."""
    allowed = np.random.default_rng(seed).random(NUM) < share
    number = min(k, int(allowed.sum()))
    scores, rows = built(factory).search(QUERIES[:5], k, allowed)
    assert scores.shape == rows.shape == (5, k)
    assert (rows[:, number:] == -1).all()
    assert np.isneginf(scores[:, number:]).all()
    rows, scores = rows[:, :number], scores[:, :number]
    assert (rows >= 0).all()
    assert allowed[rows].all()
    assert all(len(set(line)) == number for line in rows.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    if number and factory == "Flat":
        expected = search_exactly(VECTORS, QUERIES[:5], number, allowed)
        assert rows.tolist() == expected[1].tolist()
        assert scores.tolist() == expected[0].tolist()


@pytest.mark.parametrize("factory", FLOORS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
def test_recall_under_a_filter(factory: str, share: float) -> None:
    """A filter that leaves little visits more lists and links: recall does not fall below that without one."""
    allowed = np.random.default_rng(3).random(NUM) < share
    expected = search_exactly(VECTORS, QUERIES, 10, allowed)[1]
    assert recall(built(factory).search(QUERIES, 10, allowed)[1], expected) >= FLOORS[factory] - 0.05


def test_filter_with_ties_keeps_the_order_of_rows() -> None:
    vectors = np.tile(VECTORS[:30], (40, 1))
    index = build_index(vectors, IndexConfig())
    for share in (0.2, 0.8):
        allowed = np.random.default_rng(0).random(len(vectors)) < share
        _, rows = index.search(QUERIES, 50, allowed)
        assert rows.tolist() == search_exactly(vectors, QUERIES, 50, allowed)[1].tolist()


def test_filter_of_another_shape_is_refused() -> None:
    for allowed in (np.ones(NUM - 1, bool), np.ones(NUM, np.int64)):
        with pytest.raises(ValueError, match=rf"allowed rows are .*: needed is bool \[{NUM}\]"):
            built("Flat").search(QUERIES, 3, allowed)


def test_training_draws_from_the_sample_alone_and_follows_the_seed() -> None:
    config = IndexConfig(factory="IVF16,PQ8x4", nprobe=2, training_sample=200)
    answers = [build_index(VECTORS, config, seed).search(QUERIES, 10)[1].tolist() for seed in (5, 5, 6)]
    assert answers[0] == answers[1] != answers[2]


def test_bytes() -> None:
    assert built("Flat").num_bytes == 4 * DIM * NUM
    assert built("SQ8").num_bytes == DIM * NUM
    assert built("PQ8x4").num_bytes == 4 * NUM + 4 * 16 * DIM
    assert built("IVF16,Flat").num_bytes == (4 * DIM + 8) * NUM + 4 * 16 * DIM
    assert built("HNSW16").num_bytes > (4 * DIM + 2 * 16 * 4) * NUM  # two links' worth on the lowest level


@pytest.mark.parametrize(
    "factory",
    [
        *("", "flat", "Flatt", "IVF,Flat", "IVF0,Flat", "IVF16", "IVF16,", "PQ", "PQ0", "SQ4", "HNSW", "HNSW32,PQ8"),
        *("OPQ8,Flat", "OPQ8,IVF16,Flat", "OPQ8,SQ8", "IVF16,HNSW8", "PCA8,Flat", "Flat,IVF16", "HNSW8,", " Flat"),
    ],
)
def test_unknown_kinds(factory: str) -> None:
    with pytest.raises(ValueError, match=r"^index\.factory=.*: must be one of Flat, SQfp16, SQ8, PQm, IVFn,"):
        parse(factory)


@pytest.mark.parametrize(
    ("factory", "settings_", "message"),
    [
        ("OPQ16,PQ8", {}, "must have the same number of parts for OPQ and PQ, like OPQ16,IVF1024,PQ16"),
        ("PQ8x2", {}, "must have 4 to 12 bits a part"),
        ("HNSW1", {}, "must have 2 to 512 links"),
        ("IVF11,SQ8", {"num_vectors": 10}, "must have 1 to 10 lists: a shard holds 10 vectors"),
        (
            "PQ8",
            {"num_vectors": 255},
            "must train on at most 255 vectors, .* needs 256 .*: take PQ8x4",
        ),
        ("IVF10,PQ8x6", {"training_sample": 63}, r"training_sample=63: must be at least 64 with index\.factory"),
        ("Flat", {"rescore_candidates": 9}, r"index\.rescore_candidates=9: must be 0 with index\.factory=Flat"),
        ("HNSW8", {"rescore_candidates": 9}, r"index\.rescore_candidates=9: must be 0"),
        ("HNSW8", {"device": "gpu"}, "must be without HNSW with index.device=gpu"),
        ("SQ8", {"device": "gpu"}, r"must be Flat, .* with index\.device=gpu \(like IVF1024,SQ8\)"),
        ("OPQ8,PQ8", {"device": "gpu"}, r"must be Flat, .* \(like IVF1024,PQ8\)"),
        ("IVF10,PQ5", {"device": "gpu"}, "must have 8 bits and 1, 2, 3, 4, 8,"),
        ("IVF10,PQ8x6", {"device": "gpu"}, "must have 8 bits"),
    ],
)
def test_kinds_that_do_not_fit(factory: str, settings_: dict, message: str) -> None:
    arguments = {"device": "cpu", "num_vectors": 1000, "training_sample": 1000, "rescore_candidates": 0, **settings_}
    with pytest.raises(ValueError, match=message):
        check_kind(parse(factory), **arguments)


def test_parts_that_do_not_divide_the_dimension() -> None:
    with pytest.raises(ValueError, match=r"must cut vectors of 16 numbers into equal parts: 2, 4, 8, not 5"):
        build_index(VECTORS, IndexConfig(factory="PQ5x4"))


def test_numbers_beyond_float16_are_not_scored_again() -> None:
    with pytest.raises(ValueError, match=r"index\.rescore_candidates is 30, but a vector has a number beyond 65504"):
        build_index(1e6 * VECTORS, IndexConfig(factory="SQ8", rescore_candidates=30))


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8", "OPQ8,IVF16,PQ8"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.01])
def test_gpu(factory: str, share: float) -> None:
    config = IndexConfig(factory=factory, device="gpu", nprobe=6)
    allowed = None if share == 1.0 else np.random.default_rng(3).random(NUM) < share
    number = 10 if allowed is None else min(10, int(allowed.sum()))
    _, rows = build_index(VECTORS, config).search(QUERIES, 10, allowed)
    assert rows[:, :number].min() >= 0
    assert allowed is None or allowed[rows[:, :number]].all()
    _, on_cpu = build_index(VECTORS, IndexConfig(factory=factory, nprobe=6)).search(QUERIES, number, allowed)
    assert recall(rows, on_cpu) > 0.8
