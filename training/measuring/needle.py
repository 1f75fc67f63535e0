"""Needle in a haystack: tests whether a generator finds the labelled passage at a given depth of a long prompt.

The haystack is the corpus itself: random other passages, the same ones at every depth, so that a cell of the sweep
differs from its neighbour in nothing but the needle's place (Kamradt 2023 used essays; Liu et al. 2024, "Lost in the
Middle", retrieved passages).
"""

from functools import partial
from typing import Any

import numpy as np

from indexing.declare import refuse
from training.feeding.long_context import LongContext
from training.measuring.evaluate import Evaluator
from training.training_settings import NeedleConfig

SEED = 0  # seed of the sample of questions and of the haystacks, the same for every system


def needle_sweep(evaluator: Evaluator, config: NeedleConfig) -> dict[str, Any]:
    """Return `lengths`, `depths`, and `exact_match` [lengths][depths] over the same `num_questions` questions.
    Collective. Raises ValueError as `check_needle` does."""
    contexts, gold = check_needle(evaluator, config)
    numbers = np.array(list(gold))
    found: list[list[float]] = []
    for length, context in zip(config.lengths, contexts, strict=True):
        found.append([])
        for depth in config.depths:
            values = evaluator.exact_match(numbers, partial(_haystack, context, gold, depth), length)
            found[-1].append(float(np.mean(list(values.values()))))
            evaluator.progress(f"needle: {length} tokens, depth {depth:g}: exact match {found[-1][-1]:.2f}")
    return {
        "lengths": list(config.lengths),
        "depths": list(config.depths),
        "num_questions": len(numbers),
        "exact_match": found,
    }


def check_needle(evaluator: Evaluator, config: NeedleConfig) -> tuple[list[LongContext], dict[int, np.ndarray]]:
    """Return what chooses the prompts of each length, and the labelled passages of each sampled question. Raises
    ValueError for a length that the generator does not take or a needle does not fit in, and for a split without
    labelled passages."""
    questions = evaluator.questions
    labelled = [number for number in range(len(questions)) if len(questions.gold_rows(number))]
    if not labelled:
        raise ValueError("evaluation.needle: no question of the split has a labelled passage to look for")
    order = np.random.default_rng(SEED).permutation(np.array(labelled))
    gold = {int(number): questions.gold_rows(int(number)) for number in np.sort(order[: config.num_questions or None])}
    contexts = []
    for length in config.lengths:
        context = evaluator.context_of(length, "evaluation.needle.lengths")
        needed = max(context.smallest(number, int(rows[0])) for number, rows in gold.items())
        if needed > length:
            allowed = f"must be at least {needed}, which a question with its labelled passage takes"
            raise refuse("evaluation.needle.lengths", length, allowed)
        contexts.append(context)
    return contexts, gold


def _haystack(context: LongContext, gold: dict[int, np.ndarray], depth: float, number: int) -> np.ndarray:
    labelled = gold[number]
    return context.bury(
        number, int(labelled[0]), labelled=labelled, depth=depth, rng=np.random.default_rng([SEED, number])
    )
