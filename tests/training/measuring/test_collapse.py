"""When retrieval counts as collapsed, and what a stage does then."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_world import TinyWorld
from training.loop import LoopState
from training.measuring.collapse import WINDOW_STEPS, Collapsed, CollapseDetector, remedy
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import DecodingConfig, EvaluationConfig, MonitorConfig, ObjectiveConfig, TrainingConfig

HEALTHY = (0.6, 0.3)  # share of the largest entropy, labelled passages among the K


def window(detector: CollapseDetector, share: float, gold: float, k: int = 4) -> list[str]:
    """What is said over one window of steps."""
    said = [detector.after_step(share * math.log(k), k, gold) for _ in range(WINDOW_STEPS)]
    assert said[:-1] == [None] * (WINDOW_STEPS - 1)
    return [text for text in said if text is not None]


@pytest.mark.parametrize(
    ("objective", "staleness", "first"),
    [
        (
            ObjectiveConfig(name="pdist"),
            10.0,
            "Let a question count by how sure the generator is (objective.confidence",
        ),
        (
            ObjectiveConfig(name="adist", confidence=True),
            10.0,
            "Warm up the generator (training.retriever_delay_steps)",
        ),
        (
            ObjectiveConfig(name="grpo"),
            10.0,
            "Let a question count by how much its rewards differ (objective.",
        ),
        (ObjectiveConfig(name="reinforce", advantage="centered"), 10.0, "Warm up the generator"),
        (
            ObjectiveConfig(name="pdist"),
            31.0,
            "The hits are of weights 31 steps old: bound that (refresh.",
        ),
    ],
)
def test_what_is_advised_fits_the_objective(objective: ObjectiveConfig, staleness: float, first: str) -> None:
    assert remedy(objective, staleness, refresh_every=20).startswith(first)


@pytest.mark.parametrize(
    ("first", "later", "word"),
    [
        (HEALTHY, (0.998, 0.3), "uniform"),
        (HEALTHY, (0.002, 0.3), "one passage"),
        ((0.6, 0.0), (0.002, 0.0), "one passage"),  # without labels nobody knows that it is the right one
        (HEALTHY, (0.002, 0.45), None),  # sure, and more often right than at the start
        ((0.6, 0.98), (0.002, 0.97), None),  # sure, and as right as it always was
        ((0.6, 0.98), (0.998, 0.2), "uniform"),
        (HEALTHY, (0.9, 0.1), None),
        ((0.995, 0.3), (0.997, 0.3), None),  # it started uniform
    ],
)
def test_entropy(first: tuple[float, float], later: tuple[float, float], word: str | None) -> None:
    detector = CollapseDetector({})
    assert not window(detector, *first)
    said = window(detector, *later)
    assert len(said) == (word is not None)
    assert word is None or word in said[0]
    assert not window(detector, *later)  # said once


def test_one_passage_and_numbers_that_are_not_finite_say_nothing() -> None:
    detector = CollapseDetector({})
    for _ in range(2 * WINDOW_STEPS):
        assert detector.after_step(0.0, 1, 0.0) is None
        assert CollapseDetector({}).after_step(math.nan, 4, 0.0) is None
    assert not detector.start


def test_recall_below_the_start() -> None:
    start: dict[str, float] = {}
    detector = CollapseDetector(start)
    assert detector.after_evaluation({"recall@1": 0.2, "recall@5": 0.6, "qrel_recall@5": 0.1, "f1": 0.9}) is None
    assert start == {"recall": pytest.approx(0.4)}
    assert detector.after_evaluation({"recall@1": 0.5, "recall@5": 0.27}) is None  # on average not lower
    assert detector.after_evaluation({"recall@1": 0.19, "recall@5": 0.58}) is None  # within what chance does
    resumed = CollapseDetector(dict(start))
    assert "fell to 0.300 from 0.400" in str(resumed.after_evaluation({"recall@1": 0.1, "recall@5": 0.5}))
    assert resumed.after_evaluation({"recall@1": 0.0, "recall@5": 0.0}) is None  # said once
    assert CollapseDetector({}).after_evaluation({"exact_match": 0.5}) is None


BRIEF = EvaluationConfig(
    every_steps=1, max_questions=40, k=20, batch_size=64, decoding=DecodingConfig(mode="fused", max_tokens=1)
)


@pytest.mark.parametrize("setting", ["warn", "stop", "ignore"])
def test_a_destroyed_retriever(world: TinyWorld, tmp_path: Path, setting: str) -> None:
    """A learning rate that wrecks every weight of the retriever at the first step."""
    job = world.job(
        tmp_path / "run",
        objective=ObjectiveConfig(name="adist"),
        training=TrainingConfig(
            steps=2, batch_size=4, warmup_steps=0, schedule="constant", lr_retriever=3.0, on_collapse=setting
        ),
        evaluation=BRIEF,
        refresh=RefreshPlan(every_steps=1),
    )
    stage = Stage(job, world.index())
    if setting == "ignore":
        assert stage.hooks().watch is None
        return
    if setting == "stop":
        with pytest.raises(Collapsed, match=r"retrieval collapses at step \d: .*training\.on_collapse=stop"):
            stage.run()
    else:
        assert stage.run()["step"] == 2
    path = tmp_path / "run" / "events.jsonl"
    events: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    found = [event for event in events if event["event"] == "retrieval_collapse"]
    assert [event["step"] for event in found] == [1]
    assert "recall fell to" in found[0]["message"]


@pytest.mark.parametrize(("staleness", "named"), [(14.0, False), (16.0, True)])
def test_a_collapse_beside_a_late_index_names_it(
    world: TinyWorld, tmp_path: Path, staleness: float, named: bool
) -> None:
    """A retriever that learns from hits of weights long gone collapses whatever its objective is."""
    console = io.StringIO()
    shown = MonitorConfig(wandb="off")
    job = world.job(
        tmp_path / "run", objective=ObjectiveConfig(name="pdist"), refresh=RefreshPlan(every_steps=10), monitor=shown
    )
    measures = Stage(job, world.index(), console).measures
    measures.watch(LoopState())
    assert measures.collapse is not None
    measures.collapse.start |= {"entropy": 0.9, "gold": 0.9}
    for step in range(1, WINDOW_STEPS + 1):
        measures.after_step(
            step, {"retrieval/entropy": math.log(job.settings.retrieval.k), "index/staleness_steps": staleness}
        )
    assert "p(z|q) is uniform" in console.getvalue()
    assert ("The hits are of weights 16 steps old: bound that (refresh.max" in console.getvalue()) == named


def test_the_start_is_remembered_by_a_resume(world: TinyWorld, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluation": BRIEF}
    first = Stage(world.job(tmp_path / "run", training=TrainingConfig(steps=1, batch_size=4), **changes), world.index())
    first.run()
    assert 0 < first.state.start["recall"] <= 1
    again = Stage(world.job(tmp_path / "run", training=TrainingConfig(steps=2, batch_size=4), **changes), world.index())
    again.run()
    assert again.state.step == 2
    assert again.state.start == first.state.start
