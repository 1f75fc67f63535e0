"""Collate answers, compute token log-probabilities and score written answers, for all pretrained generators."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from training.models.text.packing import pad_rows


def collate_answers(
    answers: Sequence[np.ndarray] | None, num_questions: int, end_id: int
) -> tuple[Int[Tensor, "{num_questions} tokens"], Bool[Tensor, "{num_questions} tokens"]]:
    """Return answers, each ended by `end_id`, as int64 ids [batch, tokens] padded with 0 and bool mask; None has no
    tokens."""
    if answers is None:
        return torch.zeros(num_questions, 0, dtype=torch.int64), torch.zeros(num_questions, 0, dtype=torch.bool)
    return pad_rows([np.append(answer, end_id) for answer in answers], 0)


def collate_passages(
    passages: Sequence[Sequence[np.ndarray]],
) -> tuple[list[list[np.ndarray]], Bool[Tensor, "batch k"]]:
    """Return passage rows filled up with empty rows to the longest list, and bool [batch, k], True for a real row."""
    k = max(len(rows) for rows in passages)
    mask = torch.tensor([[i < len(rows) for i in range(k)] for rows in passages], dtype=torch.bool)
    empty = np.empty(0, dtype=np.int64)
    return [[*rows, *[empty] * (k - len(rows))] for rows in passages], mask.view(len(passages), k)


def token_log_probs(
    logits: Float[Tensor, "n t vocabulary"], targets: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"]
) -> Float[Tensor, "n t"]:
    """Return the log-probabilities float32 [n, t] of `targets` [n, t] under `logits` [n, t, vocabulary]; 0 outside
    `mask`. A picked logit minus a logsumexp keeps no second tensor of the vocabulary's size for float32 logits."""
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).to(torch.float32)
    return (picked - logits.to(torch.float32).logsumexp(dim=-1)).masked_fill(~mask, 0.0)


def written_rows(
    generated: Int[Tensor, "n t"], end_id: int, max_tokens: int
) -> tuple[list[list[int]], Int[Tensor, "n written"], Bool[Tensor, "n written"]]:
    """Return generated ids [n, t] (prompt and start token removed) as rows without end-of-sequence, at most
    `max_tokens` long, and as targets with mask. Targets have the end if it was written: an unfinished row is scored as
    it stands."""
    rows: list[list[int]] = []
    targets: list[np.ndarray] = []
    for row in generated.tolist():
        ended = end_id in row[: max_tokens + 1]
        tokens = row[: row.index(end_id)] if ended else row[:max_tokens]
        rows.append(tokens)
        targets.append(np.array([*tokens, end_id] if ended else tokens, dtype=np.int64))
    ids, mask = pad_rows(targets, 0)
    return rows, ids.to(generated.device), mask.to(generated.device)


def sampling(temperature: float) -> dict[str, Any]:
    """Return the arguments of `generate` that draw each token from the whole distribution; none if temperature is 0."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}


def generation_settings(model: PreTrainedModel, end_id: int, pad_id: int, start_id: int | None) -> GenerationConfig:
    """Return settings of plain search, without the forced tokens, length penalty and sampling of the checkpoint."""
    return GenerationConfig(
        eos_token_id=end_id,
        pad_token_id=pad_id,
        bos_token_id=start_id,
        decoder_start_token_id=start_id if model.config.is_encoder_decoder else None,
        do_sample=False,
        length_penalty=0.0,  # beams compete by their sum of log-probabilities
        early_stopping=False,
    )
