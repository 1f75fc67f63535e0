"""Derived generations together with the rest of the index: filters, kinds, figures, and another number of shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.changes import contains
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.metadata import MetadataColumns, count_passing
from indexing.corpus.stores.passages import write_store
from indexing.dense.exact import recall, score_pairs, search_exactly
from indexing.hits import Hits, merge
from indexing.indexing_settings import IndexConfig
from indexing.shard.reshard import check_ranges
from indexing.shard.shard import Shard, shard_ranges
from tests.indexing.helpers import clustered_vectors
from tests.indexing.shard.test_generation import Corpus

NUM, ADDED, DIM = 400, 24, 16
VECTORS, QUERIES = clustered_vectors(NUM + ADDED, DIM), clustered_vectors(10, DIM, seed=1)
AGAIN = np.arange(3, NUM, 40)  # passages that are encoded again
NEW = clustered_vectors(len(AGAIN), DIM, seed=2)
GONE = np.array([0, 5, 43, 200, NUM + 3])  # deleted; one of them was encoded again, one was added
NOW = VECTORS.copy()
NOW[AGAIN] = NEW
LIVING = ~contains(GONE, np.arange(NUM + ADDED))


def commit(shard: Shard, generation: int) -> None:
    shard.prepare(generation)
    shard.commit(generation)


def extra_of(shard: Shard, num_shards: int, count: int = ADDED) -> np.ndarray:
    return np.arange(NUM + shard.shard_number, NUM + count, num_shards)


def derived(config: IndexConfig) -> list[Shard]:
    """Generation 2: passages added, encoded again and deleted after generation 1 was built."""
    shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(NUM, config.num_shards))]
    for shard in shards:
        shard.stage(1, 10, shard.start, VECTORS[shard.start : shard.stop])
        commit(shard, 1)
        again = AGAIN[np.isin(AGAIN, np.arange(shard.start, shard.stop))]
        numbers = np.concatenate([again, extra_of(shard, config.num_shards)])
        shard.derive(2, 1, numbers, None, 1)
        shard.stage(2, 11, numbers, NOW[numbers])
        commit(shard, 2)
        shard.hide(2, GONE)
    return shards


def whole(config: IndexConfig) -> list[Shard]:
    """Generation 2, built as a whole: added passages stand in the big indexes, deleted ones do not."""
    shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(NUM, config.num_shards))]
    for shard in shards:
        numbers = np.concatenate([np.arange(shard.start, shard.stop), extra_of(shard, config.num_shards)])
        numbers = numbers[LIVING[numbers]]
        shard.begin(2, 10, numbers, 1)
        shard.stage(2, 10, numbers, NOW[numbers])
        commit(shard, 2)
        shard.hide(2, GONE)
    return shards


def loaded(folder: Path, config: IndexConfig) -> list[Shard]:
    shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(NUM, config.num_shards))]
    for shard in shards:
        shard.hide(2, GONE)
        assert shard.load(2, folder) == 10
        assert shard.status().corpora == {2: 1}
    assert sum(shard.status().num_living for shard in shards) == LIVING.sum()
    return shards


def hits_of(shards: list[Shard], k: int = 10) -> Hits:
    return merge([shard.search(QUERIES, k, generation=2) for shard in shards], k)


def exact(k: int = 10) -> np.ndarray:
    return search_exactly(NOW, QUERIES, k, LIVING)[1]


KINDS = [
    IndexConfig(factory="Flat"),
    IndexConfig(factory="SQfp16"),
    IndexConfig(factory="SQ8"),
    IndexConfig(factory="IVF8,SQ8", nprobe=8, rescore_candidates=40),
    IndexConfig(factory="PQ8x4", rescore_candidates=60),
    IndexConfig(factory="OPQ4,IVF4,PQ4x4", nprobe=4, rescore_candidates=100, training_sample=150),
    IndexConfig(factory="HNSW8"),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.factory)
def test_a_delta_beside_every_kind(config: IndexConfig) -> None:
    """Nothing deleted, nothing twice; what stands in the delta has its exact score."""
    shards = derived(config)
    hits = hits_of(shards)
    assert LIVING[hits.ids].all()
    assert all(len(set(row)) == len(row) for row in hits.ids.tolist())
    assert recall(hits.ids, exact()) > (0.9 if config.factory != "SQ8" else 0.8)
    fresh = np.isin(hits.ids, AGAIN) | (hits.ids >= NUM)
    assert fresh.sum() > 5
    tolerance = 1e-3 if config.factory == "SQfp16" else 1e-6
    np.testing.assert_allclose(hits.scores[fresh], score_pairs(NOW, QUERIES, hits.ids)[fresh], atol=tolerance)
    assert hits.versions is not None
    assert (hits.versions == np.where(fresh, 11, 10)).all()
    everything = hits_of(shards, int(LIVING.sum()))
    assert sorted(everything.ids[0].tolist()) == np.flatnonzero(LIVING).tolist()


def test_figures_of_a_derived_generation_are_those_of_its_base(tmp_path: Path) -> None:
    config = IndexConfig(factory="IVF8,SQ8", num_shards=1, nprobe=1, probe_queries=30)
    (built,) = derived(config)
    figures, found = built.status().figures, built._serving.served[1].generation.figures
    base = built._serving.served[2].generation.base.figures
    assert figures.recall == base.recall == found.recall
    assert figures.recall is not None
    assert 0.1 < figures.recall < 1
    assert figures.build_s == base.build_s > 0
    num_delta = len(AGAIN) + ADDED
    total = base.bytes_per_passage * NUM + num_delta * 2 * 4 * DIM  # vectors, and the index of them
    assert figures.bytes_per_passage == pytest.approx(total / LIVING.sum())
    built.save(2, tmp_path)
    (again,) = loaded(tmp_path, config)
    assert again.status().figures == replace(figures, build_s=0.0)  # the recall is kept, nothing was built


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("make", [derived, whole])
def test_a_changed_corpus_on_another_number_of_shards(
    tmp_path: Path, factory: str, before: int, after: int, make: type
) -> None:
    shards = make(IndexConfig(factory=factory, num_shards=before))
    for shard in shards:
        shard.save(2, tmp_path)
    one, other = hits_of(shards, 50), hits_of(loaded(tmp_path, IndexConfig(factory=factory, num_shards=after)), 50)
    assert one.ids.tolist() == other.ids.tolist()
    assert one.scores.tolist() == other.scores.tolist()
    assert (one.versions is None) == (other.versions is None)
    if one.versions is not None and other.versions is not None:
        assert one.versions.tolist() == other.versions.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_changes_go_on_after_another_number_of_shards(tmp_path: Path, seed: int) -> None:
    """Added passages belong to other shards then: each is found once, before and after the next changes."""
    corpus = Corpus(60, 1 + seed, seed)
    queries = corpus.draw(5)
    for step, num_shards in enumerate((3, 2, 4, 1)):
        corpus.add(7)
        corpus.delete(5)
        corpus.encode_again(4)
        if step == 2:
            corpus.rebuild(corpus.weights_version + 10)
        for shard in corpus.shards:
            shard.save(corpus.generation, tmp_path / f"{step}")
        config, corpus.num_shards = IndexConfig(factory="Flat", num_shards=num_shards), num_shards
        corpus.shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(60, num_shards))]
        for shard in corpus.shards:
            shard.hide(corpus.corpus_version, corpus.deleted)
            shard.load(corpus.generation, tmp_path / f"{step}")
        corpus.check(queries)
        corpus.add(3)
        corpus.check(queries)


def test_equal_ranges_of_another_number_of_shards_hold_other_added_passages(tmp_path: Path) -> None:
    """The first of 4 and of 5 shards over 5 passages hold passage 0, but not the same added ones."""
    corpus = Corpus(5, 4, 0)
    corpus.add(9)
    for shard in corpus.shards:
        shard.save(corpus.generation, tmp_path)
    corpus.num_shards, config = 5, IndexConfig(factory="Flat", num_shards=5)
    corpus.shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(5, 5))]
    for shard in corpus.shards:
        shard.load(corpus.generation, tmp_path)
    corpus.check(corpus.draw(3))


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "IVF4,PQ8x4", "OPQ4,IVF4,PQ4x4", "PQ8x4", "SQ8"])
@pytest.mark.parametrize("make", [derived, whole])
def test_codes_are_cut_out_of_one_shard(tmp_path: Path, factory: str, make: type) -> None:
    """All lists visited, the answer is that of the saved shard, though added passages lie apart."""
    config = IndexConfig(factory=factory, num_shards=1, nprobe=8, training_sample=300)
    shards = make(config)
    shards[0].save(2, tmp_path)
    check_ranges(shard_ranges(NUM, 1), shard_ranges(NUM, 3), factory, tmp_path)
    one, other = hits_of(shards, 30), hits_of(loaded(tmp_path, replace(config, num_shards=3)), 30)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)
    assert recall(other.ids, one.ids) > 0.97  # equal codes tie


def test_codes_of_added_passages_are_not_joined(tmp_path: Path) -> None:
    """Where they stand in the big indexes they are spread over all shards; in a delta they are whole vectors."""
    ranges = shard_ranges(NUM, 2), shard_ranges(NUM, 4)
    config = IndexConfig(factory="PQ8x4", num_shards=2)
    for name, make in (("derived", derived), ("whole", whole)):
        for shard in make(config):
            shard.save(2, tmp_path / name)
    check_ranges(*ranges, "PQ8x4", tmp_path / "derived")
    assert recall(hits_of(loaded(tmp_path / "derived", replace(config, num_shards=4))).ids, exact()) > 0.3
    message = r"has 2 shards and cannot become 4: codes .* Set index\.num_shards to 2,"
    with pytest.raises(ValueError, match=message):
        check_ranges(*ranges, "PQ8x4", tmp_path / "whole")
    with pytest.raises(ValueError, match="codes of different shards cannot be joined"):
        loaded(tmp_path / "whole", replace(config, num_shards=4))
    kept = IndexConfig(factory="PQ8x4", num_shards=2, rescore_candidates=60)
    for shard in whole(kept):
        shard.save(2, tmp_path / "kept")
    check_ranges(*ranges, "PQ8x4", tmp_path / "kept")
    assert recall(hits_of(loaded(tmp_path / "kept", replace(kept, num_shards=4))).ids, exact()) > 0.9


def test_shards_of_different_weights_keep_the_version_of_each_passage(tmp_path: Path) -> None:
    """One shard was lost and encoded again from newer weights: on other shards its rows stay what they are."""
    shards = [
        Shard(n, *bounds, IndexConfig(factory="Flat", num_shards=2)) for n, bounds in enumerate(shard_ranges(NUM, 2))
    ]
    extra = np.array([NUM, NUM + 1])
    for shard, version in zip(shards, (10, 12), strict=True):
        shard.stage(1, version, shard.start, VECTORS[shard.start : shard.stop])
        commit(shard, 1)
        shard.derive(2, 1, extra[shard.shard_number :: 2], 10, 1)
        shard.stage(2, 11, extra[shard.shard_number :: 2], VECTORS[extra[shard.shard_number :: 2]])
        commit(shard, 2)
        shard.save(2, tmp_path)
    one = hits_of(shards, 30)
    for num_shards in (1, 3):
        again = [
            Shard(n, *bounds, IndexConfig(factory="Flat", num_shards=num_shards))
            for n, bounds in enumerate(shard_ranges(NUM, num_shards))
        ]
        for shard in again:
            shard.load(2, tmp_path)
        other = hits_of(again, 30)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.versions is not None
        assert other.versions is not None
        assert one.versions.tolist() == other.versions.tolist()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_a_filter_sees_added_passages_and_no_deleted_ones(tmp_path: Path, factory: str) -> None:
    def described(number: int) -> dict[str, object]:
        more = {"tag": number % 2} if number >= NUM else {}  # a field that the store itself does not know
        return {"year": 2000 + number % 7, "lang": "en" if number % 3 else "de", **more}

    base = [Passage(f"p{n}", "", f"text {n}", described(n)) for n in range(NUM)]
    write_store(tmp_path / "store", base, [])
    store = LiveStore.open_with(tmp_path / "store", tmp_path / "corpus")
    config = IndexConfig(factory=factory, num_shards=3, nprobe=4)
    shards = []
    for number, bounds in enumerate(shard_ranges(NUM, 3)):
        columns = MetadataColumns(tmp_path / "store", *bounds, shard=number, num_shards=3, corpus=tmp_path / "corpus")
        shards.append(Shard(number, *bounds, config, metadata=columns))
        shards[-1].stage(1, 10, bounds[0], VECTORS[bounds[0] : bounds[1]])
        commit(shards[-1], 1)

    def check(generation: int, count: int, gone: np.ndarray) -> None:
        every = np.arange(NUM + count)
        living = ~contains(gone, every)
        for asked in ({"year": {">=": 2005}}, {"lang": "de", "year": 2001}, {"tag": 1}, {"tag": None, "lang": "en"}):
            where = parse_filter(asked)
            assert where is not None
            if "tag" in where.fields and not count:
                continue
            allowed = living & np.array([where.passes(described(int(n))) for n in every])
            assert count_passing(tmp_path / "store", where, tmp_path / "corpus") == allowed.sum()
            k = int(min(12, allowed.sum()))
            found = [shard.search(QUERIES, 12, generation, where=where) for shard in shards]
            assert sum(one.num_allowed for one in found) == allowed.sum()
            hits = merge(found, 12, allow_fewer=True)
            assert hits.ids.shape == (len(QUERIES), k)
            assert allowed[hits.ids].all()
            if factory != "HNSW8":
                assert hits.ids.tolist() == search_exactly(VECTORS[: NUM + count], QUERIES, k, allowed)[1].tolist()

    nobody = parse_filter({"tag": 1})
    with pytest.raises(ValueError, match=r"retrieval\.where\.tag: no passage has this field"):
        shards[0].search(QUERIES, 1, where=nobody)
    check(1, 0, np.empty(0, np.int64))
    gone = np.empty(0, np.int64)
    for generation, count in ((2, 10), (3, ADDED)):
        numbers = np.arange(NUM if generation == 2 else NUM + 10, NUM + count)
        put = [Passage(f"p{n}", "", f"text {n}", described(int(n))) for n in numbers]
        dead = [5, 10, int(numbers[0]) - 1] if generation == 2 else [11, NUM + 4]
        change = change_corpus(store, Wanted(put=put, delete=[f"p{n}" for n in dead]), sides=[])
        gone = store.log.deleted_at()
        for shard in shards:
            mine = numbers[(numbers - NUM) % 3 == shard.shard_number]
            shard.hide(change.version, gone)
            shard.derive(generation, generation - 1, mine, None, change.version)
            shard.stage(generation, 10, mine, VECTORS[mine])
            commit(shard, generation)
        check(generation, count, gone)
    for shard in shards:  # a whole generation: numbers with gaps
        shard.release(1)
        owned = store.log.owned(shard.shard_number, 3, start=shard.start, stop=shard.stop, version=store.log.version)
        assert owned is not None
        shard.begin(4, 10, owned, store.log.version)
        shard.stage(4, 10, owned, VECTORS[owned])
        commit(shard, 4)
    check(4, ADDED, gone)
    changed = Passage("p7", "", "another text", {"lang": "de", "year": 1999})  # an update brings its own metadata
    change_corpus(store, Wanted(put=[changed], mode="update"), sides=[])
    row = store.row_of("p7")
    assert row == NUM + ADDED
    assert store.metadata(row) == store.passage(row).metadata == changed.metadata
    old = parse_filter({"year": 1999})
    assert old is not None
    assert count_passing(tmp_path / "store", old, tmp_path / "corpus") == 1
