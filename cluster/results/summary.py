"""Writes the results of an experiment: one table, `summary.json`, and the self-contained `report.html`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.results.context_costs import context_table, needle_sections
from cluster.results.fact_swaps import swap, update_table
from cluster.results.findings import Findings, Measured
from training.metrics import paired_difference
from training.reporting.jsonl import plain
from training.reporting.report import Example, Table, print_table, run_report

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
HEADLINE = ("recall@1", "recall@5", "recall@20", "exact_match", "f1")
FURTHER = ("accuracy", "refusal_unanswerable", "refusal_answerable", "held_out/log_likelihood", "held_out/loss")
ALIGNMENT = ("preference_accuracy", "preference_accuracy_per_token")  # if pairs were measured
CONTROLS = ("closed_book", "gold", "long", "fused", "marginal", "top1")


def seconds_of(directory: Path) -> float:
    """Return the seconds that an earlier summary states; 0 if there is none."""
    path = directory / SUMMARY_FILE
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else 0.0


def summarise(findings: Findings) -> dict[str, Any]:
    """Return the content of `summary.json`: each stage's means, controls, the update, paired differences of the last
    stage."""
    summary: dict[str, Any] = {}
    for name, measured in findings.stages.items():
        names = (*HEADLINE, *FURTHER, *ALIGNMENT)
        summary[name] = {key: measured.metrics[key] for key in names if key in measured.metrics}
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
    for name, (before, after) in findings.updates.items():
        summary["swap"] = swap(before, after)  # of the last stage
        summary.setdefault("updates", {})[name or "run"] = summary["swap"]
    costs = {name: measured.result["costs"] for name, measured in findings.stages.items() if "costs" in measured.result}
    if costs:
        summary["costs"] = costs
    summary["seconds"] = round(findings.seconds, 1)
    return summary


def paired(a: Measured, b: Measured) -> dict[str, dict[str, float]]:
    """Return the difference a - b question by question, with its 95% interval, of each headline metric that both
    have."""
    found = {}
    for name in HEADLINE:
        left, right = a.column(name), b.column(name)
        ids = [id for id in left if id in right]
        if ids:
            mean, low, high = paired_difference(np.array([left[i] for i in ids]), np.array([right[i] for i in ids]))
            found[name] = {"mean": mean, "low": low, "high": high}
    return found


def result_table(findings: Findings, summary: Mapping[str, Any]) -> Table:
    """Return one row per evaluated stage and control, and the effect of the update."""
    rows: list[list[Any]] = []
    aligned = [key for key in ALIGNMENT if any(key in measured.metrics for measured in findings.stages.values())]
    for name, measured in findings.stages.items():
        rows.append([name, *(measured.metrics.get(key) for key in (*HEADLINE, *aligned))])
        for mode in CONTROLS:
            if f"{mode}/exact_match" in measured.metrics:
                scores = (measured.metrics[f"{mode}/exact_match"], measured.metrics.get(f"{mode}/f1"))
                rows.append([f"{name}, {mode}", None, None, None, *scores, *(None for _ in aligned)])
    notes = []
    for name, measured in findings.stages.items():
        further = [f"{key} {measured.metrics[key]:.3f}" for key in FURTHER if key in measured.metrics]
        if further:
            notes.append(f"{name}: {', '.join(further)}")
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


def write_findings(
    findings: Findings, directory: Path, run_dirs: Mapping[str, Path], *, num_examples: int
) -> dict[str, Any]:
    """Write summary.json and report.html into `directory`, print the table, and return the summary. The report shows
    `num_examples` questions with their answers (`evaluation.examples`)."""
    summary = summarise(findings)
    partial = directory / f".{SUMMARY_FILE}"
    partial.write_text(json.dumps(plain(summary), indent=1) + "\n", encoding="utf-8")
    partial.rename(directory / SUMMARY_FILE)
    tables = [result_table(findings, summary)]
    if "updates" in summary:
        tables.append(update_table(summary["updates"]))
    contexts = context_table(findings.stages)
    if contexts is not None:
        tables.append(contexts)
    needles = needle_sections(findings.stages)
    examples, out = _examples(findings, num_examples), directory / REPORT_FILE
    run_report(run_dirs, tables, examples=examples, out=out, title=directory.name, more=needles)
    print("\n\n".join(print_table(table) for table in tables))
    print(f"{directory / SUMMARY_FILE}  {directory / REPORT_FILE}  ({time.strftime('%H:%M:%S')})")
    return summary


def _examples(findings: Findings, number: int) -> list[Example]:
    """Return the first questions, at most `number`, with the answers of each stage."""
    if not findings.stages:
        return []
    last = list(findings.stages.values())[-1]
    examples = []
    for row in last.rows[:number]:
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
