"""Preference objectives: alignment whose gradient reaches the retriever.

The policy's log-probability of an answer is the marginal over the K retrieved passages, `log pi(y|q) = logsumexp_k(log
p_k + L_k(y))`, so that a preference moves both retrieval and generation. The reference is the system at the start of
the stage with the same passages; it carries no gradient. `r = log pi - log ref`.

DPO is Rafailov et al. 2023, "Direct Preference Optimization", equation 7; KTO is Ethayarajh et al. 2024, "KTO: Model
Alignment as Prospect Theoretic Optimization", equations 7 and 8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from training.objectives.inputs import (
    Likelihoods,
    Stats,
    entropy,
    in_full_precision,
    mean_over_questions,
    mixture_log_probs,
    retrieval_log_probs,
)

Reduce = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class Candidates(Likelihoods):
    """Log-likelihoods that the policy and the reference give `group` answers to each question, given the same K
    passages.

    Preference objectives score every answer under every passage, `each` = k. Sampling objectives score every answer
    under the one passage that it was drawn with, `each` = 1.
    """

    log_probs: Tensor | None = None  # l [batch, group, each, tokens]
    log_probs_mask: Tensor | None = None  # bool [batch, group, tokens]: False for padding
    reference_scores: Tensor | None = None  # [batch, k]; None: no reference
    reference_log_probs: Tensor | None = None  # as `log_probs`
    desirable: Tensor | None = None  # bool [batch]; KTO
    drawn: Tensor | None = None  # int64 [batch, group]: the passage of each sample; sampling objectives
    rewards: Tensor | None = None  # float32 [batch, group]
    old_log_probs: Tensor | None = None  # [batch, group]: those of the samples when they were drawn; None: those of now


def dpo(
    outputs: Candidates,
    beta: float = 0.1,
    *,
    chosen_weight: float = 0.0,
    length_normalized: bool = False,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -log sigmoid(beta * (r(chosen) - r(rejected))) - chosen_weight * log pi(chosen) / tokens; answer 0 of
    each question is the chosen one, 1 the rejected.

    `length_normalized` divides each answer's r by its number of tokens. Without a reference, r is log pi. The second
    term (Pang et al. 2024, arXiv:2404.19733, equation 1) keeps the chosen answer likely, and trains the retriever as
    the marginal likelihood does: a passage that makes both answers likely wins nothing by the first term.
    """
    policy, reference, prior = policy_and_reference(outputs, length_normalized, temperature)
    log_ratio = policy - reference
    margin = log_ratio[:, 0] - log_ratio[:, 1]
    preference = mean_over_questions(F.softplus(-beta * margin), outputs.num_questions)
    tokens = 1 if length_normalized else _answer_tokens(outputs)[:, 0]
    chosen = mean_over_questions(policy[:, 0] / tokens, outputs.num_questions)
    return preference - chosen_weight * chosen, {
        "loss/preference": preference.detach(),
        "alignment/chosen_log_likelihood": chosen.detach(),
        "alignment/accuracy": (margin.detach() > 0).float().mean(),
        "alignment/margin": beta * margin.detach().mean(),
        "alignment/log_likelihood_accuracy": (policy[:, 0] > policy[:, 1]).float().mean(),
        "alignment/chosen_log_ratio": log_ratio[:, 0].detach().mean(),
        "retrieval/entropy": entropy(prior, outputs.passage_mask),
    }


def kto(
    outputs: Candidates,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    length_normalized: bool = False,
    temperature: float = 1.0,
    sum_over_ranks: Reduce | None = None,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute lambda_D * (1 - sigmoid(beta * (r - z))) of a desirable answer, lambda_U * (1 - sigmoid(beta * (z - r)))
    of an undesirable one. Answer 0 of each question is the judged one, answer 1 belongs to another question: z = max(0,
    mean of r over these mismatched pairs), without gradient, over the ranks that `sum_over_ranks` adds up (None: this
    one)."""
    assert outputs.desirable is not None
    policy, reference, prior = policy_and_reference(outputs, length_normalized, temperature)
    log_ratio = policy - reference
    judged, mismatched = log_ratio[:, 0], log_ratio[:, 1].detach()
    total = torch.stack([mismatched.sum(), mismatched.new_tensor(float(len(mismatched)))])
    if sum_over_ranks is not None:
        total = sum_over_ranks(total)
    z = (total[0] / total[1].clamp(min=1)).clamp(min=0)
    sign = torch.where(outputs.desirable, 1.0, -1.0).to(judged.dtype)
    weight = torch.where(outputs.desirable, desirable_weight, undesirable_weight).to(judged.dtype)
    losses = weight * torch.sigmoid(-beta * sign * (judged - z))  # 1 - sigmoid(x) = sigmoid(-x)
    loss = mean_over_questions(losses, outputs.num_questions)
    return loss, {
        "loss/preference": loss.detach(),
        "alignment/accuracy": ((judged.detach() > z) == outputs.desirable).float().mean(),
        "alignment/kl": z,
        "retrieval/entropy": entropy(prior, outputs.passage_mask),
    }


def policy_and_reference(
    outputs: Candidates, length_normalized: bool, temperature: float
) -> tuple[Float[Tensor, "batch group"], Float[Tensor, "batch group"], Float[Tensor, "batch k"]]:
    """Return log pi [batch, group], log ref [batch, group] without gradient (0 without a reference), log p(z|q) [batch,
    k]."""
    assert outputs.log_probs is not None
    assert outputs.log_probs_mask is not None
    mask, answers = outputs.passage_mask, outputs.log_probs_mask
    prior = retrieval_log_probs(outputs.scores, mask, temperature)
    policy = marginal_log_probs(prior, outputs.log_probs, answers, mask)
    reference = torch.zeros_like(policy)
    if outputs.reference_scores is not None and outputs.reference_log_probs is not None:
        reference_prior = retrieval_log_probs(outputs.reference_scores, mask, temperature)
        reference = marginal_log_probs(reference_prior, outputs.reference_log_probs, answers, mask).detach()
    if length_normalized:
        tokens = _answer_tokens(outputs)
        policy, reference = policy / tokens, reference / tokens
    return policy, reference, prior


def _answer_tokens(outputs: Candidates) -> Tensor:
    """Return the number of answer tokens, int64 [batch, group], at least 1."""
    assert outputs.log_probs_mask is not None
    return outputs.log_probs_mask.sum(dim=-1).clamp(min=1)


def marginal_log_probs(
    prior: Float[Tensor, "batch k"],
    log_probs: Float[Tensor, "batch group k tokens"],
    answer_mask: Bool[Tensor, "batch group tokens"],
    passage_mask: Bool[Tensor, "batch k"],
) -> Float[Tensor, "batch group"]:
    """Return log pi(y|q) = logsumexp_k(log p_k + sum_t l_kt) of every answer, [batch, group]; 0 for a row of nothing
    but padding."""
    totals = answer_totals(log_probs, answer_mask)
    return mixture_log_probs(prior, totals.transpose(1, 2), passage_mask)


def answer_totals(
    log_probs: Float[Tensor, "batch group each tokens"], answer_mask: Bool[Tensor, "batch group tokens"]
) -> Float[Tensor, "batch group each"]:
    """Return L [batch, group, each]: log_probs summed over the tokens of each answer, whatever (even NaN) stands at
    padding."""
    return in_full_precision(log_probs).masked_fill(~answer_mask.unsqueeze(2), 0.0).sum(dim=-1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks, without gradient; every rank calls it with the same shape."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total
