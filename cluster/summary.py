"""What an experiment found: one table, `summary.json`, and the self-contained `report.html`."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluate import changed_questions
from training.jsonl import plain, read_rows
from training.metrics import paired_difference
from training.report import Example, Table, print_table, run_report
from training.stage import EVALUATION_FILE, PREDICTIONS_FILE

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
HEADLINE = ("recall@1", "recall@5", "recall@20", "exact_match", "f1")
ALIGNMENT = ("preference_accuracy", "preference_accuracy_per_token")  # where pairs were measured
CONTROLS = ("closed_book", "gold", "fused", "marginal", "top1")
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class Measured:
    """One stage's evaluation: means, and one row per question."""

    name: str
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        return self.result["metrics"]

    def column(self, name: str) -> dict[str, float]:
        """A metric by question id; questions without it are left out."""
        return {row["id"]: float(row[name]) for row in self.rows if row.get(name) is not None}


@dataclass
class Findings:
    """Everything measured in one experiment, in the order of its stages."""

    stages: dict[str, Measured] = field(default_factory=dict)
    updates: dict[str, tuple[Measured, Measured]] = field(default_factory=dict)  # stage: before and after the update
    seconds: float = 0.0


def read_measured(name: str, run_dir: Path) -> Measured | None:
    """What a stage left in its run directory; None where it was not evaluated."""
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return Measured(name, result, list(read_rows(run_dir / PREDICTIONS_FILE))) if result["metrics"] else None


def seconds_of(directory: Path) -> float:
    """What an earlier summary says it took; 0 where there is none."""
    path = directory / SUMMARY_FILE
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else 0.0


def summarise(findings: Findings) -> dict[str, Any]:
    """The content of `summary.json`: each stage's means, controls, the update, paired differences of the last stage."""
    summary: dict[str, Any] = {}
    for name, measured in findings.stages.items():
        summary[name] = {key: measured.metrics[key] for key in (*HEADLINE, *ALIGNMENT) if key in measured.metrics}
        for mode in CONTROLS:
            if f"{mode}/exact_match" in measured.metrics:
                summary[name][f"{mode}/exact_match"] = measured.metrics[f"{mode}/exact_match"]
    if findings.stages:
        last = list(findings.stages.values())[-1]
        if "closed_book/exact_match" in last.metrics:
            summary["closed_book"] = {"exact_match": last.metrics["closed_book/exact_match"]}
        others = list(findings.stages.values())[:-1]
        summary["paired"] = {f"{last.name} - {other.name}": paired(last, other) for other in others}
        summary["generations_committed"] = last.result.get("generations_committed", 0)
        summary["blocked_steps"] = last.result.get("blocked_steps", 0)
    for before, after in findings.updates.values():
        summary["swap"] = swap(before, after)
    summary["seconds"] = round(findings.seconds, 1)
    return summary


def paired(a: Measured, b: Measured) -> dict[str, dict[str, float]]:
    """Difference a - b question by question, with its 95% interval, of each headline metric that both have."""
    found = {}
    for name in HEADLINE:
        left, right = a.column(name), b.column(name)
        ids = [id for id in left if id in right]
        if ids:
            mean, low, high = paired_difference(np.array([left[i] for i in ids]), np.array([right[i] for i in ids]))
            found[name] = {"mean": mean, "low": low, "high": high}
    return found


def swap(before: Measured, after: Measured) -> dict[str, float]:
    """Of the questions whose answer changed: share answered anew (`new`), with the former answer (`old`), and how many
    were right before; of the unchanged ones, exact match before and after."""
    changed = changed_questions(before.rows, after.rows)
    ids = {row["id"] for row in changed}
    former = {row["id"]: row for row in before.rows}
    same = [row for row in after.rows if row["id"] in former and row["id"] not in ids]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return {
        "new": mean([row["new"] for row in changed]),
        "old": mean([row["old"] for row in changed]),
        "before": mean([row["before"] for row in changed]),
        "num_changed": len(changed),
        "unchanged_before": mean([former[row["id"]]["exact_match"] for row in same]),
        "unchanged_after": mean([row["exact_match"] for row in same]),
        "recall@1": after.metrics.get("recall@1", float("nan")),
    }


def result_table(findings: Findings, summary: Mapping[str, Any]) -> Table:
    """One row per evaluated stage and control, and what the update did."""
    rows: list[list[Any]] = []
    aligned = [key for key in ALIGNMENT if any(key in measured.metrics for measured in findings.stages.values())]
    for name, measured in findings.stages.items():
        rows.append([name, *(measured.metrics.get(key) for key in (*HEADLINE, *aligned))])
        for mode in CONTROLS:
            if f"{mode}/exact_match" in measured.metrics:
                scores = (measured.metrics[f"{mode}/exact_match"], measured.metrics.get(f"{mode}/f1"))
                rows.append([f"{name}, {mode}", None, None, None, *scores, *(None for _ in aligned)])
    notes = []
    if "swap" in summary:
        values = summary["swap"]
        notes.append(
            f"after the update, without training: new answer {_percent(values['new'])}, former answer "
            f"{_percent(values['old'])} of {values['num_changed']} changed facts "
            f"(right before: {_percent(values['before'])})"
        )
    notes.append(
        f"{summary.get('generations_committed', 0)} index generations committed in the last stage, "
        f"{summary.get('blocked_steps', 0)} steps blocked, {summary['seconds']:.0f} s in all"
    )
    return Table("Held-out questions", ["stage", *HEADLINE, *aligned], rows, notes)


def write_findings(findings: Findings, directory: Path, run_dirs: Mapping[str, Path]) -> dict[str, Any]:
    """Write summary.json and report.html into `directory`; returns the summary. The table is printed."""
    summary = summarise(findings)
    partial = directory / f".{SUMMARY_FILE}"
    partial.write_text(json.dumps(plain(summary), indent=1) + "\n", encoding="utf-8")
    partial.rename(directory / SUMMARY_FILE)
    table = result_table(findings, summary)
    run_report(run_dirs, [table], _examples(findings), directory / REPORT_FILE, title=directory.name)
    print(print_table(table))
    print(f"{directory / SUMMARY_FILE}  {directory / REPORT_FILE}  ({time.strftime('%H:%M:%S')})")
    return summary


def _examples(findings: Findings) -> list[Example]:
    """The first questions, as each stage answered them."""
    if not findings.stages:
        return []
    last = list(findings.stages.values())[-1]
    examples = []
    for row in last.rows[:NUM_EXAMPLES]:
        answers = {
            name: str(other["prediction"])
            for name, measured in findings.stages.items()
            for other in measured.rows
            if other["id"] == row["id"]
        }
        examples.append(Example(row["question"], row["answers"], answers))
    return examples


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
