"""Every metric is declared once, with a unit and a meaning. `tests/training/conftest.py` looks at the stages' files."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.helpers.metric_names import DECLARED, undeclared
from training.reporting.metric_keys import METRICS

ROOT = Path(__file__).resolve().parents[3]
PREFIXES = tuple(sorted({key.split("/")[0] for key in METRICS if "/" in key}))
KEY = re.compile(rf"(?:{'|'.join(PREFIXES)})/[a-z_0-9@]+")


def keys_in_code() -> set[str]:
    """String literals of training/ that look like a metric key."""
    found: set[str] = set()
    for path in (ROOT / "training").rglob("*.py"):
        if path.name != "metric_keys.py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {text for text in found if KEY.fullmatch(text) and not text.endswith("_")}  # "_": the beginning of a key


def test_every_key_of_the_code_is_declared():
    assert {key for key in keys_in_code() if not DECLARED.fullmatch(key)} == set()


def test_every_declared_key_of_a_step_is_in_the_code():
    built = (
        "objective/",
        "optim/grad_norm_",
        "optim/lr_",
        "time/",
        "drift/",
        "eval/",
    )  # put together from a name at run time
    assert {key for key in METRICS if "/" in key and not key.startswith(built)} <= keys_in_code()


@pytest.mark.parametrize("key", METRICS)
def test_a_key_has_a_unit_and_a_meaning(key: str):
    unit, meaning = METRICS[key]
    assert unit
    assert len(meaning.split()) > 1
    assert not key.endswith("_s") or unit == "s" or key.endswith("_per_s")
    assert not key.endswith("_steps") or unit in ("steps", "number")


def test_keys_with_names_in_them_are_found():
    known = (
        "eval/dev/recall@5",
        "eval/test/closed_book/f1",
        "eval/test/f1",
        "eval/held_out/inverse_cloze/log_likelihood",
    )
    assert all(DECLARED.fullmatch(key) for key in known)
    assert not DECLARED.fullmatch("eval/test/recall@K")
    assert not DECLARED.fullmatch("loss/other")


def test_a_file_with_an_undeclared_key_is_noticed(tmp_path: Path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/total": 1.0, "loss/new": 2.0}))
    assert undeclared(tmp_path) == {"loss/new"}
