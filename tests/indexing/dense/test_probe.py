"""Figures of a generation: recall of a probe, bytes, seconds; queries remembered; shards combined."""

import numpy as np
import pytest

from indexing.dense.exact import recall, search_exactly
from indexing.dense.faiss_build import build_index
from indexing.dense.probe import UNKNOWN, Figures, RecentQueries, combined, probe_recall
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard
from tests.indexing.helpers import clustered_vectors

VECTORS, QUERIES = clustered_vectors(600, 16), clustered_vectors(80, 16, seed=1)


def test_recall_of_recent_queries_is_that_against_brute_force() -> None:
    index = build_index(VECTORS, IndexConfig(factory="IVF32,Flat", nprobe=1))
    expected = recall(index.search(QUERIES[-20:], 10)[1], search_exactly(VECTORS, QUERIES[-20:], 10)[1])
    assert probe_recall(index, VECTORS, num_queries=20, recent=QUERIES) == pytest.approx(expected)
    assert 0.1 < expected < 0.95


def test_without_questions_its_own_vectors_are_asked() -> None:
    narrow, wide = (build_index(VECTORS, IndexConfig(factory="IVF32,Flat", nprobe=n)) for n in (1, 32))
    found = probe_recall(narrow, VECTORS, num_queries=50)
    assert found is not None
    assert 0.2 < found < 0.99
    assert found == probe_recall(narrow, VECTORS, num_queries=50)  # the same noise
    assert probe_recall(wide, VECTORS, num_queries=50) == 1.0
    assert probe_recall(narrow, VECTORS, num_queries=0) is None
    assert probe_recall(build_index(VECTORS, IndexConfig()), VECTORS, num_queries=50) == 1.0
    assert (
        probe_recall(build_index(VECTORS[:3], IndexConfig(factory="SQ8")), VECTORS[:3], num_queries=5) == 1.0
    )  # fewer than k


def test_recent_queries() -> None:
    recent = RecentQueries(5)
    assert recent.take(4).shape == (0, 4)
    for start in range(0, 9, 3):
        recent.add(np.full((3, 4), start, np.float32) + np.arange(3, dtype=np.float32)[:, None])
    assert recent.take(4)[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert recent.take(3).shape == (0, 3)
    recent.add(np.zeros((40, 4), np.float32))
    assert recent.take(4).tolist() == [[0.0] * 4] * 5
    none = RecentQueries(0)
    none.add(np.ones((2, 4), np.float32))
    assert not len(none.take(4))


def test_a_shard_measures_every_generation() -> None:
    shard = Shard(0, 0, stop=600, config=IndexConfig(factory="IVF32,SQ8", nprobe=1, probe_queries=20))
    assert shard.status().figures == UNKNOWN
    for generation in (1, 2):
        shard.stage(generation, generation, 0, VECTORS)
        shard.prepare(generation)
        shard.commit(generation)
        shard.search(QUERIES, 3, generation=generation)
        figures = shard.status().figures
        assert figures.bytes_per_passage == pytest.approx(16 + 8 + 4 * 32 * 16 / 600)
        assert figures.build_s > 0
        assert figures.recall is not None
        if generation == 2:  # asked what was asked of the first one
            index = build_index(VECTORS, IndexConfig(factory="IVF32,SQ8", nprobe=1))
            expected = recall(index.search(QUERIES[-20:], 10)[1], search_exactly(VECTORS, QUERIES[-20:], 10)[1])
            assert figures.recall == pytest.approx(expected)


def test_combined() -> None:
    parts = [(100, Figures(10.0, 2.0, 0.9)), (300, Figures(20.0, 1.0, 0.5))]
    both = combined(parts)
    assert (both.bytes_per_passage, both.build_s) == (17.5, 2.0)
    assert both.recall == pytest.approx(0.6)
    assert combined([*parts, (100, Figures(10.0, 9.0, None))]) == Figures(16.0, 9.0, None)
    assert combined([]) == UNKNOWN
