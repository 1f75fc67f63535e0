"""Metrics of the user, over all answers of a split."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from indexing.declare import refuse
from training.plug_ins import load_function

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
SETTING = "evaluation.metrics"
SIGNATURE = "(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> float"
TAKEN = (  # names of the project's metrics, without the cut-offs behind an @
    *("recall", "qrel_recall", "answer_recall", "ndcg", "mrr", "gold_in_k", "index_version", "exact_match", "f1"),
    *("log_likelihood", "accuracy", "old_exact_match", "refusal_answerable", "refusal_unanswerable"),
    *("preference_accuracy", "preference_margin", "loss", "prediction"),
)


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Return the functions that `evaluation.metrics` names, by function name.

    Each gets the answers to the questions of a split and the gold answers of each, and returns a number. Raises
    ValueError if one does not exist or takes other arguments, and for a name that another metric has.
    """
    found: dict[str, Metric] = {}
    for name in names:
        key = name.rpartition(":")[2]
        allowed = "module:function or path/to/file.py:function"
        function = load_function(SETTING, name, allowed=allowed, signature=SIGNATURE, num_arguments=2)
        if key in TAKEN or key in found:
            raise refuse(SETTING, name, f"must have a function name that no other metric has, but {key} is taken")
        found[key] = function
    return found


def measured(
    metrics: Mapping[str, Metric], rows: Sequence[Mapping[str, Any]], modes: Sequence[str]
) -> dict[str, float]:
    """Return each metric over the questions that have a gold answer; those of a mode in `modes` as `mode/name`. Raises
    ValueError where a function raises, or returns no finite number."""
    known = [row for row in rows if row["answers"]]
    golds = [row["answers"] for row in known]
    found: dict[str, float] = {}
    for prefix in ("", *(f"{mode}/" for mode in modes)) if known else ():
        predictions = [row[f"{prefix}prediction"] for row in known]
        for name, metric in metrics.items():
            try:
                value = float(metric(predictions, golds))
            except Exception as error:  # the user's code may raise anything
                raise refuse(SETTING, name, f"must not raise, but did {type(error).__name__}: {error}") from error
            if not math.isfinite(value):
                raise refuse(SETTING, name, f"must return a finite number, not {value}")
            found[f"{prefix}{name}"] = value
    return found
