"""A saved generation on another number of shards: the same answers, the same codes, or a clear refusal."""

import re
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.snapshot import TornSnapshot
from indexing.dense.exact import recall, search_exactly
from indexing.hits import Hits, merge
from indexing.indexing_settings import IndexConfig
from indexing.shard.reshard import check_ranges
from indexing.shard.shard import Shard, shard_ranges
from tests.indexing.helpers import clustered_vectors

NUM, DIM = 331, 16
VECTORS, QUERIES = clustered_vectors(NUM, DIM), clustered_vectors(12, DIM, seed=1)
EXACT = search_exactly(VECTORS, QUERIES, 10)[1]


def saved(folder: Path, config: IndexConfig, num_shards: int) -> list[Shard]:
    """Shards that serve VECTORS as generation 4 of weights version 40, saved in `folder`."""
    shards = [Shard(number, *bounds, config) for number, bounds in enumerate(shard_ranges(NUM, num_shards))]
    for shard in shards:
        shard.stage(4, 40, shard.start, VECTORS[shard.start : shard.stop])
        shard.prepare(4)
        shard.commit(4)
        shard.save(4, folder)
    return shards


def loaded(folder: Path, config: IndexConfig, num_shards: int) -> list[Shard]:
    shards = [Shard(number, *bounds, config) for number, bounds in enumerate(shard_ranges(NUM, num_shards))]
    assert {shard.load(4, folder) for shard in shards} == {40}
    return shards


def hits_of(shards: list[Shard], k: int = 10, num_vectors: int = 0) -> Hits:
    return merge([shard.search(QUERIES, k, generation=4, num_vectors=num_vectors) for shard in shards], k)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 5), (5, 2), (3, 6), (4, 4)])
def test_exhaustive_kinds_answer_alike(tmp_path: Path, factory: str, before: int, after: int) -> None:
    config = IndexConfig(factory=factory)
    one, other = hits_of(saved(tmp_path, config, before), 25, 3), hits_of(loaded(tmp_path, config, after), 25, 3)
    assert one.ids.tolist() == other.ids.tolist()
    assert one.scores.tolist() == other.scores.tolist()
    assert (one.vectors is None) == (other.vectors is None) == (factory != "Flat")
    if one.vectors is not None and other.vectors is not None:
        assert one.vectors.tolist() == other.vectors.tolist()


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQfp16", "HNSW8", "SQ8", "IVF8,SQ8", "HNSW8,SQ8"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 5)])
def test_kinds_that_keep_vectors_find_as_much(tmp_path: Path, factory: str, before: int, after: int) -> None:
    config = IndexConfig(factory=factory, nprobe=8)
    one, other = hits_of(saved(tmp_path, config, before)), hits_of(loaded(tmp_path, config, after))
    assert recall(other.ids, EXACT) >= recall(one.ids, EXACT) - 0.02
    assert np.abs(one.scores - other.scores).max() < 0.02


@pytest.mark.parametrize("factory", ["PQ8x4", "IVF4,PQ8x4", "OPQ4,PQ4x4", "OPQ4,IVF4,PQ4x4", "SQ8", "IVF4,SQ8"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 6)])
def test_codes_are_cut_bit_for_bit(tmp_path: Path, factory: str, before: int, after: int) -> None:
    """All lists visited, the answer is that of the saved shards: no code was made from a code."""
    config = IndexConfig(factory=factory, nprobe=99, training_sample=300)
    one = hits_of(saved(tmp_path, config, before), 20)
    other = hits_of(loaded(tmp_path, config, after), 20)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)
    assert recall(other.ids, one.ids) > 0.97  # equal codes tie, and shards cut ties another way


@pytest.mark.parametrize("factory", ["PQ8x4", "IVF4,PQ8x4"])
def test_codes_are_joined_by_the_vectors_beside_them(tmp_path: Path, factory: str) -> None:
    config = IndexConfig(factory=factory, nprobe=9, rescore_candidates=60)
    shards = saved(tmp_path, config, 3)
    for after in (1, 2, 6):
        other = hits_of(loaded(tmp_path, config, after))
        assert recall(other.ids, EXACT) > 0.95
    again = loaded(tmp_path, config, 6)
    again[5].save(4, tmp_path / "again")  # and what was loaded is saved with its own vectors
    assert (tmp_path / "again" / "shard-0005" / "index.f16").stat().st_size == 2 * DIM * (NUM - NUM * 5 // 6)
    assert recall(hits_of(shards).ids, EXACT) > 0.95


def test_codes_of_different_shards_are_not_joined(tmp_path: Path) -> None:
    config = IndexConfig(factory="PQ8x4")
    saved(tmp_path, config, 2)
    message = r"has 2 shards and cannot become 3: codes .* Set index\.num_shards to a multiple of 2"
    with pytest.raises(ValueError, match=message):
        check_ranges(shard_ranges(NUM, 2), shard_ranges(NUM, 3), "PQ8x4", tmp_path)
    check_ranges(shard_ranges(NUM, 2), shard_ranges(NUM, 4), "PQ8x4", tmp_path)
    check_ranges(shard_ranges(NUM, 2), shard_ranges(NUM, 3), "SQ8", tmp_path)
    with pytest.raises(ValueError, match=r"holds the passages of .*: it cannot serve"):
        check_ranges(shard_ranges(NUM, 2), shard_ranges(NUM + 1, 2), "Flat", tmp_path)
    with pytest.raises(ValueError, match="cannot be joined"):
        Shard(1, *shard_ranges(NUM, 3)[1], config).load(4, tmp_path)


def test_bad_snapshots_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, IndexConfig(), 3)
    fresh = Shard(0, 0, stop=NUM, config=IndexConfig())
    with pytest.raises(ValueError, match="has generation 4: needed is 5"):
        fresh.load(5, tmp_path)
    with pytest.raises(ValueError, match="has factory 'Flat': needed is 'SQ8'"):
        Shard(0, 0, stop=NUM, config=IndexConfig(factory="SQ8")).load(4, tmp_path)
    with pytest.raises(ValueError, match=rf"does not hold the passages 0 to {NUM}"):
        Shard(0, 0, stop=NUM + 1, config=IndexConfig()).load(4, tmp_path)
    index = tmp_path / "shard-0001" / "index.faiss"
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    with pytest.raises(TornSnapshot, match="shard-0001"):
        fresh.load(4, tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} does not hold the passages 0 to {NUM - 1}")):
        fresh.load(4, tmp_path)
    assert fresh.status().generations == {}
