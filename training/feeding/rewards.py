"""Rewards of sampled answers: a number for (question, answer, gold answers, passages read), larger is better."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from training.metrics import contains_answer, exact_match, f1

Reward = Callable[[str, str, Sequence[str], Sequence[str]], float]


def load_reward(name: str) -> Reward:
    """The function that `objective.reward` names: exact_match, f1, grounded, `module:function`, `file.py:function`.

    `module` is looked for where Python looks, a file where it lies. Raises ValueError that names the setting.
    """
    match name:
        case "exact_match":
            return lambda question, answer, golds, passages: exact_match(answer, golds)
        case "f1":
            return lambda question, answer, golds, passages: f1(answer, golds)
        case "grounded":
            return lambda question, answer, golds, passages: float(contains_answer(" ".join(passages), [answer]))
    place, _, attribute = name.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # anything may happen in code that is not ours
        raise ValueError(
            f"objective.reward={name!r} cannot be loaded: {type(error).__name__}: {error}; allowed are exact_match, "
            "f1, grounded, module:function, path/to/file.py:function"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"objective.reward={name!r}: {place} has no function {attribute!r}")
    return cast(Reward, function)


def measure(
    name: str, reward: Reward, *, question: str, answer: str, golds: Sequence[str], passages: Sequence[str]
) -> float:
    """`reward` of one answer. Raises ValueError that names the setting and the question when it raises, or returns what
    is no finite number."""
    try:
        value = reward(question, answer, golds, passages)
    except Exception as error:
        raise ValueError(
            f"objective.reward={name!r} raised {type(error).__name__}: {error} (question {question!r}, answer "
            f"{answer!r})"
        ) from error
    number = math.nan
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, RuntimeError):  # what has no one value
            number = float(value)
    if math.isfinite(number):
        return number
    raise ValueError(
        f"objective.reward={name!r} returned {value!r}, needed is a finite number (question {question!r}, answer "
        f"{answer!r})"
    )


def _module_of_file(path: Path) -> object:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"tandem_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
