"""Turns the evaluations of a matrix of runs into one table: mean and spread over seeds, and the paired difference to
the baseline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.matrix import Matrix
from cluster.config.settings import Settings
from cluster.results.context_costs import context_table
from cluster.results.findings import Measured, read_measured
from cluster.results.summary import HEADLINE
from indexing.declare import values_of
from training.metrics import paired_difference
from training.reporting.jsonl import plain
from training.reporting.plots import Points, points_svg
from training.reporting.report import Section, Table, print_table, write_report
from training.reporting.tables import table_html

COMPARISON_FILE, REPORT_FILE = "comparison.json", "report.html"
SHOWN = ("recall@1", "exact_match")  # in the table and the plot; the file has every headline metric
Results = Mapping[str, Mapping[int, Measured]]  # by cell and seed


def write_comparison(
    matrix: Matrix,
    base: Settings,
    *,
    folders: Mapping[str, Mapping[int, Path]],
    done: set[Path],
    failures: Mapping[tuple[str, int], str],
    root: Path,
) -> dict[str, Any]:
    """Write comparison.json and report.html into `root` and print the table. Only runs in `done` count. Returns the
    content of the file."""
    results: dict[str, dict[int, Measured]] = {}
    for cell, by_seed in folders.items():
        read = {seed: read_measured(cell, folder) for seed, folder in by_seed.items() if folder in done}
        results[cell] = {seed: measured for seed, measured in read.items() if measured is not None}
    cells = compare_cells(results, matrix.baseline)
    content: dict[str, Any] = {"base_stage": matrix.base_stage, "baseline": matrix.baseline}
    content |= {"seeds": list(matrix.seeds), "cells": cells, "failed": {}}
    for (name, seed), text in failures.items():
        content["failed"].setdefault(name, {})[str(seed)] = text
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".{COMPARISON_FILE}"
    partial.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")
    partial.rename(root / COMPARISON_FILE)
    tables = [comparison_table(cells, matrix, failures)]
    contexts = context_table({cell: next(iter(by_seed.values())) for cell, by_seed in results.items() if by_seed})
    if contexts is not None:
        tables.append(contexts)
    sections = [Section("Results", "\n".join(map(table_html, tables)))]
    sections.append(Section("Mean and spread over seeds", points_svg(points_of(cells, matrix.baseline))))
    sections.append(Section("What the cells are", table_html(changes_table(matrix, base))))
    write_report(root / REPORT_FILE, root.parent.name, sections)
    print(print_table(tables[0]))
    print(f"{root / COMPARISON_FILE}  {root / REPORT_FILE}", flush=True)
    return content


def compare_cells(results: Results, baseline: str) -> dict[str, dict[str, Any]]:
    """Return for each cell: `seeds` that were run; `metrics`: `mean`, `sd` over seeds (None for one) and `per_seed`;
    `paired`: `paired_to` the baseline; `train_seconds`, a mean."""
    found: dict[str, dict[str, Any]] = {}
    for cell, by_seed in results.items():
        metrics = {}
        for name in HEADLINE:
            values = {seed: m.metrics[name] for seed, m in by_seed.items() if name in m.metrics}
            if values:
                metrics[name] = {"mean": float(np.mean(list(values.values()))), "sd": spread(list(values.values()))}
                metrics[name]["per_seed"] = {str(seed): value for seed, value in values.items()}
        seconds = [measured.result.get("train_seconds", 0.0) for measured in by_seed.values()]
        found[cell] = {
            "seeds": list(by_seed),
            "metrics": metrics,
            "paired": paired_to(by_seed, results.get(baseline, {})) if cell != baseline else {},
            "train_seconds": float(np.mean(seconds)) if seconds else None,
        }
    return found


def paired_to(cell: Mapping[int, Measured], baseline: Mapping[int, Measured]) -> dict[str, dict[str, Any]]:
    """Return the difference of a cell to the baseline, question by question with the same seed, over the seeds and
    questions that both have: `mean`; `low` and `high` of its 95% interval, by bootstrap over questions of the seeds'
    mean; `sd` over seeds and `per_seed` means."""
    found: dict[str, dict[str, Any]] = {}
    seeds = [seed for seed in cell if seed in baseline]
    for name in HEADLINE:
        pairs = [(cell[seed].column(name), baseline[seed].column(name)) for seed in seeds]
        pairs = [(left, right) for left, right in pairs if left and right]
        if not pairs or len(pairs) < len(seeds):
            continue
        ids = sorted(set.intersection(*(set(side) for pair in pairs for side in pair)))
        if not ids:
            continue
        left, right = (np.array([[pair[side][id] for id in ids] for pair in pairs]) for side in (0, 1))
        mean, low, high = paired_difference(left.mean(axis=0), right.mean(axis=0))
        per_seed = (left - right).mean(axis=1).tolist()
        found[name] = {"mean": mean, "low": low, "high": high, "sd": spread(per_seed), "num_questions": len(ids)}
        found[name]["per_seed"] = {str(seed): value for seed, value in zip(seeds, per_seed, strict=True)}
    return found


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def comparison_table(
    cells: Mapping[str, Mapping[str, Any]], matrix: Matrix, failures: Mapping[tuple[str, int], str]
) -> Table:
    """Return one row per cell."""
    columns, rows = ["cell", "seeds"], []
    for name in SHOWN:
        columns += [name, "sd", "difference", "95%"]
    for cell, values in cells.items():
        row: list[Any] = [cell, len(values["seeds"])]
        for name in SHOWN:
            metric, paired = values["metrics"].get(name, {}), values["paired"].get(name)
            interval = f"{paired['low']:+.3f} to {paired['high']:+.3f}" if paired else None
            row += [metric.get("mean"), metric.get("sd"), f"{paired['mean']:+.3f}" if paired else None, interval]
        rows.append([*row, values["train_seconds"]])
    notes = [
        f"sd: over {len(matrix.seeds)} seed(s). difference: to {matrix.baseline}, question by question with the same "
        "seed; its interval by bootstrap over questions."
    ]
    notes += [f"failed: {name}, seed {seed}: {text}" for (name, seed), text in failures.items()]
    return Table("Comparison on held-out questions", [*columns, "train s"], rows, notes)


def points_of(cells: Mapping[str, Mapping[str, Any]], baseline: str) -> Points:
    """Return the points of the plot: the metrics of the table, with the baseline."""
    series: dict[str, list[tuple[float, float] | None]] = {}
    for name in SHOWN:
        found = [values["metrics"].get(name) for values in cells.values()]
        if any(found):
            series[name] = [(metric["mean"], metric["sd"] or 0.0) if metric else None for metric in found]
    return Points("held-out questions", list(cells), series, marked=baseline)


def changes_table(matrix: Matrix, base: Settings) -> Table:
    """Return the settings of each cell that differ from those of the base stage."""
    before = values_of(base)
    rows: list[Sequence[str]] = []
    for cell, settings in matrix.cells.items():
        changed = [
            f"{setting}={value}"
            for setting, value in values_of(settings).items()
            if not setting.startswith("run.") and before[setting] != value
        ]
        rows.append([cell, ", ".join(changed) or "nothing"])
    return Table("", ["cell", f"changes to {matrix.base_stage or 'the run'}"], rows)
