"""Vectors and words: what a hybrid search returns, what its weight learns, and that a stage measures what it trains."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from indexing.hits import CorpusState, Indexed
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.lexical import build_lexical, texts_of
from indexing.lexical.rank_fusion import reciprocal_rank_fusion
from indexing.shard.serving import GenerationGone
from tests.helpers.local_index import LocalHits, LocalIndex, LocalWordHits, LocalWords
from tests.helpers.tiny_world import TinyWorld, with_changes
from tests.training.test_stage import FailingIndex, Failure, final_weights, rows_by_step, run_stage, same
from training.data import Collator
from training.models.build import LEXICAL_WEIGHT, build_system, fit_weights, parameter_groups
from training.models.retriever.encoder import LexicalWeight
from training.models.system import System
from training.objectives.dispatch import compute, needs
from training.refreshing.policy import RefreshPlan
from training.retrieving import hybrid
from training.retrieving.hybrid import HybridSearch
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    EvaluationConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

WORDS = LexicalConfig()
NUMBERS = np.arange(8)


def retrieval(hybrid: str, **changes: Any) -> RetrievalConfig:
    return replace(RetrievalConfig(k=4, hybrid=hybrid, candidates=12), **changes)


def make(world: TinyWorld, config: RetrievalConfig, train: str = "both") -> System:
    tokenizers = (world.tokenizer, world.tokenizer)
    return build_system(
        world.encoder,
        world.generator,
        train=train,
        tokenizers=tokenizers,
        seed=3,
        objective=ObjectiveConfig(),
        retrieval=config,
    ).eval()


@pytest.fixture
def index(world: TinyWorld) -> LocalIndex:
    """The index of the weights of `make`, with words."""
    return serve(world, world.index(lexical=WORDS))


def serve(world: TinyWorld, index: LocalIndex) -> LocalIndex:
    """`index` with the passage encoder of `make`."""
    tower = make(world, retrieval("none")).retriever.passage_encoder
    index.publish(0, {name: tensor.numpy() for name, tensor in tower.state_dict().items()})
    return index


def search_of(index: LocalIndex, world: TinyWorld, config: RetrievalConfig, weight: float = 0.0) -> HybridSearch:
    assert index.lexical is not None
    return HybridSearch(
        index, index.lexical, text_of=world.question_store("test").text, config=config, weight=lambda: weight
    )


def queries_of(world: TinyWorld) -> np.ndarray:
    system = make(world, retrieval("none"))
    collator = Collator(world.store(), world.question_store("test"), system.generator, 0)
    with torch.no_grad():
        return system.retriever.encode_queries(*collator.question_tensors(NUMBERS)).numpy()


def everything(index: LocalIndex, world: TinyWorld, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products and normalised lexical scores of all passages, [batch, passages]."""
    assert index.lexical is not None
    number = np.tile(np.arange(index.num_passages), (len(queries), 1))
    vectors = index.indexed(number[0], index.generation).vectors
    assert vectors is not None
    texts = [world.question_store("test").text(int(n)) for n in NUMBERS]
    words = index.lexical.index.scores(texts, number)
    return queries @ vectors.T, words / np.maximum(words.max(axis=1, keepdims=True), 1e-9)


# ---------------------------------------------------------------- what a search returns


def test_rrf_is_the_fusion_of_both_rankings(world: TinyWorld, index: LocalIndex) -> None:
    queries = queries_of(world)
    hits = search_of(index, world, retrieval("rrf"))(NUMBERS, queries, 5).result()
    products, words = everything(index, world, queries)
    dense = np.argsort(-products, axis=1, kind="stable")[:, :12]
    lexical = np.argsort(-words, axis=1, kind="stable")[:, :12]
    lexical = np.where(np.take_along_axis(words, lexical, axis=1) > 0, lexical, -1)
    scores, ids = reciprocal_rank_fusion([dense, lexical], 60, 5)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-6)
    assert hits.vectors is None
    assert hits.places is not None
    for row in range(len(NUMBERS)):
        for column, passage in enumerate(ids[row]):
            place = hits.places[row, column, 0]
            assert (dense[row, place - 1] == passage) if place else (passage not in dense[row])


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("candidates", [12, 180])
def test_learned_hits_are_brute_force_over_the_candidates(
    world: TinyWorld, index: LocalIndex, weight: float, candidates: int
) -> None:
    """Every candidate of either index has both of its scores; with all passages as candidates nothing is missed."""
    queries = queries_of(world)
    config = retrieval("learned", candidates=candidates)
    hits = search_of(index, world, config, weight)(NUMBERS, queries, 5, num_vectors=5).result()
    products, words = everything(index, world, queries)
    total = products + weight * words
    for row in range(len(NUMBERS)):
        dense = np.argsort(-products[row], kind="stable")[:candidates]
        lexical = np.argsort(-words[row], kind="stable")[:candidates]
        among = np.union1d(dense, lexical[words[row, lexical] > 0])
        best = among[np.argsort(-total[row, among], kind="stable")][:5]
        np.testing.assert_allclose(hits.scores[row], total[row, best], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(hits.ids[row], best)
        assert hits.lexical is not None
        np.testing.assert_allclose(hits.lexical[row], words[row, best], rtol=1e-5)
    assert hits.vectors is not None
    np.testing.assert_array_equal(hits.vectors, index.indexed(hits.ids, index.generation).vectors)


def test_without_vectors_a_lexical_hit_counts_as_the_last_dense_one(world: TinyWorld) -> None:
    index = LocalIndex(world.store(), world.encoder, len(world.tokenizer), keeps_vectors=False, lexical=WORDS)
    serve(world, index)
    queries = queries_of(world)
    hits = search_of(index, world, retrieval("learned"), 5.0)(NUMBERS, queries, 5, num_vectors=5).result()
    assert hits.vectors is None
    dense = index.submit(queries, 12).result()
    assert hits.places is not None
    assert hits.lexical is not None
    alone = (hits.places[:, :, 0] == 0) & (hits.places[:, :, 1] > 0)
    assert alone.any()
    expected = np.broadcast_to(dense.scores[:, -1:], hits.ids.shape) + 5 * hits.lexical
    np.testing.assert_allclose(hits.scores[alone], expected[alone], rtol=1e-5)


OLD, NOW = CorpusState(3, 3), CorpusState(4, 5)


class Changed(LocalIndex):
    """An index of a corpus that has changed."""

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> LocalHits:
        found = super().submit(queries, k, num_vectors)
        return replace(found, hits=replace(found.hits, corpus=NOW))


class OtherCorpus(LocalWords):
    """Answers for an older state of the corpus until it is asked for one by name."""

    answers: CorpusState
    asked: list[CorpusState | None]

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> LocalWordHits:
        self.asked = [*getattr(self, "asked", []), wanted]
        found = super().submit(texts, n, None, of).hits
        if wanted:
            return LocalWordHits(replace(found, corpus=wanted))
        return LocalWordHits(replace(found, ids=np.zeros_like(found.ids), corpus=self.answers))


@pytest.mark.parametrize("answers", [OLD, CorpusState(4, 4), CorpusState(5, 5)], ids=["older", "not hidden", "newer"])
def test_hits_of_two_states_of_the_corpus_are_never_put_together(world: TinyWorld, answers: CorpusState) -> None:
    index = Changed(world.store(), world.encoder, len(world.tokenizer), lexical=WORDS)
    serve(world, index)
    queries = queries_of(world)
    words = OtherCorpus(world.store(), WORDS)
    words.answers = answers
    search = HybridSearch(index, words, text_of=world.question_store("test").text, config=retrieval("rrf"))
    found = search(NUMBERS, queries, 5).result()
    assert words.asked == [None, NOW]
    assert found.corpus == NOW
    expected = search_of(index, world, retrieval("rrf"))
    expected.lexical = LateWords(world.store(), WORDS)
    np.testing.assert_array_equal(found.ids, expected(NUMBERS, queries, 5).result().ids)


class LateWords(LocalWords):
    """Answers for the state that the dense hits have, with deletions that came later."""

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> LocalWordHits:
        return LocalWordHits(replace(super().submit(texts, n, None, of).hits, corpus=CorpusState(4, 6)))


@pytest.mark.parametrize("hybrid", ["rrf", "learned"])
def test_what_was_deleted_before_both_have_answered_is_in_neither(world: TinyWorld, index: LocalIndex, hybrid) -> None:
    """As if the passages had never been there, but for the dense candidates, of which there are fewer."""
    queries, config = queries_of(world), retrieval(hybrid, candidates=180)
    search = search_of(index, world, config, 1.0)
    before = search(NUMBERS, queries, 5).result()
    gone = np.unique(before.ids[:, ::2])
    search.is_living = lambda numbers: ~np.isin(numbers, gone)
    found = search(NUMBERS, queries, 5).result()
    assert not np.isin(found.ids, gone).any()
    products, words = everything(index, world, queries)
    products[:, gone], words[:, gone] = -np.inf, 0
    words = words / words.max(axis=1, keepdims=True)
    for row in range(len(NUMBERS)):
        if hybrid == "learned":
            best = np.argsort(-(products[row] + words[row]), kind="stable")[:5]
        else:
            some = np.argsort(-words[row], kind="stable")
            some = np.where(words[row][some] > 0, some, -1)
            dense = np.argsort(-products[row], kind="stable")[: len(words[row]) - len(gone)]
            best = reciprocal_rank_fusion([dense[None], some[None]], 60, 5)[1][0]
        np.testing.assert_array_equal(found.ids[row], best)


def test_too_few_living_passages_are_searched_again(world: TinyWorld, index: LocalIndex, monkeypatch) -> None:
    """Until every shard knows what was deleted; with a bound."""
    monkeypatch.setattr(hybrid, "FIRST_PAUSE_S", 0.0)
    search = search_of(index, world, retrieval("rrf", candidates=5))
    calls: list[int] = []

    def is_living(numbers: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.full(numbers.shape, len(calls) > 5)

    search.is_living = is_living
    assert (search(NUMBERS, queries_of(world), 5).result().ids >= 0).all()
    search.is_living = lambda numbers: np.zeros(numbers.shape, bool)
    with pytest.raises(TimeoutError, match="lost passages 10 times"):
        search(NUMBERS, queries_of(world), 5).result()


def test_hits_tell_by_which_weights_each_was_encoded(world: TinyWorld) -> None:
    """Those that only the words have found, too, in a generation of mixed weights."""
    index = serve(world, world.index(lexical=WORDS))
    again = np.arange(0, index.num_passages, 3)
    tower = make(world, retrieval("none")).retriever.passage_encoder
    index.publish(7, {name: tensor.numpy() for name, tensor in tower.state_dict().items()}, again)
    hits = search_of(index, world, retrieval("learned"), 5.0)(NUMBERS, queries_of(world), 12).result()
    assert hits.places is not None
    assert (hits.places[:, :, 0] == 0).any()
    np.testing.assert_array_equal(hits.versions, np.where(np.isin(hits.ids, again), 7, 0))


@pytest.mark.parametrize("hybrid", ["rrf", "learned"])
def test_a_search_that_is_made_again_asks_nobody_for_the_weight(world: TinyWorld, index: LocalIndex, hybrid) -> None:
    """The weight is a collective under ZeRO 3, and the other trainers have no reason for it."""
    asked: list[int] = []
    search = search_of(index, world, retrieval(hybrid))
    search.weight = lambda: asked.append(1) or 0.7
    queries = queries_of(world)
    first = search(NUMBERS, queries, 5).result()
    second = search(NUMBERS, queries, 5, again=True).result()
    assert len(asked) == (hybrid == "learned")
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.scores, second.scores)


class GoneOnce(LocalIndex):
    """Replaces its generation between a search and the question for vectors."""

    gone = 1
    searched = 0

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> LocalHits:
        self.searched += 1
        return super().submit(queries, k, num_vectors)

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        self.gone -= 1
        if self.gone >= 0:
            raise GenerationGone(generation, generation + 1)
        return super().indexed(ids, generation, with_vectors)


@pytest.mark.parametrize("times", [1, 100])
def test_a_generation_that_goes_is_searched_anew_and_not_for_ever(world: TinyWorld, times: int) -> None:
    index = GoneOnce(world.store(), world.encoder, len(world.tokenizer), lexical=WORDS)
    serve(world, index)
    index.gone = times
    pending = search_of(index, world, retrieval("learned"), 1.0)(NUMBERS, queries_of(world), 5)
    if times == 1:
        assert pending.result().ids.shape == (8, 5)
        assert index.searched == 2
    else:
        with pytest.raises(TimeoutError, match="replaced its generation 10 times"):
            pending.result()


# ---------------------------------------------------------------- the weight


def test_the_gradient_of_the_weight_is_that_of_finite_differences(world: TinyWorld) -> None:
    """Under rag_sequence, by autograd, by differences, and by the formula of the mixture."""
    torch.manual_seed(0)
    system = make(world, retrieval("learned", lexical_weight=0.4)).double()
    weight = system.retriever.lexical
    assert weight is not None
    assert weight(torch.ones(1)).item() == pytest.approx(0.4, rel=1e-5)
    assert any(weight.raw is one for one in parameter_groups(system)["retriever"])
    collator = Collator(world.store(), world.question_store("test"), system.generator, 0)
    passages = [np.random.default_rng(n).choice(180, 4, replace=False) for n in NUMBERS]
    lexical = np.random.default_rng(9).random((8, 4)).astype(np.float32)
    batch = collator(NUMBERS, passages, lexical=lexical)
    objective = ObjectiveConfig()

    def loss() -> torch.Tensor:
        return compute(objective, system.likelihoods(batch, needs(objective), 1.0))[0]

    loss().backward()
    assert weight.raw.grad is not None
    gradient, start = float(weight.raw.grad), weight.raw.detach().clone()
    values = []
    for step in (1e-3, -1e-3):
        weight.raw.data = start + step
        values.append(loss().item())
    weight.raw.data = start
    assert gradient == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)
    outputs = system.likelihoods(batch, needs(objective), 1.0)
    assert outputs.per_passage is not None
    prior = torch.log_softmax(outputs.scores, dim=1)
    posterior = torch.softmax(prior + outputs.per_passage.sum(dim=2), dim=1)
    slope = 10 * torch.sigmoid(10 * start) / system.retriever.temperature  # of softplus(10 raw), over the temperature
    expected = -((posterior - prior.exp()) * torch.from_numpy(lexical)).sum(dim=1).mean() * slope
    assert gradient == pytest.approx(expected.item(), rel=1e-3)


class ShuffledWords(LocalWords):
    """BM25 over the texts of other passages: real scores that say nothing."""

    def __init__(self, world: TinyWorld) -> None:
        store = world.store()
        order = np.random.default_rng(5).permutation(len(store))
        self.index = build_lexical(WORDS, store.fingerprint, texts_of(store, [int(row) for row in order]))


@pytest.mark.parametrize("informative", [True, False])
def test_training_trusts_words_that_tell_and_not_words_that_do_not(
    world: TinyWorld, tmp_path: Path, informative: bool
) -> None:
    config = retrieval("learned", lexical_weight=0.3, k=12, candidates=20)
    training = TrainingConfig(steps=40, batch_size=8, warmup_steps=2, lr_retriever=5e-3, lr_generator=5e-3)
    job = world.job(
        tmp_path / "run",
        retrieval=config,
        training=training,
        evaluate_questions="",
        refresh=RefreshPlan(every_steps=10),
    )
    index = world.index(lexical=WORDS)
    if not informative:
        index.lexical = ShuffledWords(world)
    run_stage(job, index)
    logged = [row["retrieval/lexical_weight"] for _, row in sorted(numbers_by_step(job.run_dir).items())]
    assert len(logged) == 40
    assert (logged[-1] > 0.5) if informative else (logged[-1] < 0.25)


def numbers_by_step(run_dir: str) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl with a lexical weight."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {int(row["step"]): row for row in rows if "retrieval/lexical_weight" in row}


# ---------------------------------------------------------------- a stage


@pytest.mark.parametrize("hybrid", ["rrf", "learned"])
@pytest.mark.parametrize("train", ["none", "generator_only"])
def test_a_stage_measures_the_hits_that_it_trains_on(world: TinyWorld, tmp_path: Path, hybrid: str, train: str) -> None:
    """Frozen passage encoder: hits bring their vectors, and evaluation ranks as the search itself does."""
    config = retrieval(hybrid, lexical_weight=0.7)
    training = TrainingConfig(train=train, steps=2 if train != "none" else 0, batch_size=4, warmup_steps=0)
    job = world.job(tmp_path / "run", retrieval=config, training=training, evaluation=EvaluationConfig(k=20))
    stage = Stage(job, world.index(lexical=WORDS))
    result = stage.run()
    assert isinstance(stage.service, LocalIndex)
    queries = queries_of(world)
    search = search_of(stage.service, world, config, 0.7)
    expected, deeper = (search(NUMBERS, queries, k).result() for k in (4, 60))
    np.testing.assert_array_equal(expected.ids, deeper.ids[:, :4])  # however deep a ranking is measured
    assert all(len(set(row)) == 60 for row in deeper.ids.tolist())
    assert stage.measures.evaluator is not None
    rows = stage.measures.evaluator(NUMBERS).rows
    np.testing.assert_array_equal([row["hits"] for row in rows], expected.ids)
    assert 0 <= result["metrics"]["recall@1"] <= 1
    assert stage.parts.has_lexical_weight == (hybrid == "learned")


def test_words_raise_recall_where_the_encoder_knows_nothing(world: TinyWorld, tmp_path: Path) -> None:
    """Random vectors; names stand in questions and passages alike."""
    found = {}
    for mode in ("none", "rrf", "learned"):
        config = retrieval(mode, lexical_weight=2.0)
        job = world.job(tmp_path / mode, retrieval=config, training=TrainingConfig(train="none", steps=0))
        _, result = run_stage(job, world.index(lexical=WORDS))
        found[mode] = result["metrics"]["recall@20"]
    assert found["rrf"] > found["none"] + 0.1
    assert found["learned"] > found["none"] + 0.1


def hybrid_job(world: TinyWorld, run_dir: Path, **changes: Any) -> Any:
    job = world.job(
        run_dir,
        retrieval=retrieval("learned", prefetch_depth=1),
        evaluate_questions="",
        training=TrainingConfig(steps=6, batch_size=3, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=3, index=False),
    )
    return with_changes(job, **changes)


def test_a_resumed_run_equals_an_uninterrupted_one(world: TinyWorld, tmp_path: Path) -> None:
    """The weight is part of the checkpoint, and so are the lexical scores of what was searched ahead."""
    whole = hybrid_job(world, tmp_path / "whole")
    run_stage(whole, world.index(max_generations=1, lexical=WORDS))
    parts = hybrid_job(world, tmp_path / "parts")
    index = FailingIndex(world.store(), world.encoder, len(world.tokenizer), max_generations=1, lexical=WORDS)
    index.fails_at = 6
    with pytest.raises(Failure):
        run_stage(parts, index)
    frozen = world.index(max_generations=1, lexical=WORDS)
    Stage(hybrid_job(world, tmp_path / "first"), frozen).serve_index(fresh=True)
    run_stage(parts, frozen)
    assert rows_by_step(parts) == rows_by_step(whole)
    assert same(final_weights(parts), final_weights(whole))
    assert float(final_weights(whole)[LEXICAL_WEIGHT]) != LexicalWeight(0.2).start


def test_gold_passages_bring_their_lexical_scores(world: TinyWorld, tmp_path: Path) -> None:
    """A labelled passage that is no hit is looked up."""
    config = retrieval("learned", source="gold")
    stage = Stage(hybrid_job(world, tmp_path / "run", retrieval=config), world.index(lexical=WORDS))
    stage.serve_index(fresh=True)
    source = stage.make_source(None)
    questions = world.question_store("train")
    seen = 0
    for number in range(3):
        numbers = stage_numbers(stage, number)
        batch = source.next().batch
        assert isinstance(stage.service, LocalIndex)
        assert stage.service.lexical is not None
        assert batch.lexical is not None  # pyright: ignore[reportAttributeAccessIssue]
        for row, question in enumerate(numbers):
            text, gold = questions.text(int(question)), questions.gold_rows(int(question))
            words = stage.service.lexical.index
            shares = words.scores([text], gold[None])[0] / words.search([text], 1)[0][0, 0]
            read = batch.lexical[row].numpy()  # pyright: ignore[reportAttributeAccessIssue]
            seen += int(np.isclose(read[:, None], shares).any())
    assert seen == 9


def stage_numbers(stage: Stage, number: int) -> np.ndarray:
    """Questions of batch `number`."""
    source: Any = stage.make_source(None)
    return source.stream.batch(number)


def test_a_stage_starts_from_one_that_knew_no_words(world: TinyWorld, tmp_path: Path) -> None:
    job = world.job(tmp_path / "plain", training=TrainingConfig(steps=1, batch_size=2), evaluate_questions="")
    run_stage(job, world.index())
    start = str(Path(job.run_dir) / "checkpoints" / "step-1")
    config = retrieval("learned", lexical_weight=0.8)
    changes = {"init_from": start, "retrieval": config, "training": TrainingConfig(train="none", steps=0)}
    stage, _ = run_stage(hybrid_job(world, tmp_path / "next", **changes), world.index(lexical=WORDS))
    assert stage.parts.lexical_weight() == pytest.approx(0.8, rel=1e-5)
    weights = load_file(Path(start) / "model.safetensors")
    assert LEXICAL_WEIGHT not in weights
    assert LEXICAL_WEIGHT not in fit_weights(
        {**weights, LEXICAL_WEIGHT: torch.zeros(1)}, make(world, retrieval("none"))
    )


def test_an_index_without_words_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"retrieval\.hybrid=rrf: the index service has no lexical index"):
        Stage(world.job(tmp_path / "run", retrieval=retrieval("rrf")), world.index())


def test_a_warm_start_ignores_words(world: TinyWorld, tmp_path: Path) -> None:
    """It searches nothing; its checkpoint has no weight."""
    job = hybrid_job(
        world,
        tmp_path / "run",
        objective=ObjectiveConfig(name="inverse_cloze"),
        training=TrainingConfig(train="retriever_only", steps=1, batch_size=4),
        train_questions="",
    )
    stage, _ = run_stage(job, None)
    assert stage.system.retriever.lexical is None
    assert LEXICAL_WEIGHT not in final_weights(job)
