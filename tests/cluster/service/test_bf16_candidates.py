"""Exact search by products of bfloat16: the answers are those of brute force, whatever the numbers, and the ceiling of
what is not proposed holds. A processor without such products emulates them, so that these run everywhere."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.service import bf16_candidates
from cluster.service.actors import offer_half_products
from cluster.service.bf16_candidates import HalfProducts
from indexing.dense import exhaustive
from indexing.dense.exact import search_exactly
from indexing.dense.exhaustive import offer
from indexing.dense.faiss_build import build_index
from indexing.indexing_settings import IndexConfig
from tests.indexing.helpers import clustered_vectors, unit_vectors
from training.engine import engine_setup

HALVES = IndexConfig(products="bfloat16")
NUM, DIM = 21_000, 24  # the first rows are sorted, the others looked through


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    offer(HalfProducts)
    yield
    offer(None)


def exact_scores(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


def rising(seed: int) -> np.ndarray:
    """Later rows are better for a query of ones: nearly every one joins the candidates."""
    noise = np.random.default_rng(seed).normal(size=(NUM, DIM))
    return (np.linspace(-1, 1, NUM)[:, None] + 0.01 * noise).astype(np.float32)


CASES = {
    "unit": (unit_vectors(NUM, DIM), unit_vectors(16, DIM, seed=1)),
    "clustered": (clustered_vectors(NUM, DIM), clustered_vectors(9, DIM, seed=1)),
    "one query": (unit_vectors(NUM, DIM), unit_vectors(1, DIM, seed=1)),
    "many queries": (unit_vectors(NUM, DIM), unit_vectors(300, DIM, seed=1)),
    "rising": (rising(0), np.ones((5, DIM), np.float32)),
    "negative": (-np.abs(rising(1)) - 1, np.abs(unit_vectors(5, DIM)) + 1),
    "zero queries": (unit_vectors(NUM, DIM), np.zeros((3, DIM), np.float32)),
    "large": (np.float32(1e12) * unit_vectors(NUM, DIM), np.float32(1e12) * unit_vectors(4, DIM, seed=2)),
    "tiny": (np.float32(1e-20) * unit_vectors(NUM, DIM), np.float32(1e-20) * unit_vectors(4, DIM, seed=2)),
    "overflowing": (np.float32(3e30) * unit_vectors(NUM, DIM), np.float32(3e30) * unit_vectors(4, DIM, seed=2)),
    "equal": (np.ones((NUM, DIM), np.float32), np.ones((3, DIM), np.float32)),
    "in copies": (np.tile(unit_vectors(30, DIM), (700, 1)), unit_vectors(6, DIM, seed=3)),
    "few": (unit_vectors(50, DIM), unit_vectors(6, DIM, seed=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_brute_force(name: str) -> None:
    vectors, queries = CASES[name]
    for k in (1, 20):
        expected_scores, expected = search_exactly(vectors, queries, k)
        scores, rows = build_index(vectors, HALVES).search(queries, k)
        assert rows.tolist() == expected.tolist()
        assert scores.tolist() == expected_scores.tolist()


@pytest.mark.parametrize("name", CASES)
def test_nothing_beyond_the_ceiling_is_left_out(name: str) -> None:
    vectors, queries = CASES[name]
    count = min(len(vectors), 40)
    rows, ceiling = HalfProducts(vectors).propose(queries, count)
    assert rows.shape == (len(queries), count)
    assert all(len(set(line)) == count and min(line) >= 0 and max(line) < len(vectors) for line in rows.tolist())
    scores = exact_scores(vectors, queries)
    np.put_along_axis(scores, rows, -np.inf, axis=1)
    assert (scores.max(axis=1) <= ceiling).all()


@example(seed=1424511, num=55, dim=15, scale=1e-30, shift=-1.0)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 600),
    dim=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e8, 1e25]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_ceiling_holds_at_any_scale(seed: int, num: int, dim: int, scale: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = (scale * (shift + generator.normal(size=(num, dim)))).astype(np.float32)
    queries = generator.normal(size=(3, dim)).astype(np.float32)
    count = int(generator.integers(1, num + 1))
    rows, ceiling = HalfProducts(vectors).propose(queries, count)
    scores = exact_scores(vectors, queries)
    np.put_along_axis(scores, rows, -np.inf, axis=1)
    assert (scores.max(axis=1) <= ceiling).all()


def test_small_blocks_give_the_same_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than one, and a last one that is no multiple of a group."""
    vectors, queries = CASES["unit"]
    whole, _ = HalfProducts(vectors).propose(queries, 50)
    monkeypatch.setattr(bf16_candidates, "FIRST_ROWS", 100)
    monkeypatch.setattr(bf16_candidates, "BLOCK_SCORES", 16 * 64 * 7)
    parts, ceiling = HalfProducts(vectors).propose(queries, 50)
    scores = exact_scores(vectors, queries)
    sure = np.take_along_axis(scores, whole, axis=1) > ceiling[:, None]
    assert sure.sum() > 16 * 30
    for found, others, certain in zip(parts, whole, sure, strict=True):
        assert set(others[certain]) <= set(found)


@pytest.mark.parametrize("share", [0.01, 0.6, 0.9])
def test_under_a_filter(share: float) -> None:
    vectors, queries = CASES["unit"]
    allowed = np.random.default_rng(0).random(NUM) < share
    scores, rows = build_index(vectors, HALVES).search(queries, 20, allowed)
    expected_scores, expected = search_exactly(vectors, queries, 20, allowed)
    assert rows.tolist() == expected.tolist()
    assert scores.tolist() == expected_scores.tolist()


def test_float16_vectors_are_found_by_them_too() -> None:
    vectors, queries = unit_vectors(NUM, DIM).astype(np.float16).astype(np.float32), unit_vectors(8, DIM, seed=1)
    index = build_index(vectors, IndexConfig(factory="SQfp16", products="bfloat16"))
    assert index.search(queries, 20)[1].tolist() == search_exactly(vectors, queries, 20)[1].tolist()
    assert index.num_bytes == NUM * DIM * 4


def test_unit_vectors_need_no_second_search(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = unit_vectors(60_000, 384), unit_vectors(16, 384, seed=1)
    index = build_index(vectors, HALVES)
    expected = search_exactly(vectors, queries, 20)[1].tolist()

    def fail(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(exhaustive.Exhaustive, "_search_by_faiss", fail)
    assert index.search(queries, 20)[1].tolist() == expected


def test_a_shard_offers_them_where_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(300, DIM)
    for there, bytes_per_number in ((True, 6), (False, 4)):
        offer(None)
        monkeypatch.setattr(engine_setup, "processor_multiplies_bf16", lambda there=there: there)
        offer_half_products(1)
        assert build_index(vectors, HALVES).num_bytes == bytes_per_number * vectors.size
        assert build_index(vectors, IndexConfig()).num_bytes == 4 * vectors.size
