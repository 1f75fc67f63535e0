"""The estimate of a build follows its work, and is near what the build takes."""

import time

import numpy as np

from indexing.dense.build_time import build_seconds
from indexing.dense.faiss_build import build_index
from indexing.indexing_settings import IndexConfig


def test_estimate_is_near_a_real_build() -> None:
    """Within a factor of ten, which is what a bound of several times the estimate, and ten minutes, is made for."""
    config = IndexConfig(factory="IVF1024,Flat", training_sample=30_000)
    vectors = np.random.default_rng(0).standard_normal((30_000, 64), np.float32)
    expected_s = build_seconds(config, *vectors.shape)
    begin = time.perf_counter()
    build_index(vectors, config)
    assert expected_s / 10 < time.perf_counter() - begin < expected_s * 10


def test_estimate_grows_with_the_work() -> None:
    flat, lists = IndexConfig(factory="Flat"), IndexConfig(factory="IVF65536,Flat", training_sample=2_000_000)
    rows = 2_626_915  # a shard of eight of 21,015,324 passages
    assert 1 < build_seconds(flat, rows, 768) < 60
    assert build_seconds(lists, rows, 768) > 600  # longer than refresh.chunk_timeout_s alone allows
    assert build_seconds(lists, 2 * rows, 768) > build_seconds(lists, rows, 768)
