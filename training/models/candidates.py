"""Several answers to each question, scored by the system that trains and by its reference in the same way.

Preferences: every answer is scored under each of the K passages, which are read once. Samples: every answer is scored
under the one passage that it was drawn with, so that the cost does not grow with K times the size of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from training.models.generator import Decoded, Generator, ReaderBatch
from training.models.pairs import PairBatch
from training.models.system import RetrievalBatch
from training.objectives.likelihoods import retrieval_log_probs
from training.objectives.preference import Candidates

if TYPE_CHECKING:
    from training.models.system import System


@dataclass
class CandidateBatch(RetrievalBatch):
    """Questions with K passages and `group` answers each. `reader` holds `batch` questions with K passages, or, for
    samples, `batch * group` questions with the passage and the answer of each sample."""

    passage_mask: Tensor  # bool [batch, k]
    answer_ids: Tensor  # int64 [batch, group, tokens]; answers end with end-of-sequence
    answer_mask: Tensor  # bool [batch, group, tokens]: False for padding
    num_trained: int  # answers of a group that get gradient: the first ones
    desirable: Tensor | None = None  # bool [batch]
    drawn: Tensor | None = None  # int64 [batch, group]: which of the K passages a sample read
    rewards: Tensor | None = None  # float32 [batch, group]
    old_log_probs: Tensor | None = None  # float32 [batch, group]
    reference_scores: Tensor | None = None  # float32 [batch, k]
    reference_log_probs: Tensor | None = None  # float32 [batch, group, k or 1, tokens]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        return moved(self, device)

    @property
    def num_tokens(self) -> int:
        """Real tokens that the two encoders and the reader see."""
        encoders = int(self.question_mask.sum()) + 2 * int(self.passage_token_mask.sum())
        return encoders + int(self.answer_mask.sum())


@dataclass
class AskedBatch(RetrievalBatch):
    """Questions with K passages, to be answered by samples."""

    questions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # int64 [batch]: question numbers
    passages: Sequence[np.ndarray] = ()  # passage numbers [batch][up to k]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        return moved(self, device)


def moved(batch: Any, device: torch.device | str) -> Any:
    """A dataclass of tensors with each of them, and its reader, on `device`."""
    values = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    for name, value in values.items():
        if isinstance(value, (ReaderBatch, PairBatch)):
            values[name] = value.to(device)
        elif isinstance(value, Tensor):
            values[name] = value.to(device, non_blocking=True)
    return type(batch)(**values)


def score(system: "System", batch: CandidateBatch) -> Candidates:
    """Scores of fresh encoders and log-probabilities of all answers, beside what the batch knows of the reference."""
    scores = system.scores(batch)
    reading = system.generator.read(batch.reader)
    if batch.drawn is not None:
        drawn = system.generator.per_passage_log_probs(reading, batch.reader)  # [batch * group, 1, tokens]
        log_probs = drawn.unflatten(0, batch.answer_ids.shape[:2])
    else:
        each = []
        for number, answer in enumerate(zip(batch.answer_ids.unbind(1), batch.answer_mask.unbind(1), strict=True)):
            reader = replace(batch.reader, answer_ids=answer[0], answer_mask=answer[1])
            with torch.set_grad_enabled(torch.is_grad_enabled() and number < batch.num_trained):
                each.append(system.generator.per_passage_log_probs(reading, reader))
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


@torch.no_grad()
def prior(system: "System", batch: RetrievalBatch, temperature: float) -> Tensor:
    """log p(z|q), float32 [batch, k]; -inf at padded passages."""
    return retrieval_log_probs(system.scores(batch), batch.reader.passage_mask, temperature)


@torch.no_grad()
def sample(system: "System", reader: ReaderBatch, max_tokens: int, temperature: float) -> Decoded:
    """One sampled answer for each passage of `reader`."""
    return system.generator.write(
        system.generator.read(reader), reader, False, max_tokens, num_beams=1, temperature=temperature
    )


def answer_tensors(generator: Generator, groups: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Token rows [batch][group] to ids int64 [batch, group, tokens] and mask, as this generator ends and cuts them."""
    rows = [row for group in groups for row in group]
    nothing = np.empty(0, dtype=np.int64)
    collated = generator.collate([nothing] * len(rows), [[nothing]] * len(rows), rows)
    shape = (len(groups), len(groups[0]))
    return collated.answer_ids.unflatten(0, shape), collated.answer_mask.unflatten(0, shape)
