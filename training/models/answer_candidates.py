"""Score several answers to each question; the system that trains and its reference do it in the same way.

For preferences, every answer is scored under each of the K passages, which are read once. For samples, every answer is
scored under the one passage that it was drawn with, so that the cost does not grow with K times the size of the group.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.models.generators.generator import Generator
from training.models.model_inputs import CandidateBatch
from training.objectives.preference import Candidates


def score_answers(generator: Generator, scores: Tensor, batch: CandidateBatch) -> Candidates:
    """Return the log-probabilities of all answers, with the passages' `scores` [batch, k] and the reference's scores
    and log-probabilities that the batch holds."""
    reading = generator.read(batch.generator_batch)
    if batch.drawn is not None:
        drawn = generator.per_passage_log_probs(reading, batch.generator_batch)  # [batch * group, 1, tokens]
        log_probs = drawn.unflatten(0, batch.answer_ids.shape[:2])
    else:
        each = []
        for number, answer in enumerate(zip(batch.answer_ids.unbind(1), batch.answer_mask.unbind(1), strict=True)):
            inputs = replace(batch.generator_batch, answer_ids=answer[0], answer_mask=answer[1])
            with torch.set_grad_enabled(torch.is_grad_enabled() and number < batch.num_trained):
                each.append(generator.per_passage_log_probs(reading, inputs))
        log_probs = torch.stack(each, dim=1)
    return Candidates(
        scores=scores,
        passage_mask=batch.passage_mask,
        log_probs=log_probs,
        log_probs_mask=batch.answer_mask,
        reference_scores=batch.reference_scores,
        reference_log_probs=batch.reference_log_probs,
        desirable=batch.desirable,
        drawn=batch.drawn,
        rewards=batch.rewards,
        old_log_probs=batch.old_log_probs,
    )


def answer_tensors(generator: Generator, groups: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Return token rows [batch][group] as ids int64 [batch, group, tokens] and mask, ended and cut by `generator`."""
    rows = [row for group in groups for row in group]
    nothing = np.empty(0, dtype=np.int64)
    collated = generator.collate([nothing] * len(rows), [[nothing]] * len(rows), rows)
    shape = (len(groups), len(groups[0]))
    return collated.answer_ids.unflatten(0, shape), collated.answer_mask.unflatten(0, shape)
