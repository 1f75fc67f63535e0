"""Sampling objectives: expected utility of sampled passages and answers.

Stochastic RAG is Zamani and Bendersky 2024, "Stochastic RAG: End-to-End Retrieval-Augmented Generation through Expected
Utility Maximization": straight-through Gumbel-top-k over p(z|q). REINFORCE is Williams 1992; GRPO is Shao et al. 2024,
"DeepSeekMath", equation 3, its ratio and clip those of PPO (Schulman et al. 2017, equation 7).

A sample is a passage and an answer: `log pi(z, y|q) = log p(z|q) + log P(y|q, z)`. Retrieved tokens are context and
never enter it. Randomness comes in as Gumbel noise or as samples, so that the functions are pure.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from training.objectives.inputs import (
    Likelihoods,
    Stats,
    answer_lengths,
    answer_tokens,
    entropy,
    mean_over_questions,
    retrieval_log_probs,
)
from training.objectives.preference import Candidates, answer_totals

EPSILON = 1e-6  # added to the standard deviation of a group's rewards
MAX_LOG_RATIO = 20.0  # bound of an exponent, beyond which exp leaves float32's useful range
MAX_GAIN = 10.0  # largest weight of a passage that was not drawn against the mean of those that were


def stochastic_rag(
    outputs: Likelihoods, num_selected: int = 2, relaxation: float = 1.0, temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -log(1/n sum_z m_z exp(L_z)) with m the n = `num_selected` passages of largest log p + noise (fewer if
    there are fewer): forward the hard selection, backward the soft one.

    A draw's soft selection is softmax_z((log p + noise) / relaxation) over the passages not drawn before it, as in
    sampling without replacement. The gradient of a passage that was not drawn is exp(L_z) over the mean of those that
    were, at most MAX_GAIN, which keeps it finite when the draw misses the only passage that explains the answer.
    """
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    assert outputs.noise is not None
    mask = outputs.passage_mask
    prior = retrieval_log_probs(outputs.scores, mask, temperature)
    perturbed = (prior + outputs.noise[:, 0].to(prior.dtype)).masked_fill(~mask, float("-inf"))
    hard, soft = gumbel_top_k(perturbed, mask, num_selected, relaxation)
    totals = answer_tokens(outputs.per_passage, outputs.answer_mask).sum(dim=-1).masked_fill(~mask, 0.0)
    count = hard.sum(dim=-1).clamp(min=1).to(prior.dtype)
    some = hard.any(dim=-1, keepdim=True)
    chosen = torch.where(some, totals.masked_fill(~hard, float("-inf")), 0.0 * totals)
    utility = torch.where(some[:, 0], torch.logsumexp(chosen, dim=-1) - count.log(), 0.0)
    gains = (totals - utility.unsqueeze(-1)).detach().clamp(max=torch.tensor(MAX_GAIN).log().item()).exp()
    gains = (gains / count.unsqueeze(-1)).masked_fill(~mask, 0.0)
    straight_through = (gains * (soft - soft.detach())).sum(dim=-1)  # 0, with the gradient of the soft selection
    loss = -mean_over_questions(utility + straight_through, outputs.num_questions)
    return loss, {"loss/generator": loss.detach(), "retrieval/entropy": entropy(prior, mask)}


def gumbel_top_k(
    logits: Float[Tensor, "batch k"], passage_mask: Bool[Tensor, "batch k"], num_selected: int, relaxation: float
) -> tuple[Bool[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """Return the hard selection, bool [batch, k], and the sum of the draws' soft ones, [batch, k], 0 at padding.

    `logits` [batch, k] are already perturbed, -inf at padding. A row with fewer real passages has fewer draws.
    """
    hard = torch.zeros_like(passage_mask)
    soft = torch.zeros_like(logits)
    for _ in range(min(num_selected, logits.shape[1])):
        left = passage_mask & ~hard
        some = left.any(dim=-1, keepdim=True)
        remaining = torch.where(some, logits.masked_fill(~left, float("-inf")) / relaxation, torch.zeros_like(logits))
        probabilities = torch.softmax(remaining, dim=-1).masked_fill(~left, 0.0)
        soft = soft + probabilities
        draw = torch.zeros_like(hard).scatter(1, remaining.argmax(dim=-1, keepdim=True), True)
        hard = hard | (draw & left)
    return hard, soft


def reinforce_passages(
    outputs: Likelihoods, advantage: str = "normalized", temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute REINFORCE over passages alone, rewarded by the gold answer's mean token log-probability. Passages are
    drawn with replacement from p(z|q). `-mean_g(A_g log p(z_g))` trains the retriever, and `-log mean_g exp(L_{z_g})`
    the generator: the marginal likelihood of the answer, its mixture estimated from the draws."""
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    assert outputs.noise is not None
    mask = outputs.passage_mask
    prior = retrieval_log_probs(outputs.scores, mask, temperature)
    real = prior.masked_fill(~mask, 0.0)
    perturbed = prior.detach().unsqueeze(1) + outputs.noise.to(prior.dtype)
    perturbed = perturbed.masked_fill(~mask.unsqueeze(1), float("-inf"))
    drawn = perturbed.argmax(dim=-1)  # [batch, group]: Gumbel-max is a draw from p
    totals = answer_tokens(outputs.per_passage, outputs.answer_mask).sum(dim=-1).masked_fill(~mask, 0.0)
    gained = totals.gather(1, drawn)
    rewards = gained.detach() / answer_lengths(outputs.answer_mask).unsqueeze(-1)
    policy = (advantages(rewards, advantage) * real.gather(1, drawn)).mean(dim=-1)
    marginal = gained.logsumexp(dim=-1) - math.log(gained.shape[1])
    loss = -mean_over_questions(policy + marginal, outputs.num_questions)
    return loss, {
        "loss/generator": -mean_over_questions(marginal.detach(), outputs.num_questions),
        "alignment/reward": rewards.mean(),
        "retrieval/entropy": entropy(prior, mask),
    }


def reinforce(
    outputs: Candidates, kl_weight: float = 0.0, advantage: str = "normalized", temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_g(A_g log pi(z_g, y_g|q)) plus `kl_weight` times the divergence from the reference."""
    log_prob, prior = sample_log_probs(outputs, temperature)
    assert outputs.rewards is not None
    gain = advantages(outputs.rewards.to(log_prob.dtype), advantage) * log_prob
    return _sampled(gain, log_prob, prior=prior, outputs=outputs, kl_weight=kl_weight, temperature=temperature)


def grpo(
    outputs: Candidates,
    clip: float = 0.2,
    *,
    kl_weight: float = 0.0,
    advantage: str = "normalized",
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_g min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) plus `kl_weight` times the divergence from the
    reference; ratio = pi / pi_old of a sample, passage and answer together."""
    log_prob, prior = sample_log_probs(outputs, temperature)
    assert outputs.rewards is not None
    old = log_prob if outputs.old_log_probs is None else outputs.old_log_probs.to(log_prob.dtype)
    ratio = (log_prob - old.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    better = advantages(outputs.rewards.to(log_prob.dtype), advantage)
    gain = torch.minimum(ratio * better, ratio.clamp(1 - clip, 1 + clip) * better)
    loss, stats = _sampled(gain, log_prob, prior=prior, outputs=outputs, kl_weight=kl_weight, temperature=temperature)
    clipped = ((ratio.detach() - 1).abs() > clip).float().mean()
    return loss, stats | {"alignment/clipped": clipped}


def advantages(rewards: Float[Tensor, "batch group"], advantage: str = "normalized") -> Float[Tensor, "batch group"]:
    """Return (R - mean) / (std + 1e-6) in each group of rewards [batch, group], std being that of the group (divided by
    its size), or R - mean (`advantage` centered), in which a group whose rewards hardly differ counts hardly (Liu et
    al. 2025, "Understanding R1-Zero-Like Training", section 3.2). It is exactly 0 in a group of equal rewards, which
    rounding of the mean must not turn into a preference."""
    equal = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    centered = (rewards - rewards.mean(dim=-1, keepdim=True)).masked_fill(equal, 0.0)
    match advantage:
        case "normalized":
            return centered / (rewards.std(dim=-1, keepdim=True, correction=0) + EPSILON)
        case "centered":
            return centered
        case _:
            raise AssertionError(f"check_objective let advantage={advantage!r} through")


def sample_log_probs(
    outputs: Candidates, temperature: float, of_reference: bool = False
) -> tuple[Float[Tensor, "batch group"], Float[Tensor, "batch k"]]:
    """Return log p(z|q) + log P(y|q, z) of each sample, [batch, group], and log p(z|q) [batch, k], of policy or
    reference. A sample of a padded passage is 0 without gradient."""
    scores = outputs.reference_scores if of_reference else outputs.scores
    log_probs = outputs.reference_log_probs if of_reference else outputs.log_probs
    assert scores is not None
    assert log_probs is not None
    assert outputs.log_probs_mask is not None
    assert outputs.drawn is not None
    prior = retrieval_log_probs(scores, outputs.passage_mask, temperature)
    passages = prior.masked_fill(~outputs.passage_mask, 0.0).gather(1, outputs.drawn)
    answers = answer_totals(log_probs, outputs.log_probs_mask).squeeze(-1)
    padded = ~outputs.passage_mask.gather(1, outputs.drawn)
    return passages + answers.masked_fill(padded, 0.0), prior


def divergence(
    log_prob: Float[Tensor, "batch group"], reference: Float[Tensor, "batch group"]
) -> Float[Tensor, "batch group"]:
    """Return the k3 estimate of KL(pi || ref) at each sample, `exp(x) - x - 1` with x = log ref - log pi (Shao et al.
    2024, equation 4); x is bounded, so that one sample far from the reference cannot overflow."""
    x = (reference - log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return x.exp() - x - 1


def _sampled(
    gain: Tensor, log_prob: Tensor, *, prior: Tensor, outputs: Candidates, kl_weight: float, temperature: float
) -> tuple[Float[Tensor, ""], Stats]:
    """Return the loss of a gain [batch, group] with the statistics that both objectives have."""
    assert outputs.rewards is not None
    loss = -mean_over_questions(gain.mean(dim=-1), outputs.num_questions)
    rewards = outputs.rewards.float()
    stats = {
        "loss/policy": loss.detach(),
        "alignment/reward": rewards.mean(),
        "alignment/reward_std": rewards.std(dim=-1, correction=0).mean(),
        "alignment/log_prob": log_prob.detach().mean(),
        "retrieval/entropy": entropy(prior, outputs.passage_mask),
    }
    if outputs.reference_scores is not None:
        reference = sample_log_probs(outputs, temperature, of_reference=True)[0].detach()
        kl = mean_over_questions(divergence(log_prob, reference).mean(dim=-1), outputs.num_questions)
        loss = loss + kl_weight * kl
        stats["alignment/kl"] = kl.detach()
    return loss, stats
