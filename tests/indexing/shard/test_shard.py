"""Shards: two-phase switching, exact bookkeeping, equality with brute force for any number of shards, concurrency."""

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.corpus.snapshot import TornSnapshot
from indexing.dense.exact import search_exactly
from indexing.dense.faiss_build import Index
from indexing.hits import Hits, merge
from indexing.indexing_settings import IndexConfig
from indexing.shard.serving import GenerationGone
from indexing.shard.shard import Shard, shard_ranges
from indexing.shard.waiting import WaitingVectors
from tests.indexing.helpers import unit_vectors

FLAT = IndexConfig()
DIM = 8


def fill(shard: Shard, generation: int, vectors: np.ndarray, weights_version: int = 0) -> None:
    """Stage the shard's rows of the whole corpus' `vectors` in two chunks."""
    middle = (shard.start + shard.stop) // 2
    for start, stop in ((middle, shard.stop), (shard.start, middle)):
        shard.stage(generation, weights_version or 10 * generation, start, vectors[start:stop])


def serve(shard: Shard, generation: int, vectors: np.ndarray) -> None:
    fill(shard, generation, vectors)
    shard.prepare(generation)
    shard.commit(generation)


def search_all(shards: list[Shard], queries: np.ndarray, k: int, generation: int) -> Hits:
    return merge([shard.search(queries, k, generation=generation) for shard in shards], k)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 60])
def test_number_of_shards_does_not_matter(num_shards: int, factory: str) -> None:
    """Ids and scores equal brute force bit for bit, with every vector three times and k above a shard's size."""
    vectors = np.tile(unit_vectors(20, DIM), (3, 1)).astype(np.float16).astype(np.float32)
    queries = unit_vectors(9, DIM, seed=1)
    shards = [Shard(n, *bounds, IndexConfig(factory=factory)) for n, bounds in enumerate(shard_ranges(60, num_shards))]
    for shard in shards:
        serve(shard, 1, vectors)
    for k in (1, 10, 60):
        hits = search_all(shards, queries, k, 1)
        scores, rows = search_exactly(vectors, queries, k)
        assert hits.ids.tolist() == rows.tolist()
        assert hits.scores.tolist() == scores.tolist()
        assert (hits.generation, hits.weights_version) == (1, 10)
    with pytest.raises(ValueError, match=r"retrieval\.k=61: must be 1 to 60, the passages of the index"):
        search_all(shards, queries, 61, 1)


def test_shard_ranges() -> None:
    assert shard_ranges(10, 3) == [(0, 3), (3, 6), (6, 10)]
    for num_shards in (0, 11):
        with pytest.raises(ValueError, match=rf"index\.num_shards={num_shards}: must be 1 to 10, the number"):
            shard_ranges(10, num_shards)


def test_switching() -> None:
    """The old generation answers until the new one is committed, and after that until it is released."""
    old, new = unit_vectors(20, DIM), unit_vectors(20, DIM, seed=1)
    queries = unit_vectors(3, DIM, seed=2)
    shard = Shard(0, 0, stop=20, config=FLAT)
    with pytest.raises(GenerationGone, match="generation -1 is not served, the newest is -1"):
        shard.search(queries, 4)
    serve(shard, 1, old)
    fill(shard, 2, new)
    shard.prepare(2)
    assert shard.search(queries, 4).generation == 1
    with pytest.raises(GenerationGone) as gone:
        shard.search(queries, 4, generation=2)
    assert (gone.value.generation, gone.value.committed) == (2, 1)
    shard.commit(2)
    for generation, vectors in ((1, old), (2, new)):
        hits = shard.search(queries, 4, generation=generation)
        assert hits.ids.tolist() == search_exactly(vectors, queries, 4)[1].tolist()
        assert (hits.generation, hits.weights_version, hits.committed) == (generation, 10 * generation, 2)
    assert shard.search(queries, 4).generation == 2
    shard.release(1)
    with pytest.raises(GenerationGone) as gone:
        shard.search(queries, 4, generation=1)
    assert gone.value.committed == 2


def test_bookkeeping_of_rows() -> None:
    """Chunks in any order, overlapping, sent twice: exactly the missing rows are missing."""
    vectors = unit_vectors(30, DIM)
    shard = Shard(4, 10, stop=30, config=FLAT)
    assert shard.staged_rows(1) == 0
    for start, stop, expected in ((10, 15, 5), (10, 15, 5), (13, 18, 8), (25, 30, 13)):
        shard.stage(1, 5, start, vectors[start:stop])
        assert shard.staged_rows(1) == expected
    with pytest.raises(ValueError, match="13 of 20 rows, 7 are missing: first passage 18"):
        shard.prepare(1)
    for start, stop in ((17, 25), (10, 30)):
        shard.stage(1, 5, start, vectors[start:stop])
        assert shard.staged_rows(1) == 20
    shard.prepare(1)
    shard.stage(1, 5, 10, np.zeros((20, DIM), np.float32))  # a late chunk changes nothing
    shard.commit(1)
    shard.stage(1, 5, 10, np.zeros((20, DIM), np.float32))
    assert shard.staged_rows(1) == 20
    assert not shard.status().staged
    hits = shard.search(vectors[:5], 3, generation=1)
    assert hits.ids.tolist() == (10 + search_exactly(vectors[10:], vectors[:5], 3)[1]).tolist()


def test_everything_twice() -> None:
    vectors = unit_vectors(10, DIM)
    shard = Shard(0, 0, stop=10, config=FLAT)
    serve(shard, 1, vectors)
    fill(shard, 2, vectors)
    for call in (shard.prepare, shard.prepare, shard.commit, shard.commit, shard.prepare, shard.abort):
        call(2)
    for _ in range(2):
        shard.release(1)
    shard.release(99)
    shard.abort(99)
    assert shard.status().generations == {2: 20}


def test_not_finite() -> None:
    """Refused when prepared, by passage number; staging the rows again cures it."""
    vectors = unit_vectors(30, DIM)
    broken = vectors.copy()
    broken[17, 3], broken[22] = np.nan, np.inf
    shard = Shard(0, 10, stop=30, config=FLAT)
    serve(shard, 1, vectors)
    fill(shard, 2, broken)
    with pytest.raises(ValueError, match="generation 2 has 2 vectors that are not finite, first passage 17"):
        shard.prepare(2)
    assert shard.search(vectors[:1], 1).generation == 1
    shard.stage(2, 20, 15, vectors[15:25])
    shard.prepare(2)
    shard.commit(2)


def test_abort_and_overtaking() -> None:
    vectors = unit_vectors(10, DIM)
    shard = Shard(0, 0, stop=10, config=FLAT)
    serve(shard, 1, vectors)
    shard.stage(2, 20, 0, vectors[:5])
    shard.abort(2)
    assert (shard.status().staged, shard.staged_rows(2)) == ([], 0)
    shard.stage(2, 20, 0, vectors[:5])
    shard.stage(2, 21, 0, vectors[:3])  # newer weights for the same generation: begin again
    assert shard.staged_rows(2) == 3
    with pytest.raises(ValueError, match=r"\(2, 20\) was overtaken by \(2, 21\)"):
        shard.stage(2, 20, 5, vectors[5:])
    shard.stage(3, 21, 0, vectors)
    assert (shard.staged_rows(2), shard.staged_rows(3)) == (0, 10)
    shard.prepare(3)
    with pytest.raises(ValueError, match="generation 3 is prepared: commit or abort it before 4"):
        shard.stage(4, 40, 0, vectors)
    shard.abort(3)
    shard.stage(4, 40, 0, vectors)


@pytest.mark.parametrize(
    ("start", "vectors", "message"),
    [
        (9, GOOD := unit_vectors(3, DIM), "passages 9 to 11 are not in shard 5, which holds 10 to 19"),
        (18, GOOD, "passages 18 to 20 are not in shard 5"),
        (10, GOOD[:, :5], "staged vectors have 5 dimensions: needed are 8"),
        (10, GOOD[0], r"shape \(8,\): needed is \[n, dim\]"),
        (10, GOOD[:, :0], r"shape \(3, 0\)"),
    ],
)
def test_refused_chunks(start: int, vectors: np.ndarray, message: str) -> None:
    shard = Shard(5, 10, stop=20, config=FLAT)
    shard.stage(1, 1, 10, GOOD)
    with pytest.raises(ValueError, match=message):
        shard.stage(1, 1, start, vectors)
    assert shard.staged_rows(1) == 3


def test_refused_calls() -> None:
    vectors = unit_vectors(10, DIM)
    with pytest.raises(ValueError, match="shard 0 cannot hold passages 4 to 3"):
        Shard(0, 4, stop=4, config=FLAT)
    shard = Shard(0, 0, stop=10, config=FLAT)
    for call in (shard.prepare, shard.commit):
        with pytest.raises(ValueError, match=r"generation 1 is not (staged|prepared) on shard 0"):
            call(1)
    fill(shard, 1, vectors)
    with pytest.raises(ValueError, match="generation 1 is not prepared"):
        shard.commit(1)
    serve(shard, 2, vectors)
    with pytest.raises(ValueError, match="generation 1 is not newer than 2"):
        shard.stage(1, 10, 0, vectors)
    with pytest.raises(ValueError, match="generation 2 is the newest on shard 0"):
        shard.release(2)
    with pytest.raises(ValueError, match="5 dimensions: needed are 8"):
        shard.stage(3, 30, 0, vectors[:, :5])
    serve(shard, 3, vectors)
    fill(shard, 4, vectors)
    shard.prepare(4)
    with pytest.raises(ValueError, match=r"serves generations \[2, 3\]: release the older one before 4"):
        shard.commit(4)
    shard.release(2)
    shard.commit(4)
    for queries, k, message in (
        (vectors[:, :5], 1, "shape"),
        (vectors * np.float32(np.nan), 1, "query 0 is not finite"),
        (vectors, 0, r"retrieval\.k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            shard.search(queries, k)


def test_generation_gone_travels() -> None:
    again = pickle.loads(pickle.dumps(GenerationGone(3, 5)))
    assert (again.generation, again.committed) == (3, 5)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF2,Flat"])
def test_save_and_load(tmp_path: Path, factory: str) -> None:
    vectors, queries = unit_vectors(40, DIM), unit_vectors(5, DIM, seed=1)
    config = IndexConfig(factory=factory, nprobe=1)
    shard = Shard(3, 10, stop=40, config=config)
    serve(shard, 7, vectors)
    path = shard.save(7, tmp_path / "generation-7")
    assert shard.save(7, tmp_path / "generation-7") == path
    fresh = Shard(3, 10, stop=40, config=config)
    assert fresh.load(7, tmp_path / "generation-7") == 70
    assert fresh.load(7, tmp_path / "generation-7") == 70
    assert fresh.status().generations == {7: 70}
    one, same = shard.search(queries, 5), fresh.search(queries, 5)
    assert one.ids.tolist() == same.ids.tolist()
    assert one.scores.tolist() == same.scores.tolist()
    assert (one.generation, one.weights_version) == (same.generation, same.weights_version)
    serve(fresh, 8, vectors)
    for other, generation, message in (
        (Shard(3, 10, stop=40, config=config), 8, "generation 7: needed is 8"),
        (Shard(3, 0, stop=40, config=config), 7, "does not hold the passages 0 to 39"),
        (Shard(3, 10, stop=40, config=IndexConfig(factory="HNSW8")), 7, "needed is 'HNSW8'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load(generation, tmp_path / "generation-7")
    with pytest.raises(TornSnapshot, match="shard-0004"):
        Shard(4, 40, stop=50, config=config).load(7, tmp_path / "generation-7")
    with pytest.raises(GenerationGone):
        shard.save(6, tmp_path / "generation-6")


def test_torn_snapshots_are_refused(tmp_path: Path) -> None:
    shard = Shard(0, 0, stop=40, config=FLAT)
    serve(shard, 1, unit_vectors(40, DIM))
    path = shard.save(1, tmp_path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        step = max(1, len(whole) // 40)
        for position in range(0, len(whole), step):
            for damage in (whole[:position], whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]):
                file.write_bytes(damage)
                with pytest.raises(TornSnapshot, match="shard-0000"):
                    Shard(0, 0, stop=40, config=FLAT).load(1, tmp_path)
        file.write_bytes(whole)
    (path / "index.faiss").write_bytes(b"")  # a snapshot whose sizes are wrong is written anew
    shard.save(1, tmp_path)
    assert Shard(0, 0, stop=40, config=FLAT).load(1, tmp_path) == 10


def test_release_waits_for_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search under way keeps its generation; release has a bound; afterwards the memory is free."""
    shard = Shard(0, 0, stop=10, config=FLAT)
    vectors = unit_vectors(10, DIM)
    serve(shard, 1, vectors)
    inside, go_on = threading.Event(), threading.Event()
    search = Index.search

    def slow(self: Index, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        inside.set()
        assert go_on.wait(10)
        return search(self, *arguments)

    monkeypatch.setattr(Index, "search", slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(shard.search(vectors, 2, generation=1)))
    thread.start()
    assert inside.wait(10)
    serve(shard, 2, vectors)  # nothing that a refresh does waits for the search
    with pytest.raises(TimeoutError, match=r"generation 1 still has 1 users after 0\.05 s"):
        shard.release(1, timeout_s=0.05)
    with pytest.raises(GenerationGone):
        shard.search(vectors, 2, generation=1)
    assert (shard.status().generations, shard.status().in_flight) == ({2: 20}, 1)
    releaser = threading.Thread(target=shard.release, args=(1,))
    releaser.start()
    go_on.set()
    for waiting in (thread, releaser):
        waiting.join(10)
        assert not waiting.is_alive()
    assert answers[0].generation == 1
    assert shard.status().in_flight == 0
    fill(shard, 3, vectors)
    shard.prepare(3)
    shard.commit(3)  # there is room again


def test_searches_and_status_do_not_wait_for_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(0, 0, stop=10, config=FLAT)
    vectors = unit_vectors(10, DIM)
    serve(shard, 1, vectors)
    fill(shard, 2, vectors)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        assert go_on.wait(10)
        raise ValueError("stopped by the test")

    monkeypatch.setattr(WaitingVectors, "build", slow)
    failures = []

    def prepare() -> None:
        with pytest.raises(ValueError, match="stopped by the test") as caught:
            shard.prepare(2)
        failures.append(caught)

    thread = threading.Thread(target=prepare)
    thread.start()
    assert inside.wait(10)
    begin = time.monotonic()
    assert shard.search(vectors, 2).generation == 1
    assert shard.staged_rows(2) == 10
    assert [one.prepared for one in shard.status().staged] == [False]
    assert time.monotonic() - begin < 5
    go_on.set()
    thread.join(10)
    assert failures
    monkeypatch.undo()
    shard.prepare(2)
    shard.commit(2)


def test_concurrent_searches_never_mix_or_miss() -> None:
    """Four threads search two shards while a coordinator stages (some chunks twice), commits and releases.

    The vectors of generation g are the basis shifted by g, so that an answer proves which generation it is from.
    """
    num_rows, num_generations = 12, 40
    shards = [Shard(number, *bounds, FLAT) for number, bounds in enumerate(shard_ranges(num_rows, 2))]
    queries = np.eye(num_rows, dtype=np.float32)

    def vectors(generation: int) -> np.ndarray:
        return np.roll(queries, generation, axis=1)

    def refresh(generation: int) -> None:
        chunks = [(shard, start) for shard in shards for start in range(shard.start, shard.stop, 2)] * 2
        workers = [
            threading.Thread(
                target=lambda part: [
                    shard.stage(generation, 10 * generation, start, vectors(generation)[start : start + 2])
                    for shard, start in part
                ],
                args=(chunks[first::3],),
            )
            for first in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        for call in ("prepare", "commit"):
            for shard in shards:
                getattr(shard, call)(generation)
        if generation > 1:
            for shard in shards:
                shard.release(generation - 1)

    refresh(1)
    stop, problems, answered, seen = threading.Event(), [], [0], set()

    def client() -> None:
        try:
            generation = 1
            while not stop.is_set():
                try:
                    hits = search_all(shards, queries, 1, generation)
                except GenerationGone as gone:
                    generation = gone.committed
                    continue
                answered[0] += 1
                seen.add(hits.generation)
                expected = (np.arange(num_rows) - generation) % num_rows
                if hits.ids[:, 0].tolist() != expected.tolist() or hits.weights_version != 10 * generation:
                    problems.append((generation, hits))
                generation = shards[0].status().committed
        except BaseException as error:
            problems.append(error)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    for generation in range(2, num_generations + 1):
        refresh(generation)
    stop.set()
    for thread in clients:
        thread.join(30)
        assert not thread.is_alive()
    assert not problems
    assert len(seen) > 3
    for shard in shards:
        status = shard.status()
        assert (status.generations, status.in_flight, status.staged) == ({num_generations: 10 * num_generations}, 0, [])
