"""Generations that are derived: base, delta and mask together answer exactly as brute force over the living
passages."""

import threading
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.snapshot import TornSnapshot
from indexing.corpus.stores.changes import contains
from indexing.dense.exact import search_exactly
from indexing.dense.faiss_build import Index
from indexing.dense.kinds import EXHAUSTIVE
from indexing.hits import merge
from indexing.indexing_settings import IndexConfig
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import NotBegun, Shard, shard_ranges
from tests.indexing.helpers import unit_vectors

DIM = 8


class Corpus:
    """What brute force knows: the vector and the weights version of every number, and which are living."""

    def __init__(self, num_base: int, num_shards: int, seed: int, factory: str = "Flat") -> None:
        self.random = np.random.default_rng(seed)
        self.num_base, self.num_shards, self.factory = num_base, num_shards, factory
        self.vectors = self.draw(num_base)
        self.versions = np.full(num_base, 1, np.int64)
        self.deleted = np.empty(0, np.int64)
        self.corpus_version, self.generation, self.weights_version = 0, 0, 1
        config = IndexConfig(factory=factory, num_shards=num_shards, nprobe=64)
        self.shards = [Shard(n, *bounds, config) for n, bounds in enumerate(shard_ranges(num_base, num_shards))]
        self.rebuild(self.weights_version)

    def draw(self, count: int) -> np.ndarray:
        """Vectors that 16 bits hold, each perhaps one that is there already: ties, whose order an IVF does not know."""
        if self.factory not in EXHAUSTIVE:
            return self.random.standard_normal((count, DIM)).astype(np.float32)
        return (self.random.integers(-3, 4, (count, DIM)) / 4).astype(np.float32)

    def owned(self, shard: Shard) -> np.ndarray:
        """The living numbers of a shard."""
        extra = np.arange(self.num_base + shard.shard_number, len(self.vectors), self.num_shards)
        numbers = np.concatenate([np.arange(shard.start, shard.stop), extra])
        return numbers[~contains(self.deleted, numbers)]

    def living(self) -> np.ndarray:
        numbers = np.arange(len(self.vectors))
        return numbers[~contains(self.deleted, numbers)]

    def commit(self) -> None:
        for shard in self.shards:
            shard.prepare(self.generation)
        for shard in self.shards:
            for old in shard.status().generations:
                if old < self.generation - 1:
                    shard.release(old)
            shard.commit(self.generation)

    def rebuild(self, weights_version: int) -> None:
        """A full refresh: other vectors, and no deleted row is left."""
        self.generation, self.weights_version = self.generation + 1, weights_version
        self.vectors = self.draw(len(self.vectors))
        self.versions[:] = weights_version
        for shard in self.shards:
            numbers = self.owned(shard)
            shard.begin(self.generation, weights_version, numbers, self.corpus_version)
            for part in np.array_split(numbers, 3):
                if len(part):
                    shard.stage(self.generation, weights_version, part, self.vectors[part])
            assert [(one.rows, one.wanted) for one in shard.status().staged] == [(len(numbers), len(numbers))]
        self.commit()

    def derive(self, numbers: np.ndarray, weights_version: int) -> None:
        """A generation in which `numbers` are new, or encoded again."""
        origin, self.generation = self.generation, self.generation + 1
        self.versions[numbers] = weights_version
        for shard in self.shards:
            mine = numbers[np.isin(numbers, self.owned(shard))]
            shard.derive(self.generation, origin, mine, None, self.corpus_version)
            if len(mine):
                shard.stage(self.generation, weights_version, mine, self.vectors[mine])
        self.commit()

    def add(self, count: int) -> None:
        numbers = np.arange(len(self.vectors), len(self.vectors) + count)
        self.corpus_version += 1
        self.vectors = np.concatenate([self.vectors, self.draw(count)])
        self.versions = np.concatenate([self.versions, np.zeros(count, np.int64)])
        self.derive(numbers, self.weights_version)

    def delete(self, count: int) -> None:
        self.corpus_version += 1
        gone = self.random.choice(self.living(), min(count, len(self.living()) - 1), replace=False)
        self.deleted = np.union1d(self.deleted, gone)
        for shard in self.shards:
            shard.hide(self.corpus_version, self.deleted)

    def encode_again(self, count: int) -> None:
        """What a partial refresh does."""
        numbers = np.sort(self.random.choice(self.living(), min(count, len(self.living())), replace=False))
        self.vectors[numbers] = self.draw(len(numbers))
        self.derive(numbers, self.weights_version + 1)

    def check(self, queries: np.ndarray, generation: int | None = None) -> None:
        """Ids, scores, vectors and versions are those of brute force, for some k up to all that live."""
        living = self.living()
        for k in {1, min(7, len(living)), len(living)}:
            hits = merge(
                [
                    shard.search(queries, k, generation=generation or self.generation, num_vectors=3)
                    for shard in self.shards
                ],
                k,
            )
            scores, rows = search_exactly(self.vectors[living], queries, k)
            assert hits.ids.tolist() == living[rows].tolist()
            if self.factory in EXHAUSTIVE:
                assert hits.scores.tolist() == scores.tolist()
            np.testing.assert_allclose(hits.scores, scores, rtol=1e-5, atol=1e-6)
            versions = np.full(hits.ids.shape, hits.weights_version) if hits.versions is None else hits.versions
            assert versions.tolist() == self.versions[hits.ids].tolist()
            if self.factory == "Flat":
                assert hits.vectors is not None
                np.testing.assert_array_equal(hits.vectors, self.vectors[hits.ids[:, : hits.vectors.shape[1]]])
        assert sum(shard.status().num_living for shard in self.shards) == len(living)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF3,Flat"])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_changes_answers_as_brute_force(tmp_path: Path, seed: int, factory: str) -> None:
    """Added, deleted, encoded again, rebuilt, saved and loaded, in random order."""
    corpus = Corpus(int(np.random.default_rng(seed).integers(20, 90)), 1 + seed % 3, seed, factory)
    queries = corpus.draw(6)
    for step in range(25):
        what = corpus.random.choice(["add", "delete", "again", "rebuild", "load"], p=[0.3, 0.3, 0.2, 0.1, 0.1])
        match what:
            case "add":
                corpus.add(int(corpus.random.integers(1, 9)))
            case "delete":
                corpus.delete(int(corpus.random.integers(1, 12)))
            case "again":
                corpus.encode_again(int(corpus.random.integers(1, 9)))
            case "rebuild" if factory != "IVF3,Flat" or min(len(corpus.owned(s)) for s in corpus.shards) > 3:
                corpus.rebuild(corpus.weights_version + 10)
            case _:
                directory = tmp_path / f"{step}"
                for number, shard in enumerate(corpus.shards):
                    shard.save(corpus.generation, directory)
                    config = IndexConfig(factory=factory, num_shards=len(corpus.shards), nprobe=64)
                    again = Shard(number, shard.start, stop=shard.stop, config=config)
                    again.hide(corpus.corpus_version, corpus.deleted)
                    again.load(corpus.generation, directory)
                    assert again.status().corpora == {corpus.generation: shard.status().corpora[corpus.generation]}
                    corpus.shards[number] = again
        corpus.check(queries)


def test_what_was_deleted_is_gone_from_the_generation_before_too() -> None:
    corpus = Corpus(30, 2, 0)
    before = corpus.generation
    corpus.add(3)
    best = corpus.shards[0].search(corpus.vectors[:4], 1, generation=before).ids[:, 0]
    corpus.corpus_version += 1
    corpus.deleted = np.unique(np.append(best, 30))
    for shard in corpus.shards:
        shard.hide(corpus.corpus_version, corpus.deleted)
        for generation in (before, corpus.generation):
            found = shard.search(corpus.vectors, 30, generation=generation).ids
            assert not np.isin(found, corpus.deleted).any()
    assert 31 in corpus.shards[1].search(corpus.vectors, 30, generation=corpus.generation).ids
    assert 31 not in corpus.shards[1].search(corpus.vectors, 30, generation=before).ids


def test_what_is_staged_when_something_is_deleted_never_shows_it() -> None:
    """Built and derived generations that were begun before."""
    shard, vectors = Shard(0, 0, stop=10, config=IndexConfig()), unit_vectors(12, DIM)
    shard.stage(1, 1, 0, vectors[:10])
    shard.prepare(1)
    shard.commit(1)
    shard.stage(2, 2, 0, vectors[:10])
    shard.derive(3, 1, np.array([10, 11]))
    shard.stage(3, 1, np.array([10, 11]), vectors[10:])
    shard.prepare(2)
    shard.prepare(3)
    shard.hide(1, np.array([4, 11]))
    for generation in (2, 3):
        shard.commit(generation)
        ids = shard.search(vectors, 12, generation=generation).ids
        assert not np.isin(ids, [4, 11]).any()
    assert sorted(shard.search(vectors[:1], 12, generation=3).ids[0]) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_a_shard_without_living_passages_answers() -> None:
    shards = [Shard(n, *bounds, IndexConfig()) for n, bounds in enumerate(shard_ranges(10, 2))]
    vectors = unit_vectors(10, DIM)
    for shard in shards:
        shard.stage(1, 1, shard.start, vectors[shard.start : shard.stop])
        shard.prepare(1)
        shard.commit(1)
        shard.hide(1, np.arange(5))
    assert shards[0].search(vectors, 4, generation=1, num_vectors=2).ids.shape == (10, 0)
    hits = merge([shard.search(vectors, 4, generation=1, num_vectors=2) for shard in shards], 4)
    assert hits.ids.tolist() == (5 + search_exactly(vectors[5:], vectors, 4)[1]).tolist()
    for shard in shards:  # rebuilt: an index of nothing
        numbers = np.arange(5, 10) if shard.shard_number else np.empty(0, np.int64)
        shard.begin(2, 2, numbers, 1)
        if len(numbers):
            shard.stage(2, 2, 5, vectors[5:])
        shard.prepare(2)
        shard.commit(2)
    hits = merge([shard.search(vectors, 4, generation=2, num_vectors=2) for shard in shards], 4)
    assert hits.ids.tolist() == (5 + search_exactly(vectors[5:], vectors, 4)[1]).tolist()
    shards[0].derive(3, 2, np.array([10]))  # and it can take passages again
    shards[0].stage(3, 2, np.array([10]), vectors[:1])
    shards[0].prepare(3)
    shards[0].commit(3)
    assert shards[0].search(vectors[:2], 4, generation=3, num_vectors=2).ids.tolist() == [[10], [10]]


def test_the_big_index_is_shared_in_memory_and_on_disk(tmp_path: Path) -> None:
    corpus = Corpus(40, 1, 3)
    shard = corpus.shards[0]
    first = shard.save(corpus.generation, tmp_path / "a")
    index = shard._serving.served[corpus.generation].generation.base.index
    corpus.add(5)
    corpus.encode_again(4)
    assert shard._serving.served[corpus.generation].generation.base.index is index
    second = shard.save(corpus.generation, tmp_path / "b", tmp_path / "a")
    assert (second / "base" / "index.faiss").samefile(first / "index.faiss")
    corpus.delete(3)
    corpus.add(2)
    third = shard.save(corpus.generation, tmp_path / "c", tmp_path / "b")
    assert (third / "base" / "index.faiss").samefile(first / "index.faiss")
    corpus.rebuild(9)
    fourth = shard.save(corpus.generation, tmp_path / "d", tmp_path / "c")
    assert not (fourth / "index.faiss").samefile(first / "index.faiss")
    corpus.add(1)
    fifth = shard.save(corpus.generation, tmp_path / "e", tmp_path / "c")  # another base: it is written
    assert not (fifth / "base" / "index.faiss").samefile(first / "index.faiss")


def test_a_torn_derived_snapshot_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(20, 1, 4)
    corpus.add(3)
    path = corpus.shards[0].save(corpus.generation, tmp_path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"delta.numbers", "delta.versions", "delta.vectors", "index.faiss"} < {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            for damage in (whole[:position], whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]):
                file.write_bytes(damage)
                with pytest.raises(TornSnapshot, match="shard-0000"):
                    Shard(0, 0, stop=20, config=IndexConfig()).load(corpus.generation, tmp_path)
        file.write_bytes(whole)
    assert Shard(0, 0, stop=20, config=IndexConfig()).load(corpus.generation, tmp_path) == 1


def test_refused_calls() -> None:
    shard, vectors = Shard(0, 0, stop=10, config=IndexConfig()), unit_vectors(10, DIM)
    with pytest.raises(GenerationGone):
        shard.derive(1, 0, np.array([3]))
    with pytest.raises(NotBegun):  # it came back empty, and does not know what it owns by now
        shard.stage(1, 1, np.array([10, 13]), vectors[:2])
    shard.stage(1, 1, 0, vectors)
    shard.prepare(1)
    shard.commit(1)
    with pytest.raises(ValueError, match="generation 0 is not newer than 1"):
        shard.derive(0, 1, np.array([3]))
    shard.derive(2, 1, np.array([3, 10]))
    with pytest.raises(ValueError, match="5 dimensions: needed are 8"):
        shard.stage(2, 1, np.array([3]), vectors[:1, :5])
    shard.stage(2, 1, np.array([10]), vectors[:1])
    with pytest.raises(ValueError, match="1 of 2 rows, 1 are missing: first passage 3"):
        shard.prepare(2)
    shard.stage(2, 1, np.array([3]), vectors[:1] * np.nan)
    with pytest.raises(ValueError, match="not finite, first passage 3"):
        shard.prepare(2)
    shard.abort(2)
    assert shard.status().deriving is None
    with pytest.raises(ValueError, match="generation 2 is not prepared"):
        shard.commit(2)


def test_built_and_derived_are_staged_at_the_same_time() -> None:
    """A change is committed while a whole generation is being built, and the built one is then brought up to date."""
    shard, old, new = Shard(0, 0, stop=10, config=IndexConfig()), unit_vectors(11, DIM), unit_vectors(11, DIM, seed=1)
    shard.stage(1, 1, 0, old[:10])
    shard.prepare(1)
    shard.commit(1)
    shard.stage(2, 20, 0, new[:5])
    shard.derive(3, 1, np.array([10]), None, 1)
    shard.stage(3, 1, np.array([10]), old[10:])
    shard.prepare(3)
    shard.commit(3)
    assert shard.search(old[10:], 1).ids.tolist() == [[10]]
    shard.stage(2, 20, 5, new[5:10])
    shard.prepare(2)
    with pytest.raises(ValueError, match="generation 2 is not newer than 3"):
        shard.commit(2)
    shard.derive(4, 2, np.array([10]), None, 1)
    shard.stage(4, 20, np.array([10]), new[10:])
    shard.prepare(4)
    shard.release(1)
    shard.commit(4)
    status = shard.status()
    assert (status.staged, status.corpora) == ([], {3: 1, 4: 1})
    hits = shard.search(new, 11, generation=4)
    assert hits.ids.tolist() == search_exactly(new, new, 11)[1].tolist()
    assert (hits.weights_version, hits.versions) == (20, None)


def test_hide_waits_for_searches_that_began_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, vectors = Shard(0, 0, stop=10, config=IndexConfig()), unit_vectors(10, DIM)
    shard.stage(1, 1, 0, vectors)
    shard.prepare(1)
    shard.commit(1)
    inside, go_on, search = threading.Event(), threading.Event(), Index.search

    def slow(
        self: Index, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        inside.set()
        assert go_on.wait(10)
        return search(self, queries, k, allowed)

    monkeypatch.setattr(Index, "search", slow)
    thread = threading.Thread(target=shard.search, args=(vectors, 2, 1))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(TimeoutError, match=r"last 0\.05 s"):
        shard.hide(1, np.array([3]), timeout_s=0.05)
    monkeypatch.setattr(Index, "search", search)
    assert 3 not in shard.search(vectors, 10, generation=1).ids  # later ones are right at once
    hiding = threading.Thread(target=shard.hide, args=(1, np.array([3])))
    hiding.start()
    go_on.set()
    for waiting in (thread, hiding):
        waiting.join(10)
        assert not waiting.is_alive()
