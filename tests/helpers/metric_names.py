"""Compares the keys of metrics.jsonl with the declarations in `training/reporting/metric_keys.py`."""

import json
import re
from pathlib import Path

from training.reporting.metric_keys import METRICS

PARTS = {"SPLIT": "[^/]+", "MODE/": "([a-z0-9_]+/)?", "TASK": "[a-z_]+", "K": r"\d+", "NAME": ".+"}
OF_THE_USER = "eval/SPLIT/MODE/NAME"  # would match every key of an evaluation


def pattern_of(key: str) -> str:
    """A declared key as a regular expression."""
    return re.sub(r"SPLIT|MODE/|TASK|(?<=@)K|NAME", lambda found: PARTS[found.group()], re.escape(key))


DECLARED = re.compile("|".join(f"(?:{pattern_of(key)})" for key in METRICS if key != OF_THE_USER))


def undeclared(folder: Path) -> set[str]:
    """Keys of every metrics.jsonl below `folder` that are not declared."""
    rows = [line for path in folder.rglob("metrics.jsonl") for line in path.read_text("utf-8").splitlines()]
    return {key for row in rows for key in json.loads(row) if not DECLARED.fullmatch(key)}
