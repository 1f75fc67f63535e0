"""What an evaluation reports is what its rows, hits and models say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_world import TinyWorld
from training.data import Collator
from training.measuring.evaluate import Evaluation, Evaluator
from training.metrics import changed_questions, contains_answer, exact_match, f1, mean_of_rows
from training.models.generators.generator import Decoded
from training.objectives.dispatch import compute, needs
from training.stage import Stage
from training.training_settings import (
    DecodingConfig,
    EvaluationConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

NUMBERS = np.arange(36)


@pytest.fixture
def make_stage(world: TinyWorld, tmp_path: Path) -> Callable[..., Stage]:
    def make(**changes: Any) -> Stage:
        stage = Stage(world.job(tmp_path / "run", training=TrainingConfig(train="none"), **changes), world.index())
        stage.serve_index(fresh=True)
        return stage

    return make


def evaluator_of(stage: Stage) -> Evaluator:
    assert stage.measures.evaluator is not None
    return stage.measures.evaluator


def settings(mode: str = "marginal", **changes: Any) -> EvaluationConfig:
    return EvaluationConfig(k=20, batch_size=16, decoding=DecodingConfig(mode=mode, max_tokens=5), **changes)


def answers_of(evaluation: Evaluation, prefix: str = "") -> list[str]:
    return [row[f"{prefix}prediction"] for row in evaluation.rows]


# ---------------------------------------------------------------- ranking and answers


def test_metrics_follow_from_hits_and_predictions(make_stage, world):
    stage = make_stage()
    evaluation = evaluator_of(stage)(NUMBERS, texts=True)
    questions, store = world.question_store("test"), world.store()
    vectors = np.concatenate(
        [stage.service._encode(*store.tokens("retriever").padded(np.array([i]))) for i in range(180)]
    )
    first, fifth, reciprocal, stated = [], [], [], []
    for number, row in zip(NUMBERS, evaluation.rows, strict=True):
        ids, mask = evaluator_of(stage).collator.question_tensors(np.array([number]))
        with torch.no_grad():
            query = stage.system.retriever.encode_queries(ids, mask).numpy()[0]
        ranking = np.argsort(-(vectors @ query), kind="stable")[:20]
        gold = set(questions.gold_rows(number).tolist())
        found = [place for place, passage in enumerate(ranking, start=1) if passage in gold]
        first.append(float(1 in found))
        fifth.append(float(any(place <= 5 for place in found)))
        reciprocal.append(1 / found[0] if found else 0.0)
        question = questions.question(number)
        texts = [f"{store.passage(i).title} {store.passage(i).text}" for i in ranking[:5]]
        stated.append(float(any(contains_answer(text, question.answers) for text in texts)))
        assert row["hits"].tolist() == ranking[:3].tolist()
        assert (row["id"], row["question"], row["answers"]) == (question.id, question.text, question.answers)
        assert row["exact_match"] == exact_match(row["prediction"], question.answers)
        assert row["f1"] == f1(row["prediction"], question.answers)
    expected = {"recall@1": first, "recall@5": fifth, "mrr": reciprocal, "answer_recall@5": stated}
    for name, values in expected.items():
        assert evaluation.metrics[name] == pytest.approx(np.mean(values))
    assert evaluation.metrics["f1"] == pytest.approx(np.mean([row["f1"] for row in evaluation.rows]))
    assert (evaluation.generation, evaluation.weights_version) == (0, 0)


@pytest.mark.parametrize("mode", ["marginal", "fused", "top1"])
def test_batches_change_nothing(make_stage, mode):
    evaluator = evaluator_of(make_stage(evaluation=settings(mode)))
    whole = evaluator(NUMBERS)
    evaluator.config = replace(evaluator.config, batch_size=5)
    parts = evaluator(NUMBERS)
    assert answers_of(whole) == answers_of(parts)
    assert parts.metrics == pytest.approx(whole.metrics, abs=1e-4)


def test_further_modes_are_measured_as_if_they_were_the_main_one(make_stage):
    evaluator = evaluator_of(make_stage(evaluation=settings("marginal")))
    together = evaluator(NUMBERS[:12], also=["fused", "top1"])
    for mode in ("fused", "top1"):
        evaluator.config = settings(mode)
        alone = evaluator(NUMBERS[:12])
        assert answers_of(together, f"{mode}/") == answers_of(alone)
        for name in ("exact_match", "f1", "log_likelihood"):
            assert together.metrics[f"{mode}/{name}"] == pytest.approx(alone.metrics[name], abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "objective"),
    [
        ("marginal", ObjectiveConfig(name="rag_sequence", temperature=0.7)),
        ("fused", ObjectiveConfig(name="fused", score_bias=True)),
        ("fused", ObjectiveConfig(name="fused", score_bias=False)),
    ],
)
def test_the_log_likelihood_is_what_training_maximises(make_stage, mode, objective):
    stage = make_stage(evaluation=settings(mode), objective=objective)
    evaluation = evaluator_of(stage)(NUMBERS[:8])
    for number, row in zip(NUMBERS[:8], evaluation.rows, strict=True):
        batch = evaluator_of(stage).collator(np.array([number]), [row["hits"]])
        with torch.no_grad():
            outputs = stage.system.likelihoods(batch, needs(objective), objective.temperature)
        tokens = int(batch.generator_batch.answer_mask.sum())
        loss, _ = compute(objective, outputs)
        total = float(loss) * (tokens if objective.name == "fused" else 1)
        assert row["log_likelihood"] == pytest.approx(-total, rel=1e-4)


def test_sampling_a_subset_keeps_the_order_asked_for(make_stage):
    evaluator = evaluator_of(make_stage())
    everything = {row["number"]: row["prediction"] for row in evaluator(NUMBERS).rows}
    some = evaluator(np.array([30, 2, 17]))
    assert [row["number"] for row in some.rows] == [30, 2, 17]
    assert answers_of(some) == [everything[number] for number in (30, 2, 17)]


def test_every_rank_gets_an_equal_share_and_no_question_is_lost(make_stage):
    evaluator = evaluator_of(make_stage())
    shares = []
    for rank in range(4):
        evaluator.engine.rank, evaluator.engine.world_size = rank, 4
        shares.append(evaluator.engine.share(NUMBERS[:10]))
    assert [len(share) for share in shares] == [3, 3, 3, 3]
    assert set(np.concatenate(shares)) == set(range(10))


def test_an_empty_split_is_refused(make_stage):
    with pytest.raises(ValueError, match=r"questions\.evaluate"):
        evaluator_of(make_stage())(np.empty(0, np.int64))


def test_dropout_is_off_while_measuring_and_on_again_afterwards(world, tmp_path):
    generator = replace(world.generator, fresh=replace(world.generator.fresh, dropout=0.3))
    stage = Stage(world.job(tmp_path / "run", generator=generator), world.index())
    stage.serve_index(fresh=True)
    stage.engine.module.train()
    first, second = (evaluator_of(stage)(NUMBERS[:6]) for _ in range(2))
    assert first.metrics == second.metrics
    assert stage.engine.module.training


# ---------------------------------------------------------------- controls


def test_closed_book_reads_nothing(make_stage, world, tmp_path):
    first = evaluator_of(make_stage())(NUMBERS, also=["closed_book"])
    other = make_stage(retrieval=RetrievalConfig(k=1))
    second = evaluator_of(other)(NUMBERS, also=["closed_book"])
    assert answers_of(first, "closed_book/") == answers_of(second, "closed_book/")
    assert first.metrics["closed_book/exact_match"] == 0
    assert first.metrics["closed_book/log_likelihood"] != first.metrics["log_likelihood"]
    stage = Stage(
        world.job(tmp_path / "closed", training=TrainingConfig(train="none"), retrieval=RetrievalConfig(source="none")),
        None,
    )
    alone = evaluator_of(stage)(NUMBERS)
    assert answers_of(alone) == answers_of(first, "closed_book/")
    assert not [name for name in alone.metrics if "recall" in name]


def test_the_gold_control_reads_the_labelled_passage(make_stage):
    stage = make_stage()
    evaluator = evaluator_of(stage)
    evaluation = evaluator(NUMBERS[:10], also=["gold"])
    collator: Collator = evaluator.collator
    for number, row in zip(NUMBERS[:10], evaluation.rows, strict=True):
        gold = collator.questions.gold_rows(int(number))[:1]
        batch = collator(np.array([number]), [gold])
        with torch.no_grad():
            reading = stage.system.generator.read(batch.generator_batch)
            decoded: Decoded = stage.system.generator.write(
                reading, batch.generator_batch, fused=False, max_tokens=6, num_beams=1
            )
            scores = stage.system.generator.per_passage_log_probs(reading, batch.generator_batch)
        assert row["gold/log_likelihood"] == pytest.approx(float(scores.sum()), rel=1e-4)
        assert row["gold/prediction"].lower() == stage.parts.text.to_text(decoded.tokens[0]).lower()


def test_answers_are_spelled_as_in_the_passages_they_were_read_from(make_stage, world):
    evaluator = evaluator_of(make_stage())
    store = world.store()
    title = store.passage(4).title  # a name with capitals
    tokens = world.tokenizer.encode(title, add_special_tokens=False)
    passages = [np.array([9, 4]), np.array([4, 9])]
    assert title not in store.passage(9).text
    assert evaluator._spelled(passages, [tokens] * 2) == [title, title]  # fused: one answer a question
    lower = title.lower()
    assert evaluator._spelled(passages, [tokens] * 4) == [lower, title, title, lower]  # one answer a passage


# ---------------------------------------------------------------- after an update of the corpus


def answered(identifier: str, answers: list[str], prediction: str) -> dict[str, Any]:
    return {
        "id": identifier,
        "answers": answers,
        "prediction": prediction,
        "exact_match": exact_match(prediction, answers),
    }


def test_changed_questions_are_told_apart():
    before = [
        answered("follows", ["krob"], "krob"),
        answered("sticks", ["krob"], "krob"),
        answered("neither", ["krob"], "vesul"),
        answered("unchanged", ["krob"], "krob"),
        answered("respelled", ["The Krob!"], "krob"),
        answered("gone", ["krob"], "krob"),
        answered("both", ["krob", "vesul"], "krob"),
    ]
    after = [
        answered("new", ["trifis"], "trifis"),
        answered("sticks", ["vesul"], "krob"),
        answered("follows", ["vesul"], "Vesul"),
        answered("neither", ["vesul"], "povin"),
        answered("unchanged", ["krob"], "vesul"),
        answered("respelled", ["krob"], "vesul"),
        answered("both", ["vesul"], "vesul"),
    ]
    rows = changed_questions(before, after)
    assert [(row["id"], row["new"], row["old"], row["before"]) for row in rows] == [
        ("sticks", 0.0, 1.0, 1.0),
        ("follows", 1.0, 0.0, 1.0),
        ("neither", 0.0, 0.0, 0.0),
        ("both", 1.0, 0.0, 1.0),  # right now, and one of the former answers too
    ]
    assert changed_questions([], after) == []


def test_means_leave_out_what_could_not_be_measured():
    rows = [{"a": 1.0, "b": 2.0, "id": "x"}, {"a": 3.0, "b": float("nan")}, {"a": 5.0}]
    assert mean_of_rows(rows) == {"a": 3.0, "b": 2.0}
    assert mean_of_rows([]) == {}
