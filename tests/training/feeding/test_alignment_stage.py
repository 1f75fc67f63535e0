"""Alignment as whole stages on a small world: what a few steps move, what they leave alone, what a resume restores."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.local_index import LocalIndex
from tests.helpers.preference_files import preference_store
from tests.helpers.tiny_world import TinyWorld, with_changes
from tests.training.test_stage import Failure, failing, final_weights, part, rows_by_step, run_stage, same
from training.checkpoint import load_weights, newest_checkpoint
from training.data import Collator
from training.example_settings import AlignmentConfig
from training.job import StageJob
from training.objectives.dispatch import compute, needs
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import CheckpointConfig, ObjectiveConfig, RetrievalConfig, TrainingConfig

DPO = ObjectiveConfig(name="dpo")
VARIETY = "tests.helpers.preference_files:variety"
OBJECTIVES = (
    DPO,
    ObjectiveConfig(name="kto", length_normalized=True),
    ObjectiveConfig(name="grpo", reward=VARIETY, kl_weight=0.01, group_size=3),
    ObjectiveConfig(name="reinforce", reward=VARIETY, group_size=3),
    ObjectiveConfig(name="reinforce", reward="likelihood"),
    ObjectiveConfig(name="stochastic_rag"),
)


def alignment_rows(job: StageJob) -> dict[int, dict[str, float]]:
    """What the objective said of each step."""
    rows = [json.loads(line) for line in (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith("alignment/")} for row in rows if "loss/total" in row
    }


@pytest.fixture(scope="module")
def pairs(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stores by what they hold."""
    folder = tmp_path_factory.mktemp("preferences")
    stores = {"train": ("train", True), "judged": ("train", False), "test": ("test", True)}
    return {name: str(preference_store(world, folder, *which)) for name, which in stores.items()}


@pytest.fixture(scope="module")
def start(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to align: a short joint stage."""
    job = world.job(
        tmp_path_factory.mktemp("start"),
        evaluate_questions="",
        training=TrainingConfig(steps=15, batch_size=8, warmup_steps=5),
    )
    run_stage(job, world.index(max_generations=1))
    found = newest_checkpoint(Path(job.run_dir), print)
    assert found is not None
    return found


def aligning(world: TinyWorld, run_dir: Path, start: Path, pairs: dict[str, str], **changes: Any) -> StageJob:
    """A stage of DPO that starts from `start`."""
    judged = changes.get("objective", DPO).name == "kto"
    job = world.job(
        run_dir,
        init_from=str(start),
        objective=DPO,
        train_questions=pairs["judged" if judged else "train"],
        evaluate_preferences=pairs["test"],
        training=TrainingConfig(steps=8, batch_size=6, warmup_steps=2),
    )
    return with_changes(job, **changes)


def measured(world: TinyWorld, job: StageJob, tmp_path: Path) -> dict[str, float]:
    """What the start of a stage measures."""
    untrained = with_changes(job, run_dir=str(tmp_path / "before"), training=TrainingConfig(train="none", steps=0))
    return run_stage(untrained, world.index())[1]["metrics"]


def test_preferences_move_both_what_is_said_and_what_is_retrieved(world, tmp_path, start, pairs):
    # Measured on the pairs that are trained on: the tiny world is too small to generalise in some steps.
    job = aligning(
        world,
        tmp_path / "run",
        start,
        pairs | {"test": pairs["train"]},
        refresh=RefreshPlan(every_steps=4),
        training=TrainingConfig(steps=48, batch_size=12, warmup_steps=2),
    )
    before = measured(world, job, tmp_path)
    _, result = run_stage(job, world.index())
    after, weights, old = result["metrics"], final_weights(job), load_weights(start)
    assert after["preference_accuracy"] > before["preference_accuracy"] + 0.1
    assert after["preference_margin"] > before["preference_margin"]
    for name in ("retriever.query_encoder.", "retriever.passage_encoder.", "generator."):
        assert not same(part(weights, name), part(old, name))
    first = rows_by_step(job)[1]
    assert first["loss/preference"] == pytest.approx(0.693147, abs=1e-6)  # the system is its own reference
    assert {"recall@1", "preference_accuracy_per_token", "preference_margin_per_token"} <= after.keys()
    lines = (tmp_path / "run" / "preferences.jsonl").read_text().splitlines()
    accuracy = sum(json.loads(line)["preference_accuracy"] for line in lines) / len(lines)
    assert accuracy == pytest.approx(after["preference_accuracy"])
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("eval/test/preference_accuracy") == after["preference_accuracy"] for row in logged)


def test_margins_are_differences_of_rag_sequence_losses(world, tmp_path, start, pairs):
    """Each pair again, answer by answer, by the objective that the system was trained with."""
    job = aligning(world, tmp_path / "run", start, pairs, training=TrainingConfig(train="none", steps=0))
    stage, _ = run_stage(job, world.index())
    rows = [json.loads(line) for line in (tmp_path / "run" / "preferences.jsonl").read_text().splitlines()]
    assert stage.measures.preferences is not None
    collator, system = stage.measures.preferences.collator, stage.system.eval()
    objective = ObjectiveConfig(name="rag_sequence")
    for row in rows[:6]:
        number = np.array([row["number"]])
        passages, _ = stage.measures.preferences._passages(number)
        log_likelihoods = []
        for answer in collator.questions.answer_tokens(row["number"]):
            plain = Collator.__call__(collator, number, passages, with_answers=False)
            reader = system.generator.collate(
                collator.questions_for_generator.rows(number),
                [collator.passages_for_generator.rows(passages[0])],
                [answer],
            )
            with torch.no_grad():
                outputs = system.likelihoods(replace(plain, generator_batch=reader), needs(objective), 1.0)
            log_likelihoods.append(-compute(objective, outputs)[0].item())
        assert row["preference_margin"] == pytest.approx(log_likelihoods[0] - log_likelihoods[1], abs=1e-4)
        assert row["preference_accuracy"] == float(log_likelihoods[0] > log_likelihoods[1])


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_generator_only_leaves_the_retriever_bit_for_bit(world, tmp_path, start, pairs, name):
    training = TrainingConfig(train="generator_only", steps=3, batch_size=4)
    job = aligning(world, tmp_path / "run", start, pairs, objective=ObjectiveConfig(name=name), training=training)
    run_stage(job, world.index())
    after, before = final_weights(job), load_weights(start)
    assert same(part(after, "retriever."), part(before, "retriever."))
    assert not same(part(after, "generator."), part(before, "generator."))


@pytest.mark.parametrize("kind", ["copy", "fusion", "causal"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{o.reward.rpartition(':')[2]}")
def test_every_objective_steps_with_every_generator(world, tmp_path, pairs, kind, objective):
    questions = {"dpo": pairs["train"], "kto": pairs["judged"]}.get(objective.name, str(world.questions("train")))
    job = world.job(
        tmp_path / "run",
        generator=replace(world.generator, kind=kind),
        objective=objective,
        train_questions=questions,
        evaluate_questions="",
        training=TrainingConfig(steps=2, batch_size=3),
    )
    stage = Stage(job, world.index())
    before = {name: tensor.clone() for name, tensor in stage.system.state_dict().items()}
    stage.run()
    after = final_weights(job)
    for row in rows_by_step(job).values():
        assert math.isfinite(row["loss/total"])
        assert row["optim/grad_norm_generator"] > 0
        assert row["optim/grad_norm_retriever"] > 0
    for name in ("retriever.query_encoder.", "retriever.passage_encoder.", "generator."):
        assert not same(part(after, name), part(before, name))


def test_a_closed_book_has_no_passage_to_draw(world, tmp_path, pairs):
    for name, questions in (("dpo", pairs["train"]), ("grpo", str(world.questions("train")))):
        job = world.job(
            tmp_path / name,
            objective=ObjectiveConfig(name=name, reward=VARIETY),
            retrieval=RetrievalConfig(source="none"),
            train_questions=questions,
            evaluate_preferences=pairs["test"],
            training=TrainingConfig(train="generator_only", steps=6, batch_size=4),
        )
        _, result = run_stage(job, None)
        norms = [row["optim/grad_norm_generator"] for row in rows_by_step(job).values()]
        assert max(norms) > 0  # of a group whose samples are all equal it is 0
        assert "preference_accuracy" in result["metrics"]


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("reference", ["copy", "offload"])
def test_a_resume_has_the_reference_of_the_start(world, tmp_path, start, pairs, reference):
    changes = {
        "alignment": AlignmentConfig(reference=reference),
        "evaluate_questions": "",
        "training": TrainingConfig(steps=6, batch_size=3, warmup_steps=1),
        "retrieval": RetrievalConfig(k=3, prefetch_depth=0),
        "checkpoint": CheckpointConfig(every_steps=3, index=False),
    }
    whole = aligning(world, tmp_path / "whole", start, pairs, **changes)
    run_stage(whole, world.index(max_generations=1))
    parts = aligning(world, tmp_path / "parts", start, pairs, **changes)
    with pytest.raises(Failure):
        run_stage(parts, failing(world, fails_at=5, max_generations=1))
    stage, _ = run_stage(parts, frozen_index(world, parts, tmp_path))
    assert rows_by_step(parts) == rows_by_step(whole)
    assert same(final_weights(parts), final_weights(whole))
    assert stage.reference is not None
    assert stage.reference.frozen is not None
    kept = {name: tensor.detach() for name, tensor in stage.reference.frozen.state_dict().items()}
    assert same(kept, {name: tensor for name, tensor in load_weights(start).items() if name in kept})


def frozen_index(world: TinyWorld, job: StageJob, tmp_path: Path) -> LocalIndex:
    """The index of the run's first weights, which never follows."""
    index = world.index(max_generations=1)
    first = with_changes(job, run_dir=str(tmp_path / "first"), training=replace(job.settings.training, steps=0))
    stage = Stage(first, index)
    stage.restore()
    stage.serve_index(fresh=True)
    return index


def test_a_resume_is_refused_when_its_start_is_gone(world, tmp_path, start, pairs):
    copied = tmp_path / "copied"
    shutil.copytree(start, copied)
    job = aligning(world, tmp_path / "run", copied, pairs, evaluate_questions="", evaluate_preferences="")
    run_stage(job, world.index())
    shutil.rmtree(copied)
    longer = with_changes(job, training=replace(job.settings.training, steps=10))
    with pytest.raises(ValueError, match=r"run.init_from='.*copied': this stage began with .*copied, which is gone"):
        run_stage(longer, world.index())
    run_stage(replace(longer, init_from=str(start)), world.index())  # the same checkpoint elsewhere


def test_samples_that_serve_twice_survive_a_resume(world, tmp_path, start):
    def job(name: str) -> StageJob:
        return world.job(
            tmp_path / name,
            init_from=str(start),
            objective=ObjectiveConfig(name="grpo", reward=VARIETY, group_size=4, kl_weight=0.1),
            alignment=AlignmentConfig(updates_per_sample=2),
            evaluate_questions="",
            training=TrainingConfig(steps=6, batch_size=3, warmup_steps=0),
            retrieval=RetrievalConfig(k=3, prefetch_depth=0),
            checkpoint=CheckpointConfig(every_steps=3, index=False),
        )

    run_stage(job("whole"), world.index(max_generations=1))
    with pytest.raises(Failure):
        run_stage(job("parts"), failing(world, fails_at=3, max_generations=1))
    run_stage(job("parts"), frozen_index(world, job("parts"), tmp_path))
    whole = alignment_rows(job("whole"))
    assert alignment_rows(job("parts")) == whole
    for first, second in ((1, 2), (3, 4), (5, 6)):
        assert whole[first]["alignment/reward"] == whole[second]["alignment/reward"]
        assert whole[first]["alignment/log_prob"] != whole[second]["alignment/log_prob"]
    assert same(final_weights(job("parts")), final_weights(job("whole")))


# ---------------------------------------------------------------- rewards of the user


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 1 / 0",
            r"objective.reward=.*reward.py:judge: must not raise, but did ZeroDivisionError: division by zero",
        ),
        ("return float('nan')", "objective.reward=.*: must return a finite number, not nan"),
        ("return 'good'", "objective.reward=.*: must return a finite number, not 'good'"),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_its_name(world, tmp_path, body, message):
    file = tmp_path / "reward.py"
    file.write_text(f"def judge(question, answer, golds, passages):\n    {body}\n")
    objective = ObjectiveConfig(name="grpo", reward=f"{file}:judge", group_size=2)
    job = world.job(tmp_path / "run", objective=objective, evaluate_questions="")
    with pytest.raises(ValueError, match=message):
        run_stage(job, world.index())
