"""A generator reads passages once, and then scores or writes answers from them.

A generator sees K passages per question in two ways: one passage at a time (`per_passage_log_probs`, axis order
`batch, k, tokens`) and all of them fused (`fused_log_probs`, `batch, tokens`). Both start from the same `read`, so
that an encoder-decoder encodes each passage once whatever the objective needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Moved = TypeVar("Moved", bound="GeneratorBatch")


@dataclass
class GeneratorBatch:
    """Holds tensors that a generator made from token rows; each kind adds more. Answers end with end-of-sequence."""

    answer_ids: Int[Tensor, "batch tokens"]  # padded with 0; tokens may be 0 if answers are only written
    answer_mask: Bool[Tensor, "batch tokens"]
    passage_mask: Bool[Tensor, "batch k"]  # False for a padded passage

    def to(self: Moved, device: torch.device | str) -> Moved:
        """Return the same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in values.items()}
        return type(self)(**moved)


@dataclass
class Decoded:
    """Holds written answers: `tokens[i]` without special tokens, and the log-probability of the whole answer."""

    tokens: list[list[int]]
    log_probs: Float[Tensor, " answers"]  # one for each of `tokens`


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
        """Make CPU tensors of question rows [batch], passage rows [batch][k] (a row may be empty: closed book; shorter
        lists than the longest are padded and masked), and answer rows [batch] without end-of-sequence."""

    @abstractmethod
    def read(self, batch: Batch) -> Reading:
        """Return what is computed once per batch and shared by all scoring and writing (encoder states); may be
        None."""

    @abstractmethod
    def per_passage_log_probs(self, reading: Reading, batch: Batch) -> Float[Tensor, "batch k tokens"]:
        """Return log P(y_t | y_<t, q, z_k), float32 [batch, k, tokens], 0 at padding."""

    @abstractmethod
    def fused_log_probs(
        self, reading: Reading, batch: Batch, passage_bias: Float[Tensor, "batch k"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """Return log P(y_t | y_<t, q, z_1..K), float32 [batch, tokens], 0 at padding. `passage_bias` [batch, k],
        usually log p(z|q), is added to the attention logits of each passage's tokens, with gradient. Raises ValueError
        if the architecture cannot take a bias."""

    @abstractmethod
    def null_log_probs(self, reading: Reading, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """Return log P(y_t | y_<t, q) of one empty passage (closed book), float32 [batch, tokens]; 0 at padding."""

    @abstractmethod
    def left_out_log_probs(self, reading: Reading, batch: Batch) -> Float[Tensor, "batch k tokens"]:
        """Return `fused_log_probs` without passage k, float32 [batch, k, tokens], 0 at padding; closed book for a
        question of one passage. Without gradient, it may reuse the projections of a fused pass over the same `reading`.
        The values of a padded passage are arbitrary and finite. Raises ValueError if the attention kernel cannot leave
        tokens out."""

    @abstractmethod
    def fused_with_attention(
        self, reading: Reading, batch: Batch
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch k"]]:
        """Return `fused_log_probs`, and the attention that the answer pays to each passage, float32 [batch, k] without
        gradient: probability times the norm of the value vector, averaged over heads, summed over layers, answer
        tokens and the passage's tokens; 0 for a padded passage. Raises ValueError if nothing attends."""

    def check_attention(self, objective: str) -> None:
        """Raise ValueError, naming `objective`, if `fused_with_attention` cannot work."""

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
        """Write answers by greedy search (num_beams 1) or beam search; with a `temperature` above 0 and one beam,
        tokens are drawn. If `fused`, there is one answer per question; otherwise one per passage, `batch * k`, question
        by question. log_probs are unnormalised sums over the written tokens and end-of-sequence, at temperature 1."""
