"""Searching ahead: the same hits, in the right order, and across an interruption."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from indexing.hits import Hits, Indexed
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld
from training.data import Collator, Stream
from training.feeding.batches import ClosedBookBatches, RetrievedBatches
from training.models.build import build_system
from training.models.model_inputs import RetrievalBatch
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.retrieving.retrieve import IndexStatus, Prefetcher
from training.training_settings import RetrievalConfig

K = 5


@dataclass
class Parts:
    """Models and data, with an index of their passages."""

    index: LocalIndex
    stream: Stream
    collator: Collator
    encode: Callable[[np.ndarray], np.ndarray]

    def prefetcher(self, depth: int, start: int = 0, k: int = K) -> Prefetcher:
        return Prefetcher(self.index, self.stream.batch, encode_questions=self.encode, k=k, depth=depth, start=start)

    def source(self, depth: int, start: int = 0, source: str = "index") -> RetrievedBatches:
        config = RetrievalConfig(source=source, k=3)
        prefetcher = self.prefetcher(depth, start, 4)
        return RetrievedBatches(
            prefetcher, self.collator, config=config, device=torch.device("cpu"), stream=self.stream
        )


def make_parts(world: TinyWorld, **options) -> Parts:
    system = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=1
    ).eval()
    collator = Collator(world.store(), world.question_store("train"), system.generator, 0)
    index = world.index(**options)
    index.publish(0, to_numpy(passage_state(system.retriever)))

    def encode(numbers: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return system.retriever.encode_queries(*collator.question_tensors(numbers)).numpy()

    return Parts(index, Stream(len(collator.stored), 4, seed=1), collator, encode)


def same(first: Hits, second: Hits) -> bool:
    return np.array_equal(first.ids, second.ids) and np.array_equal(first.scores, second.scores)


def test_searching_ahead_changes_no_hit_while_encoders_stand_still(world):
    parts = make_parts(world)
    found = {depth: [parts.prefetcher(depth)] for depth in (0, 1, 2)}
    batches = {depth: [one.next() for _ in range(6)] for depth, (one,) in found.items()}
    for depth in (1, 2):
        for now, ahead in zip(batches[0], batches[depth], strict=True):
            assert now.number == ahead.number
            assert np.array_equal(now.questions, ahead.questions)
            assert same(now.hits, ahead.hits)
    assert [batch.number for batch in batches[2]] == list(range(6))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_hits_are_the_best_inner_products_whatever_the_shards(world, num_shards):
    parts = make_parts(world, num_shards=num_shards)
    table = world.store().tokens("retriever")
    vectors = np.concatenate([parts.index._encode(*table.padded(np.array([row]))) for row in range(180)])
    searched = parts.prefetcher(1).next()
    scores = parts.encode(searched.questions) @ vectors.T
    best = np.sort(scores, axis=1)[:, ::-1][:, :K]
    np.testing.assert_allclose(searched.hits.scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, searched.hits.ids, 1), best, atol=1e-5)


def test_a_refresh_with_unchanged_weights_gives_identical_hits(world):
    parts = make_parts(world)
    before = parts.prefetcher(0).next().hits
    system = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=1
    )
    parts.index.publish(9, to_numpy(passage_state(system.retriever)))
    after = parts.prefetcher(0).next().hits
    assert (before.generation, after.generation) == (0, 1)
    assert (before.weights_version, after.weights_version) == (0, 9)
    assert same(before, after)


# ---------------------------------------------------------------- order


@dataclass
class ToldService:
    """Writes down what is asked of it, and when an answer is taken."""

    log: list[str] = field(default_factory=list)
    num_passages: int = 10
    lexical: None = None

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> "ToldHits":
        self.log.append(f"submit {int(queries[0, 0])}")
        return ToldHits(self, int(queries[0, 0]))

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        raise AssertionError("the prefetcher looks no passage up")

    def publish(self, weights_version: int, weights: dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
        raise AssertionError("the prefetcher publishes nothing")

    def wait_for_version(
        self,
        weights_version: int,
        timeout_s: float,
        report: Callable[[int, str], None] = lambda encoded, doing: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        raise AssertionError("the prefetcher waits for no version")

    def keep_newest(self) -> int:
        raise AssertionError("the prefetcher saves nothing")

    def save_generation(self, generation: int, timeout_s: float) -> str:
        raise AssertionError("the prefetcher saves nothing")

    def status(self) -> IndexStatus:
        return IndexStatus(
            generation=0,
            weights_version=0,
            generations_committed=1,
            refresh_seconds=0.0,
            refresh_passages_per_s=0.0,
            failures=0,
        )


@dataclass
class ToldHits:
    service: ToldService
    number: int

    def result(self) -> Hits:
        self.service.log.append(f"result {self.number}")
        return Hits(
            ids=np.full((1, 2), self.number), scores=np.zeros((1, 2), np.float32), generation=0, weights_version=0
        )


def run_told(depth: int, steps: int) -> list[str]:
    service = ToldService()
    prefetcher = Prefetcher(
        service,
        lambda number: np.array([number]),
        encode_questions=lambda questions: questions[:, None].astype(np.float32),
        k=2,
        depth=depth,
    )
    for _ in range(steps):
        service.log.append(f"train {prefetcher.next().number}")
    return service.log


def test_the_next_search_is_under_way_while_this_batch_trains():
    assert run_told(0, 2) == ["submit 0", "result 0", "train 0", "submit 1", "result 1", "train 1"]
    assert run_told(1, 3) == [
        *("submit 0", "result 0", "submit 1", "train 0"),
        *("result 1", "submit 2", "train 1"),
        *("result 2", "submit 3", "train 2"),
    ]
    two = run_told(2, 5)
    for number in range(4):
        assert two.index(f"submit {number + 2}") < two.index(f"train {number}") < two.index(f"result {number + 1}")


def test_a_slow_search_is_waited_for_only_as_long_as_it_lasts(world):
    parts = make_parts(world, delay_s=0.2)
    prefetcher = parts.prefetcher(1)
    first = prefetcher.next()
    assert first.wait_s > 0.15
    time.sleep(0.25)  # training goes on meanwhile
    assert prefetcher.next().wait_s < 0.1


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_restored_source_goes_on_with_the_same_batches(world, depth):
    parts = make_parts(world)
    source = parts.source(depth)
    for _ in range(3):
        source.next()
    state = source.state()
    assert state["number"] == 3
    assert len(state["ahead"]) == depth
    expected = [source.next() for _ in range(4)]
    resumed = parts.source(depth, state["number"])
    resumed.restore(state)
    assert resumed.state()["number"] == 3
    for wanted in expected:
        found = resumed.next()
        assert torch.equal(found.batch.passage_ids, wanted.batch.passage_ids)
        assert (found.generation, found.weights_version) == (wanted.generation, wanted.weights_version)


def test_restored_hits_are_those_of_the_old_index(world):
    parts = make_parts(world)
    source = parts.source(2)
    source.next()
    state = source.state()
    other = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=2
    )
    parts.index.publish(50, to_numpy(passage_state(other.retriever)))
    resumed = parts.source(2, state["number"])
    resumed.restore(state)
    versions = [resumed.next().weights_version for _ in range(4)]
    assert versions == [0, 0, 50, 50]


# ---------------------------------------------------------------- batches


def test_batches_say_what_was_found(world):
    parts = make_parts(world)
    fetched = parts.source(1).next()
    searched = parts.prefetcher(1, k=4).next()
    gold = [parts.collator.questions.gold_rows(int(number)) for number in searched.questions]
    found = [bool(set(row[:3]) & set(rows)) for row, rows in zip(searched.hits.ids, gold, strict=True)]
    assert fetched.gold_in_k == pytest.approx(np.mean(found))
    assert (fetched.num_questions, fetched.generation, fetched.weights_version) == (4, 0, 0)


def test_labelled_passages_are_put_among_the_hits(world):
    parts = make_parts(world)
    for fetched in [parts.source(1, source="gold").next() for _ in range(3)]:
        assert fetched.gold_in_k == 1.0
        assert fetched.batch.passage_ids.shape[0] == 12


def test_closed_book_batches_follow_the_stream(world):
    parts = make_parts(world)
    source = ClosedBookBatches(collator=parts.collator, batch_of=parts.stream.batch, device=torch.device("cpu"))
    source.next()
    again = replace(source, number=source.state()["number"])
    wanted, found = source.next(), again.next()
    assert isinstance(wanted.batch, RetrievalBatch)
    assert isinstance(found.batch, RetrievalBatch)
    assert torch.equal(wanted.batch.question_ids, found.batch.question_ids)
    assert found.generation is None


@dataclass
class Numbered:
    """An index that answers each query with all passages that are living, by number; it counts its searches."""

    deleted: set[int] = field(default_factory=set)
    searches: int = 0
    num_passages: int = 8

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> "Known":
        self.searches += 1
        ids = np.array([number for number in range(8) if number not in self.deleted][:k])
        ids = np.tile(ids, (len(queries), 1))
        vectors = np.repeat(ids[:, :, None], 2, axis=2).astype(np.float32) if num_vectors else None
        return Known(
            Hits(
                ids=ids,
                scores=-ids.astype(np.float32),
                generation=1,
                weights_version=1,
                vectors=vectors,
                versions=ids + 10,
            )
        )

    def is_living(self, numbers: np.ndarray) -> np.ndarray:
        return ~np.isin(numbers, list(self.deleted))


@dataclass
class Known:
    hits: Hits

    def result(self) -> Hits:
        return self.hits


def live_prefetcher(index: Numbered, encoded: list[int]) -> Prefetcher:
    def encode(numbers: np.ndarray) -> np.ndarray:
        encoded.append(int(numbers[0]))
        return np.zeros((len(numbers), 2), np.float32)

    def batch_of(number: int) -> np.ndarray:
        return np.array([number, number])

    return Prefetcher(
        index,  # pyright: ignore
        batch_of,
        encode_questions=encode,
        k=3,
        depth=2,
        with_vectors=True,
        is_living=index.is_living,
    )


def test_hits_that_were_deleted_since_are_searched_again_without_another_encoding() -> None:
    index, encoded = Numbered(), list[int]()
    prefetcher = live_prefetcher(index, encoded)
    assert prefetcher.next().hits.ids.tolist() == [[0, 1, 2]] * 2
    index.deleted = {1}
    before = index.searches
    assert prefetcher.next().hits.ids.tolist() == [[0, 2, 3]] * 2
    assert index.searches == before + 2  # again, and one more ahead
    assert encoded == [0, 1, 2, 3]


def test_deleted_passages_are_left_out_of_what_a_checkpoint_remembers() -> None:
    index = Numbered()
    prefetcher = live_prefetcher(index, [])
    prefetcher.next()
    state = prefetcher.state()
    index.deleted = {0}
    resumed = live_prefetcher(index, [])
    resumed.restore(state)
    hits = resumed.next().hits
    assert hits.ids.tolist() == [[1, 2, -1]] * 2
    assert hits.scores.tolist() == [[-1, -2, -np.inf]] * 2
    assert hits.vectors is not None
    assert hits.vectors[:, :2, 0].tolist() == [[1, 2]] * 2
    assert hits.versions is not None
    assert hits.versions[:, :2].tolist() == [[11, 12]] * 2
    resumed.next()
    assert resumed.next().hits.ids.tolist() == [[1, 2, 3]] * 2


def test_k_follows_a_corpus_that_becomes_smaller() -> None:
    index = Numbered()
    prefetcher = live_prefetcher(index, [])
    index.deleted, index.num_passages = {0, 1, 2, 3, 4, 5}, 2
    assert prefetcher.next().hits.ids.tolist() == [[6, 7]] * 2
