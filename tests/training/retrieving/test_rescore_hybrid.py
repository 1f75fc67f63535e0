"""Rescoring where words are searched, too, and where a re-ranker chooses: the whole order against brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.hits import Hits
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.rank_fusion import reciprocal_rank_fusion
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld
from tests.training.retrieving.test_rescore import PASSAGES, K, fresh_collator, passages_of, questions_of
from training.loop import Fetched
from training.models.build import build_system
from training.models.model_inputs import RetrievalBatch
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.retrieving.hybrid import Refusion
from training.retrieving.rescore import FreshVectors
from training.stage import Stage
from training.training_settings import RerankerConfig, RetrievalConfig

ALL = PASSAGES // K  # rescore: every passage is a candidate


def stale_stage(world: TinyWorld, folder: Path, retrieval: RetrievalConfig, **changes: Any) -> tuple[Stage, LocalIndex]:
    """A stage with an index of vectors by another encoder than its own, and of words."""
    job = world.job(folder, evaluate_questions="", retrieval=retrieval, **changes)
    other = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=77
    )
    index = world.index(lexical=LexicalConfig())
    index.publish(0, to_numpy(passage_state(other.retriever)))
    stage = Stage(job, index)
    stage.source = stage.make_source(None)
    return stage, index


def next_of(stage: Stage) -> Fetched:
    assert stage.source is not None
    return stage.source.next()


def fresh_scores(stage: Stage, index: LocalIndex, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of fresh vectors, and normalised lexical scores, of all passages: [batch, passages]."""
    fresh = FreshVectors(stage.engine, fresh_collator(stage))
    numbers = np.tile(np.arange(PASSAGES), (len(questions), 1))
    texts = [fresh.collator.stored.text(int(number)) for number in questions]
    assert index.lexical is not None
    words = index.lexical.index.scores(texts, numbers)
    products = fresh.questions(questions) @ fresh.passages(np.arange(PASSAGES)).T
    return products, words / np.maximum(words.max(axis=1, keepdims=True), 1e-9)


def by_score(values: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def lexical_of(fetched: Fetched) -> np.ndarray:
    assert isinstance(fetched.batch, RetrievalBatch)
    assert fetched.batch.lexical is not None
    return fetched.batch.lexical.numpy()


def test_learned_hits_are_the_best_by_fresh_vectors_and_words(world: TinyWorld, tmp_path: Path) -> None:
    """By the weight as it is when the batch is handed out; the step reads the words' scores of what was chosen."""
    config = RetrievalConfig(k=K, rescore=ALL, hybrid="learned", candidates=PASSAGES, lexical_weight=2.0)
    stage, index = stale_stage(world, tmp_path, config)
    next_of(stage)
    with torch.no_grad():
        stage.system.retriever.lexical.raw.add_(1.0)  # pyright: ignore[reportOptionalMemberAccess]
    weight = stage.parts.lexical_weight()
    assert weight > 2.5
    products, words = fresh_scores(stage, index, questions_of(stage, 1))
    fetched = next_of(stage)
    wanted = by_score(products + weight * words, K)
    np.testing.assert_array_equal(passages_of(fetched), wanted)
    assert (wanted != by_score(products, K)).any()
    np.testing.assert_allclose(lexical_of(fetched), np.take_along_axis(words, wanted, axis=1), rtol=1e-5)


def test_fewer_candidates_are_those_that_the_stale_index_fuses(world: TinyWorld, tmp_path: Path) -> None:
    config = RetrievalConfig(k=K, rescore=4, hybrid="learned", candidates=20, lexical_weight=0.5)
    stage, index = stale_stage(world, tmp_path, config)
    questions = questions_of(stage, 0)
    search = stage.parts.hybrid_search(fresh_collator(stage).stored)
    assert search is not None
    queries = FreshVectors(stage.engine, fresh_collator(stage)).questions(questions)
    candidates = search(questions, queries, 4 * K).result().ids
    products, words = fresh_scores(stage, index, questions)
    total = products + stage.parts.lexical_weight() * words
    among = np.full_like(total, -np.inf)
    np.put_along_axis(among, candidates, np.take_along_axis(total, candidates, axis=1), axis=1)
    np.testing.assert_array_equal(passages_of(next_of(stage)), by_score(among, K))


def test_ranks_are_fused_by_the_places_of_fresh_scores(world: TinyWorld, tmp_path: Path) -> None:
    config = RetrievalConfig(k=K, rescore=ALL, hybrid="rrf", candidates=PASSAGES)
    stage, index = stale_stage(world, tmp_path, config)
    products, words = fresh_scores(stage, index, questions_of(stage, 0))
    dense, lexical = by_score(products, PASSAGES), by_score(words, PASSAGES)
    lexical = np.where(np.take_along_axis(words, lexical, axis=1) > 0, lexical, -1)
    wanted = reciprocal_rank_fusion([dense, lexical], config.rrf_constant, K)[1]
    np.testing.assert_array_equal(passages_of(next_of(stage)), wanted)


@pytest.mark.parametrize("hybrid", ["none", "learned"])
def test_a_re_ranker_chooses_among_the_best_of_what_was_scored_again(
    world: TinyWorld, tmp_path: Path, hybrid: str
) -> None:
    config = RetrievalConfig(k=K, rescore=PASSAGES // 10, hybrid=hybrid, candidates=PASSAGES, lexical_weight=2.0)
    reranker = RerankerConfig(mode="add", candidates=10, fresh=world.encoder.fresh)
    stage, index = stale_stage(world, tmp_path, config, reranker=reranker)
    assert stage.system.reranker is not None
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh head says next to nothing
        for parameter in stage.system.reranker.model.classifier.parameters():  # pyright: ignore
            parameter.normal_(std=3000.0, generator=draws)
    questions = questions_of(stage, 0)
    products, words = fresh_scores(stage, index, questions)
    weight = stage.parts.lexical_weight() if hybrid == "learned" else 0.0
    ten = by_score(products + weight * words, 10)
    collator = fresh_collator(stage)
    collator.pairing = stage.parts.text.pairing
    stage.system.eval()
    shares = np.take_along_axis(words, ten, axis=1).astype(np.float32)
    with torch.no_grad():
        scores = stage.system.scores(collator(questions, list(ten), lexical=shares)).numpy()
    wanted = np.take_along_axis(ten, by_score(scores, K), axis=1)
    found = passages_of(next_of(stage))
    np.testing.assert_array_equal(found, wanted)
    assert (found != ten[:, :K]).any()


def test_a_resume_fuses_what_is_remembered_as_the_interrupted_run_would(world: TinyWorld, tmp_path: Path) -> None:
    config = RetrievalConfig(k=K, rescore=4, hybrid="rrf", candidates=20)
    stage, _ = stale_stage(world, tmp_path, config)
    next_of(stage)
    assert stage.source is not None
    state = stage.source.state()
    expected = next_of(stage)
    np.testing.assert_array_equal(passages_of(stage.make_source(state).next()), passages_of(expected))


def test_refusion_by_hand() -> None:
    """Two candidates of the vectors alone, one of the words alone, and an empty column."""
    ids = np.array([[7, 3, 5, -1]])
    shares = np.array([[0.0, 0.5, 1.0, 0.0]], np.float32)
    places = np.array([[[1, 0], [2, 2], [0, 1], [0, 0]]], np.int32)
    hits = Hits(
        ids=ids, scores=np.zeros((1, 4), np.float32), generation=1, weights_version=0, lexical=shares, places=places
    )
    dense = np.array([[1.0, 3.0, 2.0, -np.inf]], np.float32)
    learned = Refusion(RetrievalConfig(hybrid="learned"), lambda: 2.0)(dense, hits)
    np.testing.assert_allclose(learned, [[1.0, 4.0, 4.0, -np.inf]])
    ranked = Refusion(RetrievalConfig(hybrid="rrf", rrf_constant=1.0), lambda: 0.0)(dense, hits)
    np.testing.assert_allclose(ranked, [[1 / 4, 1 / 2 + 1 / 3, 1 / 3 + 1 / 2, -np.inf]])
