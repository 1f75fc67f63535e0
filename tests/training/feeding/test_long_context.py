"""Long prompts hold what fits, the labelled passage with the chance that fits; a needle stands where it was put."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_world import TinyWorld
from training.data import Collator
from training.feeding.long_context import LongContext
from training.measuring.costs import prompt_lengths
from training.measuring.needle import needle_sweep
from training.metrics import exact_match
from training.models.build import build_system
from training.stage import Stage
from training.training_settings import (
    DecodingConfig,
    EvaluationConfig,
    GeneratorConfig,
    NeedleConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

BUDGETS = {"copy": 900, "fusion": 900, "causal": 700}


def collator_of(world: TinyWorld, kind: str) -> Collator:
    generator = GeneratorConfig(kind=kind, fresh=world.generator.fresh, max_answer_tokens=8)
    system = build_system(
        world.encoder, generator, train="none", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    return Collator(world.store(), world.question_store("test"), system.generator, 0)


def prompt_tokens(collator: Collator, question: int, passages: np.ndarray) -> int:
    """What the generator itself makes of it."""
    batch = collator(np.array([question]), [passages], with_answers=False, for_retriever=False)
    return sum(prompt_lengths(batch.generator_batch, fused=True)[0])


# ---------------------------------------------------------------- assembly


@pytest.mark.parametrize("kind", ["copy", "fusion", "causal"])
def test_a_long_prompt_is_as_long_as_it_may_be(world: TinyWorld, kind: str) -> None:
    collator = collator_of(world, kind)
    context = LongContext(collator, BUDGETS[kind], answer_tokens=8)
    limit = BUDGETS[kind] - (9 if kind == "causal" else 0)  # the answer and its end share a causal model's context
    for question in range(5):
        chosen = context.choose(question, np.random.default_rng([1, question]))
        more = context.choose(question, np.random.default_rng([1, question]))
        assert chosen.tolist() == more.tolist()
        assert len(set(chosen.tolist())) == len(chosen) > 3
        assert prompt_tokens(collator, question, chosen) <= limit
    assert context.choose(0, np.random.default_rng(1)).tolist() != context.choose(0, np.random.default_rng(2)).tolist()


def test_the_next_passage_of_the_order_would_not_fit(world: TinyWorld) -> None:
    collator = collator_of(world, "causal")
    num_passages = len(world.store())
    everything = LongContext(collator, 8192, answer_tokens=8)
    whole = everything.choose(0, np.random.default_rng(0))
    assert sorted(whole.tolist()) == list(range(num_passages))  # the corpus fits: all of it, in a random order
    assert whole.tolist() != sorted(whole.tolist())
    context = LongContext(collator, 700, answer_tokens=8)
    lengths = collator.passages_for_generator.lengths
    for seed in range(20):
        chosen = context.choose(0, np.random.default_rng(seed))
        left = 700 - 9 - prompt_tokens(collator, 0, chosen)
        assert 0 <= left < lengths.max() + len(collator.generator.after_passage)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def test_the_labelled_passage_is_there_with_the_chance_that_fits_and_anywhere(world: TinyWorld) -> None:
    collator = collator_of(world, "copy")
    context, num_passages = LongContext(collator, 2000, answer_tokens=8), len(world.store())
    gold = int(collator.questions.gold_rows(0)[0])
    prompts = [context.choose(0, np.random.default_rng(seed)) for seed in range(2000)]
    share = np.mean([len(prompt) for prompt in prompts]) / num_passages
    found = [np.flatnonzero(prompt == gold) for prompt in prompts]
    assert 0.2 < share < 0.8
    assert np.mean([len(place) for place in found]) == pytest.approx(share, abs=0.035)  # three standard errors
    depths = [place[0] / (len(prompt) - 1) for place, prompt in zip(found, prompts, strict=True) if len(place)]
    assert np.mean(depths) == pytest.approx(0.5, abs=0.035)


@pytest.mark.parametrize("kind", ["copy", "causal"])
def test_a_needle_stands_at_its_depth_among_the_same_others(world: TinyWorld, kind: str) -> None:
    collator = collator_of(world, kind)
    context = LongContext(collator, BUDGETS[kind], answer_tokens=8)
    labelled = np.array([4, 9])
    prompts = {
        depth: context.bury(1, 4, labelled=labelled, depth=depth, rng=np.random.default_rng(5)).tolist()
        for depth in (0.0, 0.5, 1.0)
    }
    others = [passage for passage in prompts[0.0] if passage != 4]
    assert len(others) > 3
    assert 9 not in others
    assert prompts[0.0] == [4, *others]
    assert prompts[1.0] == [*others, 4]
    half = round(len(others) / 2)
    assert prompts[0.5] == [*others[:half], 4, *others[half:]]
    limit = BUDGETS[kind] - (9 if kind == "causal" else 0)
    assert prompt_tokens(collator, 1, np.array(prompts[0.5])) <= limit


def test_the_smallest_haystack_is_the_needle(world: TinyWorld) -> None:
    collator = collator_of(world, "causal")
    needed = LongContext(collator, 700, answer_tokens=8).smallest(0, 3)
    assert needed == prompt_tokens(collator, 0, np.array([3])) + 9
    alone = LongContext(collator, needed, answer_tokens=8).bury(
        0, 3, labelled=np.array([3]), depth=0.5, rng=np.random.default_rng(0)
    )
    assert alone.tolist() == [3]


def test_budgets_that_cannot_be(world: TinyWorld) -> None:
    with pytest.raises(ValueError, match=r"retrieval\.max_context_tokens=0: must be set"):
        LongContext(collator_of(world, "copy"), 0, 8)
    causal = collator_of(world, "causal")
    with pytest.raises(ValueError, match=r"retrieval\.max_context_tokens=9000: must be at most 8192, the generator's"):
        LongContext(causal, 9000, 8)
    with pytest.raises(ValueError, match=r"max_context_tokens=30: a question of \d+ tokens .* no passage fits"):
        LongContext(causal, 30, 8)
    assert LongContext(causal, 0, 8).budget == 8192


# ---------------------------------------------------------------- evaluation


@pytest.fixture
def make_stage(world: TinyWorld, tmp_path: Path) -> Callable[..., Stage]:
    def make(**changes: Any) -> Stage:
        job = world.job(tmp_path / "run", training=TrainingConfig(train="none"), **changes)
        searches = job.settings.retrieval.source not in ("none", "long")
        stage = Stage(job, world.index() if searches else None)
        stage.serve_index(fresh=True)
        return stage

    return make


def settings(mode: str = "marginal", **changes: Any) -> EvaluationConfig:
    return EvaluationConfig(k=20, batch_size=8, decoding=DecodingConfig(mode=mode, max_tokens=5), **changes)


def test_every_mode_reports_what_it_costs(make_stage: Callable[..., Stage], world: TinyWorld) -> None:
    retrieval = RetrievalConfig(k=3, max_context_tokens=600)
    stage = make_stage(retrieval=retrieval, evaluation=settings(also=["closed_book", "gold", "fused", "long"]))
    assert stage.measures.evaluator is not None
    numbers = np.arange(12)
    evaluation = stage.measures.evaluator(numbers, also=["closed_book", "gold", "fused", "long"], costs=True)
    found = evaluation.costs
    tokens = {mode: costs["prompt_tokens"] for mode, costs in found.items()}
    assert list(tokens) == ["marginal", "closed_book", "gold", "fused", "long"]
    assert tokens["closed_book"] < tokens["gold"] < tokens["marginal"] == tokens["fused"] < tokens["long"] <= 600
    assert found["marginal"]["flops"] > found["fused"]["flops"]  # three answers are written instead of one
    assert found["marginal"]["retrieval_flops"] == found["fused"]["retrieval_flops"] > 0
    assert found["long"]["retrieval_flops"] == found["gold"]["retrieval_flops"] == 0
    per_token = found["marginal"]["kv_cache_bytes"] / tokens["marginal"]
    assert found["long"]["kv_cache_bytes"] == pytest.approx(per_token * tokens["long"])
    assert min(costs["seconds"] for costs in found.values()) > 0
    assert found["marginal"]["search_seconds"] > 0 == found["long"]["search_seconds"]
    without = stage.measures.evaluator(numbers)
    assert without.costs == {}
    assert without.metrics["exact_match"] == evaluation.metrics["exact_match"]
    assert not [row for row in evaluation.rows if "costs" in row]


def test_long_answers_are_written_from_the_long_prompt(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(
        retrieval=RetrievalConfig(source="long", max_context_tokens=600),
        evaluation=settings("fused"),
        objective=ObjectiveConfig(name="fused", score_bias=False),
    )
    evaluator = stage.measures.evaluator
    assert evaluator is not None
    evaluation = evaluator(np.arange(6))
    assert not [name for name in evaluation.metrics if "recall" in name]
    for number, row in enumerate(evaluation.rows):
        passages = LongContext(evaluator.collator, 600, 8).choose(number, np.random.default_rng([0, number]))
        batch = evaluator.collator(np.array([number]), [passages])
        with torch.no_grad():
            generator = stage.system.generator
            scores = generator.fused_log_probs(generator.read(batch.generator_batch), batch.generator_batch)
        assert row["log_likelihood"] == pytest.approx(float(scores.sum()), rel=1e-4)
        assert row["exact_match"] == exact_match(row["prediction"], row["answers"])


def test_long_batches_have_as_many_tokens_as_retrieved_ones(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(retrieval=RetrievalConfig(k=3, max_context_tokens=600), evaluation=settings(also=["long"]))
    assert stage.measures.evaluator is not None
    limit = stage.job.settings.generator.max_passage_tokens
    assert stage.measures.evaluator._size_of(600) == 8 * 3 * limit // 600
    assert stage.measures.evaluator._size_of(10**9) == 1
    assert stage.measures.evaluator._size_of(1) == 8


def test_what_does_not_fit_is_refused_before_training(make_stage: Callable[..., Stage]) -> None:
    with pytest.raises(ValueError, match=r"retrieval\.max_context_tokens=5: "):
        make_stage(retrieval=RetrievalConfig(max_context_tokens=5), evaluation=settings(also=["long"]))
    with pytest.raises(ValueError, match=r"evaluation\.needle\.lengths=7: "):
        make_stage(evaluation=settings(needle=NeedleConfig([7], [0.0])))


def test_a_generator_trains_on_long_prompts_and_the_retriever_stays(world: TinyWorld, tmp_path: Path) -> None:
    job = world.job(
        tmp_path / "run",
        objective=ObjectiveConfig(name="fused", score_bias=False),
        retrieval=RetrievalConfig(source="long", max_context_tokens=300),
        training=TrainingConfig(train="generator_only", steps=3, batch_size=2, warmup_steps=0),
        evaluation=replace(settings("fused"), needle=NeedleConfig([200, 300], [0.0, 0.5, 1.0], num_questions=4)),
    )
    stage = Stage(job, None)
    before = {name: tensor.clone() for name, tensor in stage.system.state_dict().items()}
    result = stage.run()
    changed = {name for name, tensor in stage.system.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("generator.") for name in changed)
    needle = result["needle"]
    assert np.array(needle["exact_match"]).shape == (2, 3)
    assert (needle["lengths"], needle["depths"], needle["num_questions"]) == ([200, 300], [0.0, 0.5, 1.0], 4)


# ---------------------------------------------------------------- the sweep


@dataclass
class Reader:
    """Stands in for an evaluator whose generator finds a needle only in the first half of a prompt of at most 3."""

    collator: Collator
    messages: list[str] = field(default_factory=list)

    @property
    def questions(self) -> Any:
        return self.collator.questions

    def context_of(self, budget: int, setting: str) -> LongContext:
        return LongContext(self.collator, budget, 8, setting)

    def exact_match(self, numbers: np.ndarray, choose: Any, prompt_tokens: int) -> dict[int, float]:
        found = {}
        for number in numbers.tolist():
            passages, gold = choose(number).tolist(), int(self.questions.gold_rows(number)[0])
            found[number] = float(passages.index(gold) <= len(passages) // 2 and len(passages) <= 3)
        return found

    def progress(self, text: str) -> None:
        self.messages.append(text)


def test_the_sweep_is_a_table_of_lengths_and_depths(world: TinyWorld) -> None:
    reader: Any = Reader(collator_of(world, "copy"))
    found = needle_sweep(reader, NeedleConfig([120, 900], [0.0, 1.0], num_questions=5))
    assert found == {
        "lengths": [120, 900],
        "depths": [0.0, 1.0],
        "num_questions": 5,
        "exact_match": [[1.0, 0.0], [0.0, 0.0]],
    }
    assert len(reader.messages) == 4
    questions = reader.collator.questions
    context = LongContext(reader.collator, 900, 8)
    needed = max(context.smallest(number, int(questions.gold_rows(number)[0])) for number in range(len(questions)))
    with pytest.raises(ValueError, match=rf"evaluation\.needle\.lengths={needed - 1}: must be at least {needed}, "):
        needle_sweep(reader, NeedleConfig([needed - 1], [0.0], num_questions=0))
    assert needle_sweep(reader, NeedleConfig([needed], [0.0], num_questions=0))["num_questions"] == len(questions)
