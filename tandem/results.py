"""Reads the numbers of a run folder into dataclasses: `evaluation.json` of a stage, `summary.json` of its run."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of two stages in one metric, question by question, with its 95% interval.

    Example
    -------
    >>> tandem.Difference(mean=0.2, low=0.1, high=0.3).is_clear
    True
    """

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """True if the interval does not contain 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Update:
    """Answers to the questions whose facts the update of the corpus changed, asked again without training.

    Example
    -------
    >>> run.results().update is None  # this run had no update
    True
    """

    new: float  # Share of the changed questions that were answered with the new fact
    old: float  # Share that were answered with the former fact
    before: float  # Share that were answered rightly before the update
    num_changed: int  # Number of changed questions


@dataclass(frozen=True, kw_only=True)
class Results:
    """Measurements on the evaluation questions.

    Example
    -------
    >>> results = run.results()
    >>> results.num_questions, 0.0 <= results.metrics["exact_match"] <= 1.0
    (24, True)
    """

    metrics: dict[str, float]  # mean over the questions of each metric of the stage
    step: int  # Number of training steps of the stage
    num_questions: int  # Number of evaluation questions
    train_seconds: float
    blocked_steps: int  # Number of steps that waited for the index
    generations_committed: int  # Number of index generations that were committed
    stages: dict[str, dict[str, float]]  # headline metrics of every stage of the run, where it has several
    differences: dict[str, dict[str, Difference]]  # "stage - other stage": by metric
    update: Update | None  # None: the corpus was not updated


def read_results(folder: Path) -> Results:
    """Return the results of the run folder `folder`. Raises ValueError where nothing was measured."""
    measured = _read(folder / "evaluation.json")
    if not measured.get("metrics"):
        raise ValueError(f"{folder} has no evaluation yet: it is written at the end of the training")
    summary = _read(folder / "summary.json") or _read(folder.parent / "summary.json")
    swap = summary.get("swap")
    paired = summary.get("paired", {})
    stages = {name: values for name, values in summary.items() if isinstance(values, dict) and "exact_match" in values}
    stages.pop("closed_book", None)
    return Results(
        metrics=measured["metrics"],
        step=measured.get("step", 0),
        num_questions=measured.get("num_questions", 0),
        train_seconds=measured.get("train_seconds", 0.0),
        blocked_steps=measured.get("blocked_steps", 0),
        generations_committed=measured.get("generations_committed", 0),
        stages=stages,
        differences={
            pair: {name: Difference(**values) for name, values in metrics.items()} for pair, metrics in paired.items()
        },
        update=None if swap is None else Update(**{entry.name: swap[entry.name] for entry in fields(Update)}),
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
