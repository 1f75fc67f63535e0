"""Rewards by name, by module and by file; what they may not return."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training.feeding.rewards import load_reward, measure

QUESTION, GOLDS, PASSAGES = "where was Ada born?", ["Rome", "the city of Rome"], ["Ada was born in Rome in 1815."]


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("exact_match", "rome.", 1.0),
        ("exact_match", "Oslo", 0.0),
        ("f1", "city of Oslo", 2 / 3),
        ("grounded", "born in Rome", 1.0),
        ("grounded", "Oslo", 0.0),
        ("grounded", "", 0.0),
    ],
)
def test_built_in_rewards(name: str, answer: str, expected: float) -> None:
    assert measure(
        name, load_reward(name), question=QUESTION, answer=answer, golds=GOLDS, passages=PASSAGES
    ) == pytest.approx(expected)


def test_a_function_of_a_module_and_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def judge(question, answer, golds, passages):\n    return len(answer) + len(passages)\n")
    name = f"{file}:judge"
    assert measure(name, load_reward(name), question=QUESTION, answer="four", golds=GOLDS, passages=PASSAGES) == 5.0
    module = "tests.helpers.preference_files:variety"
    assert measure(module, load_reward(module), question=QUESTION, answer="aab", golds=GOLDS, passages=PASSAGES) > 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere.at.all:judge",
            "objective.reward=nowhere.at.all:judge: must .* cannot be loaded: ModuleNotFoundError",
        ),
        ("nowhere.py:judge", r"cannot be loaded: FileNotFoundError: .*nowhere.py does not exist"),
        ("math:judge", "objective.reward=math:judge: must be a function: math has no 'judge'"),
        ("math:pi", "must be a function: math has no 'pi'"),
    ],
)
def test_what_cannot_be_loaded(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.array(0.5), torch.tensor([0.5])])
def test_numbers_of_every_kind(value: float) -> None:
    assert measure(
        "x:y", lambda *_: value, question=QUESTION, answer="a", golds=GOLDS, passages=PASSAGES
    ) == pytest.approx(float(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1.0", [1.0, 2.0], np.array([1.0, 2.0]), {}])
def test_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match=r"objective.reward=x:y: must return a finite number, not"):
        measure("x:y", lambda *_: value, question=QUESTION, answer="a", golds=GOLDS, passages=PASSAGES)


def test_an_exception_is_told_with_the_question() -> None:
    def judge(*_: object) -> float:
        raise KeyError("score")

    with pytest.raises(
        ValueError, match=r"objective.reward=x:y: must not raise, .* KeyError: 'score' .*question 'where"
    ):
        measure("x:y", judge, question=QUESTION, answer="a", golds=GOLDS, passages=PASSAGES)
