"""Rewards of sampled answers: a number for (question, answer, gold answers, passages read), larger is better."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from indexing.declare import refuse
from training.metrics import contains_answer, exact_match, f1
from training.objectives.check import REWARD_VALUES
from training.plug_ins import load_function

Reward = Callable[[str, str, Sequence[str], Sequence[str]], float]


def load_reward(name: str) -> Reward:
    """Return the function that `objective.reward` names: exact_match, f1, grounded, `module:function`,
    `file.py:function`.

    `module` is looked for where Python looks, a file where it lies. Raises ValueError, naming the setting.
    """
    match name:
        case "exact_match":
            return lambda question, answer, golds, passages: exact_match(answer, golds)
        case "f1":
            return lambda question, answer, golds, passages: f1(answer, golds)
        case "grounded":
            return lambda question, answer, golds, passages: float(contains_answer(" ".join(passages), [answer]))
    signature = "(question: str, answer: str, golds: Sequence[str], passages: Sequence[str]) -> float"
    return load_function("objective.reward", name, allowed=REWARD_VALUES, signature=signature, num_arguments=4)


def measure(
    name: str, reward: Reward, *, question: str, answer: str, golds: Sequence[str], passages: Sequence[str]
) -> float:
    """Return the `reward` of one answer. Raises ValueError, naming the setting and the question, if it raises or
    returns no finite number."""
    try:
        value = reward(question, answer, golds, passages)
    except Exception as error:
        raised = f"must not raise, but did {type(error).__name__}: {error} (question {question!r}, answer {answer!r})"
        raise refuse("objective.reward", name, raised) from error
    number = math.nan
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, RuntimeError):  # it has no single value
            number = float(value)
    if math.isfinite(number):
        return number
    returned = f"must return a finite number, not {value!r} (question {question!r}, answer {answer!r})"
    raise refuse("objective.reward", name, returned)
