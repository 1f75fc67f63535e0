"""Reads what stages measured back from their run directories."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.measuring.measures import PREDICTIONS_FILE
from training.reporting.jsonl import read_rows
from training.stage import EVALUATION_FILE


@dataclass(frozen=True)
class Measured:
    """The evaluation of one stage: means, and one row per question."""

    name: str
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        return self.result["metrics"]

    def column(self, name: str) -> dict[str, float]:
        """Return a metric by question id; questions without it are left out."""
        return {row["id"]: float(row[name]) for row in self.rows if row.get(name) is not None}


@dataclass
class Findings:
    """All measurements of one experiment, in the order of its stages."""

    stages: dict[str, Measured] = field(default_factory=dict)
    updates: dict[str, tuple[Measured, Measured]] = field(default_factory=dict)  # stage -> before and after the update
    seconds: float = 0.0


def read_measured(name: str, run_dir: Path) -> Measured | None:
    """Return the evaluation in a run directory; None if the stage was not evaluated."""
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return Measured(name, result, list(read_rows(run_dir / PREDICTIONS_FILE))) if result["metrics"] else None
