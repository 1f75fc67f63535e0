"""Batches that collators make for one training step: tensors of questions, passages and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from training.models.generators.generator import GeneratorBatch
from training.models.text.pairs import PairBatch

Moved = TypeVar("Moved")


@dataclass
class ContrastBatch:
    """Query spans and the passages they were cut from."""

    query_ids: Tensor  # int64 [batch, tokens]
    query_mask: Tensor  # bool
    passage_ids: Tensor  # int64 [batch, tokens]
    passage_token_mask: Tensor  # bool
    passage_numbers: Tensor  # int64 [batch]: equal numbers are one passage, never a negative of itself

    def to(self: Moved, device: torch.device | str) -> Moved:
        """Return the same batch on `device`."""
        return moved(self, device)

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens that the encoders see."""
        return int(self.query_mask.sum()) + int(self.passage_token_mask.sum())


@dataclass
class RetrievalBatch:
    """Questions with their K retrieved passages, as both models read them."""

    question_ids: Tensor  # int64 [batch, tokens], retriever's tokeniser
    question_mask: Tensor  # bool
    passage_ids: Tensor  # int64 [batch * k, tokens]; no rows where the vectors are known
    passage_token_mask: Tensor  # bool
    generator_batch: GeneratorBatch
    # float32 [batch, k, dim]: vectors of a passage encoder that does not change
    passage_vectors: Tensor | None = field(default=None, kw_only=True)
    # float32 [batch, k]: normalised lexical scores, where the retriever weighs them
    lexical: Tensor | None = field(default=None, kw_only=True)
    pairs: PairBatch | None = field(default=None, kw_only=True)  # batch * k rows, where a re-ranker reads them
    contrast: ContrastBatch | None = field(default=None, kw_only=True)  # pairs of a contrastive task in the mixture
    contrast_share: float = field(default=0.0, kw_only=True)  # share of the loss

    def to(self: Moved, device: torch.device | str) -> Moved:
        """Return the same batch on `device`."""
        return moved(self, device)

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens that encoders, re-ranker and generator see."""
        answers = int(self.generator_batch.answer_mask.sum())
        pairs = 0 if self.pairs is None else int(self.pairs.mask.sum())
        contrast = 0 if self.contrast is None else self.contrast.num_tokens
        return int(self.question_mask.sum()) + 2 * int(self.passage_token_mask.sum()) + answers + pairs + contrast


@dataclass(kw_only=True)
class CandidateBatch(RetrievalBatch):
    """Questions with K passages and `group` answers each. `generator_batch` holds `batch` questions with K passages;
    for samples it holds `batch * group` questions with the passage and the answer of each sample."""

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

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens that encoders and generator see."""
        encoders = int(self.question_mask.sum()) + 2 * int(self.passage_token_mask.sum())
        return encoders + int(self.answer_mask.sum())


@dataclass
class AskedBatch(RetrievalBatch):
    """Questions with K passages, to be answered by samples."""

    questions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # int64 [batch]: question numbers
    passages: Sequence[np.ndarray] = ()  # passage numbers [batch][up to k]


def moved(batch: Any, device: torch.device | str) -> Any:
    """Return the dataclass `batch` with its tensors and the batches in it on `device`."""
    values = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    for name, value in values.items():
        if isinstance(value, (GeneratorBatch, PairBatch, ContrastBatch)):
            values[name] = value.to(device)
        elif isinstance(value, Tensor):
            values[name] = value.to(device, non_blocking=True)
    return type(batch)(**values)
