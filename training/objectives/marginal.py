"""Likelihood objectives: the gradient of the answer's likelihood reaches the generator and both encoders.

RAG-sequence and RAG-token are equations 1 and 2 of Lewis et al. 2020, "Retrieval-Augmented Generation for
Knowledge-Intensive NLP Tasks"; the marginal with an empty passage is of Guu et al. 2020, "REALM", sections 3.1 and 3.3;
the fused likelihood lets relevance enter the attention as in Lewis et al. 2020, "Pre-training via Paraphrasing"
(MARGE). The prior over passages counts at every length of answer, one token included.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from training.objectives.inputs import (
    Likelihoods,
    Stats,
    answer_tokens,
    entropy,
    mean_over_questions,
    mean_over_tokens,
    mixture_log_probs,
    retrieval_log_probs,
)


def rag_sequence(outputs: Likelihoods, temperature: float = 1.0) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -logsumexp_k(log p_k + L_k): one passage explains the whole answer."""
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    totals = answer_tokens(outputs.per_passage, outputs.answer_mask).sum(dim=-1)
    marginal = mixture_log_probs(prior, totals, outputs.passage_mask)
    return _report(-mean_over_questions(marginal, outputs.num_questions), prior, outputs)


def rag_token(outputs: Likelihoods, temperature: float = 1.0) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -sum_t logsumexp_k(log p_k + l_kt): each token may come from another passage."""
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    tokens = answer_tokens(outputs.per_passage, outputs.answer_mask)
    marginal = answer_tokens(mixture_log_probs(prior, tokens, outputs.passage_mask), outputs.answer_mask)
    return _report(-mean_over_questions(marginal.sum(dim=-1), outputs.num_questions), prior, outputs)


def realm(outputs: Likelihoods, temperature: float = 1.0) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -1/T sum_t logsumexp_k(log p_k + l_kt) over the K passages and an empty one, so that an answer that needs
    no passage gives none of them credit. Retrieval utility is the marginal log-likelihood minus that under the empty
    passage, summed over the answer, mean over questions; the entropy is that of the real passages alone."""
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    assert outputs.null is not None
    mask, null = outputs.passage_mask, outputs.null_score
    score = outputs.scores.new_zeros(len(mask)) if null is None else null.to(outputs.scores.dtype)
    scores = torch.cat([outputs.scores, score.unsqueeze(-1)], dim=-1)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    prior = retrieval_log_probs(scores, mask, temperature)
    values = torch.cat([outputs.per_passage, outputs.null.unsqueeze(1).to(outputs.per_passage.dtype)], dim=1)
    tokens = answer_tokens(values, outputs.answer_mask)
    marginal = answer_tokens(mixture_log_probs(prior, tokens, mask), outputs.answer_mask)
    means = mean_over_tokens(marginal, outputs.answer_mask)
    real = retrieval_log_probs(outputs.scores.detach(), outputs.passage_mask, temperature)
    loss, stats = _report(-mean_over_questions(means, outputs.num_questions), real, outputs)
    return loss, stats | {
        "retrieval/utility": (marginal - tokens[:, -1]).detach().sum(dim=-1).mean(),
        "retrieval/null_probability": prior.detach()[:, -1].exp().mean(),
    }


def fused_likelihood(outputs: Likelihoods, temperature: float = 1.0) -> tuple[Float[Tensor, ""], Stats]:
    """Compute -mean_t f. The retriever learns only if the generator added log p(z|q), with gradient, to its attention
    (`Needs.score_bias`); otherwise this is the loss of the generator alone. `temperature` serves the statistics."""
    assert outputs.fused is not None
    assert outputs.answer_mask is not None
    prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, temperature)
    means = mean_over_tokens(outputs.fused, outputs.answer_mask)
    return _report(-mean_over_questions(means, outputs.num_questions), prior, outputs)


def _report(loss: Tensor, prior: Tensor, outputs: Likelihoods) -> tuple[Float[Tensor, ""], Stats]:
    """Return the loss with the statistics that every objective of this family has."""
    return loss, {"loss/generator": loss.detach(), "retrieval/entropy": entropy(prior, outputs.passage_mask)}
