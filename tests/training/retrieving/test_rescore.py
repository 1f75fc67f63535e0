"""Candidates of a stale index scored again: exact where all passages are candidates, by the newest weights, also those
that bring their vectors, and on several ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from indexing.dense.exact import search_exactly
from indexing.hits import Hits
from indexing.indexing_settings import WorldConfig
from tests.helpers.distributed import spawn
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld, make_world, tiny_encoder, tiny_generator
from tests.training.retrieving.test_retrieve import ToldService
from training import make_source
from training.data import Collator
from training.engine import engine_setup
from training.engine.engine import Engine
from training.loop import Fetched
from training.models.build import build_system, parameter_groups
from training.models.model_inputs import RetrievalBatch
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.models.text.tokenizers import load_tokenizer
from training.refreshing.drift import Drift, DriftProbe
from training.refreshing.policy import RefreshPlan
from training.retrieving.rescore import FreshVectors, overlap_of
from training.retrieving.retrieve import Prefetcher, Rescored
from training.stage import Stage
from training.training_settings import EngineConfig, EvaluationConfig, ObjectiveConfig, RetrievalConfig, TrainingConfig

PASSAGES, K = 180, 3


def stale_stage(world: TinyWorld, folder: Path, rescore: int, index: LocalIndex | None = None, **changes: Any) -> Stage:
    """A stage whose index was built by another encoder than its own."""
    job = world.job(folder, evaluate_questions="", retrieval=RetrievalConfig(k=K, rescore=rescore), **changes)
    other = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=77
    )
    index = index or world.index()
    index.publish(0, to_numpy(passage_state(other.retriever)))
    return Stage(job, index)


def fresh_collator(stage: Stage) -> Collator:
    questions = Path(stage.job.train_questions)
    return Collator(stage.store, QuestionStore.open(questions), stage.system.generator, stage.parts.text.pad_id)


def brute_force(stage: Stage, questions: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
    """int64 [batch, k]: the best passages by the encoders as they are, one passage at a time; `among` [batch, any]."""
    collator = fresh_collator(stage)
    retriever = stage.system.retriever.eval()
    with torch.no_grad():
        queries = retriever.encode_queries(*collator.question_tensors(questions)).numpy()
        rows = [collator.passages_for_retriever.padded(np.array([row])) for row in range(PASSAGES)]
        passages = [retriever.encode_passages(*map(torch.from_numpy, row)).numpy() for row in rows]
    vectors = np.concatenate(passages)
    if among is None:
        return search_exactly(vectors, queries, k)[1]
    scores = np.full((len(queries), PASSAGES), -np.inf)
    np.put_along_axis(scores, among, np.take_along_axis(queries @ vectors.T, among, axis=1), axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def questions_of(stage: Stage, number: int) -> np.ndarray:
    source: Any = stage.source
    return source.stream.batch(number)


def passages_of(fetched: Fetched) -> np.ndarray:
    assert fetched.passages is not None
    return fetched.passages.reshape(fetched.num_questions, -1)


@pytest.mark.parametrize("batch_tokens", [64, 16384])
def test_with_all_passages_as_candidates_the_hits_are_those_of_brute_force(world, tmp_path, batch_tokens, monkeypatch):
    monkeypatch.setattr(make_source, "FreshVectors", lambda *parts: FreshVectors(*parts, batch_tokens=batch_tokens))
    stage = stale_stage(world, tmp_path, rescore=PASSAGES // K)
    stage.source = stage.make_source(None)
    for number in range(2):
        fetched = stage.source.next()
        wanted = brute_force(stage, questions_of(stage, number), K)
        assert np.array_equal(passages_of(fetched), wanted)
        assert fetched.rescore_overlap is not None
        assert fetched.rescore_overlap < 1  # the index alone would have found others
        assert fetched.rescore_s > 0


def test_with_fewer_the_hits_are_the_best_of_the_candidates(world, tmp_path):
    stage = stale_stage(world, tmp_path, rescore=4)
    stage.source = stage.make_source(None)
    fetched = stage.source.next()
    questions = questions_of(stage, 0)
    vectors = FreshVectors(stage.engine, fresh_collator(stage)).questions(questions)
    assert stage.service is not None
    candidates = stage.service.submit(vectors, 4 * K).result().ids
    assert np.array_equal(passages_of(fetched), brute_force(stage, questions, K, among=candidates))
    overlap = np.mean([len(set(a[:K]) & set(b)) / K for a, b in zip(candidates, passages_of(fetched), strict=True)])
    assert fetched.rescore_overlap == pytest.approx(overlap)


def test_the_weights_are_those_of_the_step_that_trains(world, tmp_path):
    """The second batch was searched before the weights changed, and is scored after."""
    stage = stale_stage(world, tmp_path, rescore=PASSAGES // K)
    stage.source = stage.make_source(None)
    stage.source.next()
    before = brute_force(stage, questions_of(stage, 1), K)
    with torch.no_grad():
        for weight in stage.system.retriever.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    wanted = brute_force(stage, questions_of(stage, 1), K)
    assert not np.array_equal(before, wanted)
    assert np.array_equal(passages_of(stage.source.next()), wanted)


def test_a_batch_is_scored_again_after_the_next_search_is_under_way():
    service = ToldService()

    def rescore(questions: np.ndarray, hits: Hits) -> Rescored:
        service.log.append(f"rescore {questions[0]}")
        return Rescored(hits, 1.0, 0.5)

    def encode(questions: np.ndarray) -> np.ndarray:
        return questions[:, None].astype(np.float32)

    prefetcher = Prefetcher(
        service, lambda number: np.array([number]), encode_questions=encode, k=2, depth=1, rescore=rescore
    )
    assert [prefetcher.next().rescore_s for _ in range(2)] == [0.5, 0.5]
    assert service.log == ["submit 0", "result 0", "submit 1", "rescore 0", "result 1", "submit 2", "rescore 1"]


@pytest.mark.parametrize("keeps_vectors", [True, False])
def test_a_fixed_passage_encoder_is_called_only_where_hits_bring_no_vectors(world, tmp_path, keeps_vectors):
    encoder = replace(world.encoder, towers="separate")
    index = LocalIndex(world.store(), encoder, len(world.tokenizer), keeps_vectors=keeps_vectors)
    changes = {"encoder": encoder, "training": TrainingConfig(train="query_only", steps=2, batch_size=4)}
    stage = stale_stage(world, tmp_path, PASSAGES // K, index, **changes)
    stage.serve_index(fresh=True)
    stage.source = stage.make_source(None)
    stage.source.next()
    calls: list[str] = []
    with torch.no_grad():
        for weight in stage.system.retriever.query_encoder.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    forward = stage.system.forward
    stage.system.forward = lambda method, *rest, **options: (
        calls.append(method.__name__) or forward(method, *rest, **options)
    )
    fetched = stage.source.next()
    assert ("encode_passages" in calls) == (not keeps_vectors)
    wanted = brute_force(stage, questions_of(stage, 1), K)
    assert np.array_equal(passages_of(fetched), wanted)
    assert isinstance(fetched.batch, RetrievalBatch)
    if not keeps_vectors:
        return
    assert fetched.batch.passage_vectors is not None  # those of the best k, which the passage encoder would make
    rows = fresh_collator(stage).passages_for_retriever.padded(wanted[0])
    with torch.no_grad():
        made = stage.system.retriever.encode_passages(*map(torch.from_numpy, rows))
    torch.testing.assert_close(fetched.batch.passage_vectors[0], made, atol=1e-5, rtol=1e-4)


def test_a_resume_scores_the_remembered_candidates_with_the_weights_of_the_resume(world, tmp_path):
    stage = stale_stage(world, tmp_path, rescore=4)
    stage.source = stage.make_source(None)
    stage.source.next()
    state = stage.source.state()
    assert state["ahead"][0][0].shape == (4, 4 * K)  # the candidates, not the best of them
    expected = stage.source.next()
    again = stage.make_source(state)
    assert np.array_equal(passages_of(again.next()), passages_of(expected))


def test_shares_of_ids():
    first = np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1]])
    second = np.array([[3, 1, 9], [5, 6, -1], [-1, -1, -1]])
    assert overlap_of(first, second).tolist() == pytest.approx([2 / 3, 1 / 2, 0])


# ---------------------------------------------------------------- several ranks

STAGES = (0, 3)


def measure(rank: int, world_size: int, folder: Path, world: TinyWorld) -> dict[int, tuple[np.ndarray, Drift]]:
    """Vectors of unequal numbers of passages, and the drift of a stale index, under ZeRO 0 and 3."""
    engine_setup.PERSISTENT_ELEMENTS = 0
    words = load_tokenizer(folder / "tokenizers" / "retriever")
    world = replace(world, tokenizer=words)
    found = {}
    for stage in STAGES:
        system = build_system(world.encoder, world.generator, train="both", tokenizers=(words, words), seed=1)
        engine = Engine(system, EngineConfig(zero_stage=stage, timeout_s=60.0), parameter_groups(system))
        collator = Collator(Store.open(world.passages), world.question_store("train"), system.generator, 0)
        fresh = FreshVectors(engine, collator, batch_tokens=64)
        mine = np.arange(3) if rank == 0 else np.arange(40, 60)  # 2 forwards and 10, or so
        index = world.index()
        other = build_system(world.encoder, world.generator, train="both", tokenizers=(words, words), seed=2)
        index.publish(0, to_numpy(passage_state(other.retriever)))
        probe = DriftProbe(fresh, index, numbers=np.arange(5), k=K, depth=4 * K)
        probe.measure()
        probe.remember()
        found[stage] = fresh.passages(mine), probe.measure()
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ranks_with_unequal_numbers_of_passages_have_the_vectors_and_the_drift_of_one_process(world):
    plain = replace(world, tokenizer=None)  # tokenisers are read again by each process
    one = spawn(measure, 1, world.folder, plain, timeout_s=250.0)[0]
    two = spawn(measure, 2, world.folder, plain, timeout_s=250.0)
    for stage in STAGES:
        np.testing.assert_allclose(two[0][stage][0], one[0][0], atol=1e-5)
        assert two[0][stage][1] == two[1][stage][1]
        for name, value in vars(one[0][1]).items():
            assert getattr(two[0][stage][1], name) == pytest.approx(value, abs=1e-5), name
    assert two[1][3][0].shape == (20, two[0][3][0].shape[1])
    assert one[0][1].overlap < 1


# ---------------------------------------------------------------- what it is for


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_finds_more_of_the_passages_in_an_index_that_is_never_refreshed(tmp_path):
    """Both towers train, the index stays that of step 0. The last steps' share of questions with a labelled passage."""
    encoder, generator = tiny_encoder(hidden=64, vocabulary=1500), tiny_generator(hidden=64)
    world = make_world(tmp_path / "world", WorldConfig(num_people=60), encoder, generator)
    warm = world.job(
        tmp_path / "warm",
        objective=ObjectiveConfig(name="inverse_cloze"),
        training=TrainingConfig(train="retriever_only", steps=40, batch_size=96, lr_retriever=2e-3, warmup_steps=10),
    )
    Stage(warm, world.index()).run()
    found: dict[int, float] = {}
    for factor in (0, 20):
        job = world.job(
            tmp_path / f"rescore-{factor}",
            init_from=str(tmp_path / "warm" / "checkpoints" / "step-40"),
            evaluate_questions="",
            training=TrainingConfig(steps=150, batch_size=16, lr_retriever=3e-3, lr_generator=2e-3),
            retrieval=RetrievalConfig(k=4, rescore=factor),
            evaluation=EvaluationConfig(),
            refresh=RefreshPlan(every_steps=1000),
        )
        index = world.index(max_generations=1)
        Stage(job, index).run()
        assert index.generations_committed == 1
        rows = [row for row in read(tmp_path / f"rescore-{factor}") if "retrieval/gold_in_k" in row]
        found[factor] = float(np.mean([row["retrieval/gold_in_k"] for row in rows[-30:]]))
        assert ("retrieval/rescore_overlap" in rows[-1]) == (factor > 0)
    assert found[20] >= found[0] + 0.2, found


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
