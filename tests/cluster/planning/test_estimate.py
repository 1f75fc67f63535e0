"""Formulas by hand, and against indexes that FAISS really builds."""

import math

import numpy as np
import pytest

from cluster.planning import estimate
from cluster.planning.estimate import index_bytes, shard_bytes, state_bytes
from indexing.dense.faiss_library import load_faiss
from indexing.dense.kinds import EXHAUSTIVE_PASSES, OTHER_PASSES, parse
from indexing.indexing_settings import IndexConfig
from indexing.shard.serving import MAX_COMMITTED
from indexing.shard.waiting import WaitingVectors
from tests.indexing.helpers import unit_vectors

DIM = 64


@pytest.mark.parametrize(
    ("factory", "vector", "fixed"),
    [
        ("Flat", 4 * 64, 0),
        ("SQfp16", 2 * 64, 0),
        ("SQ8", 64, 0),
        ("IVF100,Flat", 4 * 64 + 8, 100 * 64 * 4),
        ("IVF100,SQ8", 64 + 8, 100 * 64 * 4),
        ("IVF100,PQ16", 16 + 8, 100 * 64 * 4 + 256 * 64 * 4),
        ("PQ16x4", 8, 16 * 64 * 4),
        ("OPQ16,IVF100,PQ16", 16 + 8, 64 * 64 * 4 + 100 * 64 * 4 + 256 * 64 * 4),
        ("HNSW32", 4 * 64 + 4 * 64 + 4 * 32 / 31 + 12, 0),
    ],
)
def test_bytes_of_a_vector(factory: str, vector: float, fixed: float) -> None:
    kind = parse(factory)
    assert kind.fixed_bytes(64) == fixed
    assert index_bytes(kind, 1000, 64) == pytest.approx(1000 * vector + fixed)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQ8", "IVF16,Flat", "IVF16,SQ8", "PQ8x4", "HNSW8"])
def test_bytes_are_those_of_a_real_index(factory: str) -> None:
    faiss = load_faiss()
    vectors = unit_vectors(2000, DIM)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if factory.startswith("IVF"):
        index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    assert index_bytes(parse(factory), 2000, DIM) == pytest.approx(len(faiss.serialize_index(index)), rel=0.01)


def test_scored_again_costs_halves() -> None:
    again, once = (index_bytes(parse("IVF100,PQ16"), 1000, 64, halves=halves) for halves in (True, False))
    assert again - once == 1000 * 2 * 64


def test_a_shard_holds_what_its_code_holds() -> None:
    """Flat waits in its own storage; another kind waits in float32, with a copy of its training sample."""
    flat = shard_bytes(parse("Flat"), 1000, dim=DIM, training_sample=100)
    assert (flat.serving, flat.refreshing, flat.at_most) == (256e3, 512e3, (MAX_COMMITTED + 1) * 256e3)
    lists = shard_bytes(parse("IVF10,SQ8"), 1000, dim=DIM, training_sample=100)
    generation = 1000 * 72 + 10 * 256
    assert lists.staging == 1100 * 256
    assert lists.refreshing == 2 * generation + 1100 * 256
    assert lists.at_most == 3 * generation + 1100 * 256
    for factory in ("Flat", "SQfp16", "SQ8"):
        waiting = WaitingVectors(1000, DIM, IndexConfig(factory=factory))
        planned = shard_bytes(parse(factory), 1000, dim=DIM, training_sample=0)
        one = planned.staging or planned.generation
        assert waiting._rows.nbytes == pytest.approx(one, rel=0.01)


def test_a_shard_on_a_gpu_waits_in_the_hosts_memory() -> None:
    one = shard_bytes(parse("SQfp16"), 1000, dim=DIM, training_sample=100, on_gpu=True)
    assert one.at_most == pytest.approx(3 * 128e3 + 256 * 2**20)
    assert one.host_at_most == pytest.approx(256e3 + 128e3)


def test_build_and_search_by_hand() -> None:
    flat, lists = parse("Flat"), parse("IVF10,Flat")
    assert flat.build_work(1000, DIM, 100) == (0.0, EXHAUSTIVE_PASSES * 1000 * 256)
    # ten rounds over the sample of 100, then every vector once, against ten centroids
    assert lists.build_work(1000, DIM, 100) == (
        2 * 64 * 10 * (10 * 100 + 1000),
        OTHER_PASSES * 1000 * 256,
    )
    assert estimate.stage_seconds(1000, DIM, 256e3, 2) == estimate.STAGE_PASSES / 2
    assert estimate.build_seconds((6e9, 2e9), 3e9, 1e9) == 4.0
    assert flat.search_work(1000, dim=DIM, batch=16, nprobe=5) == (2 * 16 * 1000 * 64, 0, 0)
    assert lists.search_work(1000, dim=DIM, batch=16, nprobe=5) == (0, 2 * 16 * 10 * 64, 16 * 500 * 256)
    assert lists.search_work(1000, dim=DIM, batch=16, nprobe=50)[2] == 16 * 1000 * 256  # no more lists than there are


def test_states_of_each_stage_by_hand() -> None:
    """Of 1,000 parameters on 4 ranks; DeepSpeed's own estimates where it has them (2P + 18P/N, 18P/N + ...)."""
    bf16 = [state_bytes(1000, 0, stage=stage, ranks=4, precision="bf16", offload=False)[0] for stage in range(4)]
    assert bf16 == [20_000, 2000 + 2000 + 4000, 2000 + 18_000 / 4, 20_000 / 4]
    fp32 = [state_bytes(1000, 0, stage=stage, ranks=4, precision="fp32", offload=False)[0] for stage in range(4)]
    assert fp32 == [16_000, 4000 + 4000 + 3000, 4000 + 1000 + 3000, 1000 + 1000 + 3000]
    assert state_bytes(1000, 500, stage=0, ranks=4, precision="fp32", offload=False)[0] == 16_000 + 2000
    assert state_bytes(1000, 500, stage=3, ranks=4, precision="bf16", offload=False)[0] == 5000 + 250
    assert state_bytes(1000, 0, stage=2, ranks=4, precision="bf16", offload=True) == (2500, 4000)


def test_deepspeed_agrees() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    for ranks in (1, 2, 8):
        theirs = estimate_zero2_model_states_mem_needs(10**8, ranks, 1, cpu_offload=False)[1]
        assert state_bytes(10**8, 0, stage=2, ranks=ranks, precision="bf16", offload=False)[0] == pytest.approx(theirs)


def test_activations_by_hand() -> None:
    """Korthikanti et al. 2022, equation 2: s b h L (34 + 5 a s / h)."""
    expected = 128 * 8 * 64 * 3 * (34 + 5 * 4 * 128 / 64)
    assert estimate.activation_bytes(
        128 * 8, 128, layers=3, hidden=64, heads=4, value_bytes=2, checkpointing=False
    ) == pytest.approx(expected)
    assert estimate.activation_bytes(
        1024, 128, layers=3, hidden=64, heads=4, value_bytes=4, checkpointing=False
    ) == pytest.approx(2 * expected)
    less = estimate.activation_bytes(1024, 128, layers=3, hidden=64, heads=4, value_bytes=2, checkpointing=True)
    assert less == pytest.approx(1024 * 3 * 64 * 2 + expected / 3)


def test_more_is_never_less() -> None:
    for factory in ("Flat", "SQfp16", "IVF256,SQ8", "PQ16", "HNSW16"):
        kind = parse(factory)
        sizes = [int(size) for size in np.logspace(3, 9, 25)]
        for line in (
            [shard_bytes(kind, n, dim=DIM, training_sample=10**5).at_most for n in sizes],
            [sum(kind.build_work(n, DIM, 10**5)) for n in sizes],
            [sum(kind.search_work(n, dim=DIM, batch=16, nprobe=8)) for n in sizes],
        ):
            assert all(math.isfinite(value) for value in line)
            assert line == sorted(line), factory
