"""The system asks a generator to read passages once, then score or write answers from them.

A generator sees K passages per question in two ways: one passage at a time (`per_passage_log_probs`, axis order
`batch, k, tokens`) and all of them fused (`fused_log_probs`, `batch, tokens`). Both start from the same `read`, so
that an encoder-decoder encodes each passage once whatever the objective needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class GeneratorBatch:
    """Tensors that a generator made from token rows; subclasses add their own. Answers end with end-of-sequence."""

    answer_ids: Tensor  # int64 [batch, tokens], padded with 0; tokens may be 0 when only writing
    answer_mask: Tensor  # bool [batch, tokens]
    passage_mask: Tensor  # bool [batch, k]: False for a padded passage

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in values.items()}
        return type(self)(**moved)


@dataclass
class Decoded:
    """Written answers: `tokens[i]` without special tokens, and the log-probability of the whole answer."""

    tokens: list[list[int]]
    log_probs: Tensor  # float32 [len(tokens)]


Batch = TypeVar("Batch", bound=GeneratorBatch)
Reading = TypeVar("Reading")


class Generator(nn.Module, ABC, Generic[Batch, Reading]):
    """A model that reads passages and writes answers; `Batch` holds its inputs, `Reading` what `read` returns."""

    end_id: int  # end-of-sequence, which every answer ends with

    @abstractmethod
    def collate(
        self,
        questions: Sequence[np.ndarray],
        passages: Sequence[Sequence[np.ndarray]],
        answers: Sequence[np.ndarray] | None,
    ) -> Batch:
        """Token rows to CPU tensors: question rows [batch], passage rows [batch][k] (a row may be empty: closed book;
        shorter lists than the longest are padded and masked), answer rows [batch] without end-of-sequence."""

    @abstractmethod
    def read(self, batch: Batch) -> Reading:
        """Return what is computed once per batch and shared by all scoring and writing (encoder states); may be
        None."""

    @abstractmethod
    def per_passage_log_probs(self, reading: Reading, batch: Batch) -> Tensor:
        """float32 [batch, k, tokens]: log P(y_t | y_<t, q, z_k), 0 at padding."""

    @abstractmethod
    def fused_log_probs(self, reading: Reading, batch: Batch, passage_bias: Tensor | None = None) -> Tensor:
        """float32 [batch, tokens]: log P(y_t | y_<t, q, z_1..K), 0 at padding. `passage_bias` [batch, k], usually
        log p(z|q), is added to the attention logits of each passage's tokens, with gradient. Raises ValueError where
        the architecture cannot take a bias."""

    @abstractmethod
    def null_log_probs(self, reading: Reading, batch: Batch) -> Tensor:
        """float32 [batch, tokens]: log P(y_t | y_<t, q), read closed book, as one empty passage; 0 at padding."""

    @abstractmethod
    def left_out_log_probs(self, reading: Reading, batch: Batch) -> Tensor:
        """float32 [batch, k, tokens]: `fused_log_probs` as if passage k were not there, 0 at padding; closed book for a
        question of one passage. After a fused pass over the same `reading` it may use its projections again, without
        gradient. What stands at a padded passage is arbitrary and finite. Raises ValueError where the kernel of the
        attention cannot leave tokens out."""

    @abstractmethod
    def fused_with_attention(self, reading: Reading, batch: Batch) -> tuple[Tensor, Tensor]:
        """`fused_log_probs`, and what the answer's tokens take from each passage, float32 [batch, k] without gradient:
        attention probability times the norm of the value vector, averaged over heads, summed over layers, answer
        tokens and the passage's tokens; 0 for a padded passage. Raises ValueError where nothing attends."""

    def check_attention(self, objective: str) -> None:
        """Raises ValueError, naming `objective`, where `fused_with_attention` cannot work."""

    @abstractmethod
    def write(
        self,
        reading: Reading,
        batch: Batch,
        *,
        fused: bool,
        max_tokens: int,
        num_beams: int,
        passage_bias: Tensor | None = None,
        temperature: float = 0.0,
    ) -> Decoded:
        """Greedy (num_beams 1) or beam search; with a `temperature` above 0 tokens are drawn, one beam. fused: one
        answer per question, `batch` of them; otherwise one per passage, `batch * k`, question by question. log_probs
        are unnormalised sums over the written tokens and end-of-sequence, at temperature 1."""
