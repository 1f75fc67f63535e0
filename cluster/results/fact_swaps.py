"""Measures the effect of a swap of facts: the same weights, asked before and after the corpus was encoded anew."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.results.findings import Measured
from training.metrics import changed_questions
from training.reporting.report import Table


def swap(before: Measured, after: Measured) -> dict[str, float]:
    """Return shares; NaN if no question is left to count.

    Of the `num_changed` questions whose answer changed: answered anew (`new`), with the former answer (`old`), right
    before (`before`), and with a passage that states the new fact among those that were read (`found`). Of the
    `num_found` of these: answered anew (`followed`); the same of those that were right before too (`followed_known`),
    which leaves out what the generator could not read either way. Of the `num_unchanged` ones: exact match before and
    after.
    """
    changed = changed_questions(before.rows, after.rows)
    ids = {row["id"] for row in changed}
    former = {row["id"]: row for row in before.rows}
    same = [row for row in after.rows if row["id"] in former and row["id"] not in ids and "exact_match" in row]
    judged = [row for row in changed if row.get("gold_in_k") is not None]
    found = [row for row in judged if row["gold_in_k"]]
    known = [row for row in found if row["before"]]
    return {
        "new": _mean([row["new"] for row in changed]),
        "old": _mean([row["old"] for row in changed]),
        "before": _mean([row["before"] for row in changed]),
        "num_changed": len(changed),
        "found": _mean([row["gold_in_k"] for row in judged]),
        "num_found": len(found),
        "followed": _mean([row["new"] for row in found]),
        "followed_known": _mean([row["new"] for row in known]),
        "unchanged_before": _mean([former[row["id"]]["exact_match"] for row in same]),
        "unchanged_after": _mean([row["exact_match"] for row in same]),
        "num_unchanged": len(same),
        "recall@1": after.metrics.get("recall@1", float("nan")),
    }


def update_table(updates: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row per stage: `swap` of each."""
    columns = {
        "changed": "num_changed",
        "right before": "before",
        "new answer": "new",
        "former answer": "old",
        "found": "found",
        "new if found": "followed",
        "and known before": "followed_known",
        "unchanged": "num_unchanged",
        "right before ": "unchanged_before",
        "right after": "unchanged_after",
    }
    rows = [[name, *(_shown(values[key]) for key in columns.values())] for name, values in updates.items()]
    notes = ["The same weights; the corpus was updated and encoded anew, nothing was trained."]
    notes += [f"{name}: no answer changed between the two" for name, v in updates.items() if not v["num_changed"]]
    return Table("After the update", ["stage", *columns], rows, notes)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _shown(value: float) -> Any:
    return None if value != value else value
