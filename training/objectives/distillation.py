"""Distillation objectives: the generator learns from its own fused likelihood, the retriever from a detached target.

EMDR2 is Singh et al. 2021, "End-to-End Training of Multi-Document Reader and Retriever", equation 4 (`sequence`); its
published code sums over passages at every token (`token`). PDist is perplexity distillation of Izacard et al. 2022,
"Atlas", section 2.2; REPLUG-LSR (Shi et al. 2023) and the LSR of RA-DIT (Lin et al. 2023) differ in temperatures. LOOP
and ADist are its leave-one-out and attention distillation, the latter after Izacard and Grave 2021, "Distilling
Knowledge from Reader to Retriever", with the norms of the values. The targets are detached here, whatever graph they
come with.

A target is uniform if the generator cannot tell the passages apart: while it cannot read yet, or if none of them has
the answer. Such a target teaches nothing, but its divergence pulls as strongly as any towards equal scores, that is,
one vector for all passages. `confidence` weighs each question's divergence by 1 - H(target) / log K.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from training.objectives.inputs import (
    Likelihoods,
    Stats,
    answer_lengths,
    answer_tokens,
    entropies,
    entropy,
    mean_over_questions,
    mean_over_tokens,
    mixture_log_probs,
    retrieval_log_probs,
)


def emdr2(
    outputs: Likelihoods, level: str = "sequence", weight: float = 1.0, temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_t f + weight * retriever loss; the latter is -logsumexp_k(log p_k + sg(L_k)) (`level` sequence) or
    -1/T sum_t logsumexp_k(log p_k + sg(l_kt)) (token)."""
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    target = answer_tokens(outputs.per_passage.detach(), outputs.answer_mask)
    match level:
        case "sequence":
            marginal = mixture_log_probs(prior, target.sum(dim=-1), outputs.passage_mask)
        case "token":
            tokens = mixture_log_probs(prior, target, outputs.passage_mask)
            marginal = mean_over_tokens(tokens, outputs.answer_mask)
        case _:
            raise AssertionError(f"check_objective let level={level!r} through")
    retriever = -mean_over_questions(marginal, outputs.num_questions)
    return _total(retriever, weight, prior, outputs)


def pdist(
    outputs: Likelihoods,
    normalization: str = "length",
    reduction: str = "batch",
    weight: float = 1.0,
    temperature: float = 1.0,
    target_temperature: float = 1.0,
    confidence: bool = False,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_t f + weight * KL(target || p) with target = sg(softmax_k(g / target_temperature)).

    g = L_k / T (`normalization` length) or L_k (none). `reduction` batch averages over questions; elements divides each
    question's divergence by its number of real passages as well, as published code does.
    """
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    gains = answer_tokens(outputs.per_passage.detach(), outputs.answer_mask).sum(dim=-1)
    match normalization:
        case "length":
            gains = gains / answer_lengths(outputs.answer_mask).unsqueeze(-1)
        case "none":
            pass
        case _:
            raise AssertionError(f"check_objective let normalization={normalization!r} through")
    return _distil(
        gains,
        prior,
        outputs=outputs,
        reduction=reduction,
        weight=weight,
        target_temperature=target_temperature,
        confidence=confidence,
    )


def loop(
    outputs: Likelihoods,
    reduction: str = "batch",
    weight: float = 1.0,
    temperature: float = 1.0,
    target_temperature: float = 1.0,
    confidence: bool = False,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute `pdist` with g = -mean_t f^(-k)_t: the fused loss without passage k, larger the more it is missed."""
    assert outputs.left_out is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    totals = answer_tokens(outputs.left_out.detach(), outputs.answer_mask).sum(dim=-1)
    gains = -totals / answer_lengths(outputs.answer_mask).unsqueeze(-1)
    return _distil(
        gains,
        prior,
        outputs=outputs,
        reduction=reduction,
        weight=weight,
        target_temperature=target_temperature,
        confidence=confidence,
    )


def adist(
    outputs: Likelihoods,
    reduction: str = "batch",
    weight: float = 1.0,
    temperature: float = 1.0,
    target_temperature: float = 1.0,
    confidence: bool = False,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute `pdist` with g = what the answer's tokens take from passage k by attention (`Likelihoods.attention`)."""
    assert outputs.attention is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    return _distil(
        outputs.attention.detach(),
        prior,
        outputs=outputs,
        reduction=reduction,
        weight=weight,
        target_temperature=target_temperature,
        confidence=confidence,
    )


def _distil(
    gains: Tensor,
    prior: Tensor,
    *,
    outputs: Likelihoods,
    reduction: str,
    weight: float,
    target_temperature: float,
    confidence: bool,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_t f + weight * KL(softmax_k(gains / target_temperature) || p); gains [batch, k] without
    gradient."""
    target = retrieval_log_probs(gains, outputs.passage_mask, target_temperature)
    divergence = kl_to_target(target, prior, outputs.passage_mask)
    if confidence:
        divergence = divergence * certainty(target, outputs.passage_mask)
    match reduction:
        case "batch":
            pass
        case "elements":
            divergence = divergence / outputs.passage_mask.sum(dim=-1).clamp(min=1)
        case _:
            raise AssertionError(f"check_objective let reduction={reduction!r} through")
    loss, stats = _total(mean_over_questions(divergence, outputs.num_questions), weight, prior, outputs)
    return loss, stats | {"retrieval/target_entropy": entropy(target, outputs.passage_mask)}


def certainty(target: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """Return 1 - H(target) / log K, [batch], from 0 (uniform over the K real passages, or one alone) to 1; target
    [batch, k] are log-probabilities."""
    real = passage_mask.sum(dim=-1)
    most = real.clamp(min=2).to(target.dtype).log()
    return torch.where(real > 1, (1 - entropies(target, passage_mask) / most).clamp(0, 1), 0.0)


def kl_to_target(
    target: Float[Tensor, "batch k"], prior: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"]
) -> Float[Tensor, " batch"]:
    """Return KL(target || prior), [batch], of two log-distributions [batch, k] over the real passages."""
    # Padding is -inf in both, and -inf - -inf is NaN: mask it before the product, so that its gradient is 0, too.
    return (target.exp() * (target - prior).masked_fill(~passage_mask, 0.0)).sum(dim=-1)


def _total(retriever: Tensor, weight: float, prior: Tensor, outputs: Likelihoods) -> tuple[Float[Tensor, ""], Stats]:
    """Return generator loss plus weighted retriever loss, with the statistics that every objective of this family
    has."""
    assert outputs.fused is not None
    assert outputs.answer_mask is not None
    means = mean_over_tokens(outputs.fused, outputs.answer_mask)
    generator = -mean_over_questions(means, outputs.num_questions)
    return generator + weight * retriever, {
        "loss/generator": generator.detach(),
        "loss/retriever": retriever.detach(),
        "retrieval/entropy": entropy(prior, outputs.passage_mask),
    }
