"""Inputs of an objective, and the masked arithmetic that every objective shares.

Symbols: `s` score, `p` retrieval distribution, `l` per-passage token log-probability, `L` its sum over the answer, `f`
fused token log-probability. Everything is computed in float32 (float64 where an input is float64), is finite for one
passage, padded passages and scores of +-1e4, and sums over questions before it divides by a given number of
questions, so that accumulation and data parallelism cannot change the answer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Stats = dict[str, Tensor]


@dataclass(kw_only=True)
class Likelihoods:
    """Scores of fresh encoders, and the log-probabilities that the generator gives the answers. `k` is the number of
    candidates of a contrastive objective."""

    scores: Tensor  # [batch, k], inner products already divided by the encoder's temperature
    passage_mask: Tensor  # bool [batch, k]: False for padding, or a candidate that is no fair negative
    answer_mask: Tensor | None = None  # bool [batch, tokens]: False for padding
    per_passage: Tensor | None = None  # l [batch, k, tokens]: log P(y_t | y_<t, q, z_k), 0 at padding
    fused: Tensor | None = None  # f [batch, tokens]: log P(y_t | y_<t, q, z_1..K), 0 at padding
    left_out: Tensor | None = None  # f^(-k) [batch, k, tokens]: fused without passage k, 0 at padding
    attention: Tensor | None = None  # [batch, k]: attention of the fused generator's answer tokens to each passage
    null: Tensor | None = None  # [batch, tokens]: log P(y_t | y_<t, q), closed book, 0 at padding
    null_score: Tensor | None = None  # [batch]: score of the empty passage; None: 0
    positives: Tensor | None = None  # int64 [batch]: column of the positive; contrastive objectives only
    num_questions: float | int | None = None  # Number that sums over questions are divided by; None: batch
    noise: Tensor | None = None  # Gumbel noise [batch, draws, k]; objectives that draw passages
    contrast: "Likelihoods | None" = None  # pairs of a contrastive task beside the questions
    contrast_share: float = 0.0  # Share of the loss


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Outputs that the trained module has to compute before `compute` can be called."""

    per_passage: bool = False  # `Likelihoods.per_passage`
    per_passage_gradient: bool = False  # it carries gradient; otherwise it is computed without gradient and dropout
    fused: bool = False  # `Likelihoods.fused`
    score_bias: bool = False  # the fused pass gets `retrieval_log_probs` as passage bias, with gradient
    left_out: bool = False  # `Likelihoods.left_out`, without gradient and with dropout off
    attention: bool = False  # `Likelihoods.attention`, without gradient and with dropout off
    null: bool = False  # `Likelihoods.null`, with gradient, and `null_score` if the system has one
    in_batch: bool = False  # no generator: `contrastive.in_batch` makes the Likelihoods from pairs of vectors
    candidates: bool = False  # several answers a question: `preference.Candidates`
    num_draws: int = 0  # Number of draws that `Likelihoods.noise` is for


def in_full_precision(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `values` in float32, or in float64 if they are float64 already."""
    return values if values.dtype == torch.float64 else values.float()


def retrieval_log_probs(
    scores: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"], temperature: float = 1.0
) -> Float[Tensor, "batch k"]:
    """Return log p(z|q) = log softmax_k(scores / temperature) over the real passages, [batch, k].

    Padding gets -inf. A row of nothing but padding is uniform and gives no gradient.
    """
    logits = (in_full_precision(scores) / temperature).masked_fill(~passage_mask, float("-inf"))
    some = passage_mask.any(dim=-1, keepdim=True)
    return torch.log_softmax(torch.where(some, logits, 0.0), dim=-1)


def mixture_log_probs(
    prior: Float[Tensor, "batch k"], values: Float[Tensor, "batch k *tokens"], passage_mask: Bool[Tensor, "batch k"]
) -> Float[Tensor, " batch *tokens"]:
    """Return logsumexp_k(prior_k + values_k) over the real passages, [batch] or [batch, tokens].

    `prior` [batch, k] comes from `retrieval_log_probs`; `values` [batch, k] or [batch, k, tokens] are ignored (even
    NaN) at padding. A row of nothing but padding gets 0 without gradient.
    """
    missing = ~passage_mask
    if values.dim() == 3:
        prior, missing = prior.unsqueeze(-1), missing.unsqueeze(-1)
    return torch.logsumexp(prior + in_full_precision(values).masked_fill(missing, 0.0), dim=1)


def answer_tokens(
    values: Float[Tensor, "batch *k tokens"], answer_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch *k tokens"]:
    """Return values [batch, tokens] or [batch, k, tokens] with 0 where answer_mask [batch, tokens] leaves out a token,
    whatever (even NaN) stands there: neither prompt nor padding enters a likelihood."""
    left_out = ~answer_mask if values.dim() == 2 else ~answer_mask.unsqueeze(1)
    return in_full_precision(values).masked_fill(left_out, 0.0)


def answer_lengths(answer_mask: Bool[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch"]:
    """Return the number of answer tokens [batch], at least 1, so that an empty answer costs nothing instead of dividing
    by 0."""
    return answer_mask.sum(dim=-1).clamp(min=1)


def mean_over_tokens(
    values: Float[Tensor, "batch tokens"], answer_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return the mean of values [batch, tokens] over each answer's tokens, [batch]."""
    return answer_tokens(values, answer_mask).sum(dim=-1) / answer_lengths(answer_mask)


def mean_over_questions(values: Float[Tensor, " batch"], num_questions: float | int | None) -> Float[Tensor, ""]:
    """Return the sum of values [batch] divided by num_questions (None: batch)."""
    return values.sum() / (values.shape[0] if num_questions is None else num_questions)


@torch.no_grad()
def entropy(log_probs: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"]) -> Float[Tensor, ""]:
    """Return the mean entropy in nats of distributions [batch, k] over their real passages."""
    return entropies(log_probs, passage_mask).mean()


def entropies(log_probs: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """Return the entropy in nats, [batch], of each distribution [batch, k] over its real passages."""
    return -(log_probs.exp() * log_probs).masked_fill(~passage_mask, 0.0).sum(dim=-1)
