"""Objectives against worked numbers; what each needs; settings that are refused."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.objectives import Pairs, contrastive_loss_of
from training.objectives.choose import compute, needs
from training.objectives.likelihoods import Likelihoods, Needs, retrieval_log_probs
from training.settings import ObjectiveConfig


def case_a() -> tuple[Tensor, Likelihoods]:
    """Two passages, two tokens, p = (.6, .4); the fused reader is sure, so that its loss is 0."""
    scores = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().requires_grad_()
    per_passage = torch.tensor([[[0.5, 0.2], [0.1, 0.4]]], dtype=torch.float64).log()
    outputs = Likelihoods(
        scores=scores,
        passage_mask=torch.ones(1, 2, dtype=torch.bool),
        answer_mask=torch.ones(1, 2, dtype=torch.bool),
        per_passage=per_passage,
        fused=torch.zeros(1, 2),
    )
    return scores, outputs


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ObjectiveConfig(name="rag_sequence"), 2.5770218),
        (ObjectiveConfig(name="rag_token"), 2.3517754),
        (ObjectiveConfig(name="emdr2", level="sequence"), 2.5770218),
        (ObjectiveConfig(name="emdr2", level="token"), 1.1758877),
        (ObjectiveConfig(name="pdist", normalization="length", reduction="batch"), 3.305076e-4),
        (ObjectiveConfig(name="pdist", normalization="length", reduction="elements"), 1.652538e-4),
        (ObjectiveConfig(name="fused"), 0.0),
    ],
)
def test_worked_numbers(config: ObjectiveConfig, expected: float) -> None:
    _, outputs = case_a()
    loss, stats = compute(config, outputs)
    # The references were rounded in float32: PDist's 3.305076e-4 is 3.305855e-4 exactly (next test).
    assert loss.item() == pytest.approx(expected, rel=0.0, abs=2e-7)
    assert stats["retrieval/entropy"].item() == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4), rel=1e-6)
    if needs(config).fused and config.name != "fused":
        assert stats["loss/generator"].item() == 0.0
        assert stats["loss/retriever"].item() == pytest.approx(loss.item())


def test_worked_perplexity_distillation_exactly() -> None:
    first = math.sqrt(0.1) / (math.sqrt(0.1) + math.sqrt(0.04))
    expected = first * math.log(first / 0.6) + (1 - first) * math.log((1 - first) / 0.4)
    loss, stats = compute(ObjectiveConfig(name="pdist"), case_a()[1])
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert stats["retrieval/target_entropy"].item() == pytest.approx(
        -first * math.log(first) - (1 - first) * math.log(1 - first), rel=1e-9
    )


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (ObjectiveConfig(name="emdr2", level="token"), -0.0554622),
        # d/ds_1 = p_1 - posterior_1: posterior (.06, .016) / .076
        (ObjectiveConfig(name="emdr2", level="sequence"), 0.6 - 0.06 / 0.076),
        (ObjectiveConfig(name="rag_sequence"), 0.6 - 0.06 / 0.076),
        (ObjectiveConfig(name="rag_token"), 2 * -0.0554622),
        # p_1 - target_1: target (sqrt(.1), sqrt(.04)), normalised
        (ObjectiveConfig(name="pdist"), 0.6 - math.sqrt(0.1) / (math.sqrt(0.1) + math.sqrt(0.04))),
        (ObjectiveConfig(name="pdist", normalization="none"), 0.6 - 0.1 / 0.14),
        (ObjectiveConfig(name="pdist", normalization="none", weight=3.0, scale=0.5), 1.5 * (0.6 - 0.1 / 0.14)),
    ],
)
def test_worked_gradients(config: ObjectiveConfig, first: float) -> None:
    scores, outputs = case_a()
    compute(config, outputs)[0].backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([first, -first], rel=1e-4, abs=1e-7)


def test_worked_score_bias() -> None:
    """With equal attention, the bias makes the toy reader the mixture over p: RAG-token, mean over tokens."""
    scores, outputs = case_a()
    assert outputs.per_passage is not None
    bias = retrieval_log_probs(scores, outputs.passage_mask)
    outputs.fused = torch.logsumexp(bias.unsqueeze(-1) + outputs.per_passage, dim=1)
    loss, _ = compute(ObjectiveConfig(name="fused"), outputs)
    loss.backward()
    assert scores.grad is not None
    assert loss.item() == pytest.approx(2.3517754 / 2, rel=1e-6)
    assert scores.grad[0].tolist() == pytest.approx([-0.0554622, 0.0554622], rel=1e-4)


def test_worked_info_nce_with_a_duplicate() -> None:
    """Pairs 0 and 2 come from one passage: neither is the other's negative."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    pairs = Pairs(vectors.clone().requires_grad_(), vectors.clone().requires_grad_(), torch.tensor([7, 3, 7]))
    loss, stats = contrastive_loss_of(ObjectiveConfig(name="inverse_cloze"), pairs)
    two, three = math.log(1 + math.exp(-2)), math.log(1 + 2 * math.exp(-2))
    assert loss.item() == pytest.approx((two + three + two) / 3, rel=1e-6)
    assert stats["retrieval/in_batch_accuracy"].item() == 1.0


def test_needs() -> None:
    assert needs(ObjectiveConfig(name="rag_token")) == Needs(per_passage=True, per_passage_gradient=True)
    assert needs(ObjectiveConfig(name="pdist")) == Needs(per_passage=True, fused=True)
    assert needs(ObjectiveConfig(name="fused")) == Needs(fused=True, score_bias=True)
    assert needs(ObjectiveConfig(name="fused", score_bias=False)) == Needs(fused=True)
    assert needs(ObjectiveConfig(name="independent_cropping")) == Needs(in_batch=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(name="rag"), r"objective.name='rag': allowed are rag_sequence, "),
        (ObjectiveConfig(name="emdr2", level="word"), "objective.level='word': allowed are sequence, token"),
        (ObjectiveConfig(name="pdist", reduction="mean"), "objective.reduction='mean': allowed are batch, elements"),
        (ObjectiveConfig(normalization="tokens"), "objective.normalization='tokens': allowed are length, none"),
        (ObjectiveConfig(temperature=0.0), "objective.temperature=0.0: must be a finite number, above 0"),
        (ObjectiveConfig(target_temperature=math.nan), "objective.target_temperature=nan"),
        (ObjectiveConfig(weight=-1.0), "objective.weight=-1.0: must be a finite number, 0 or above"),
        (ObjectiveConfig(scale=math.inf), "objective.scale=inf"),
        (ObjectiveConfig(title_probability=1.5), "objective.title_probability=1.5"),
        (ObjectiveConfig(min_span=0), "objective.min_span=0"),
        (ObjectiveConfig(min_span=9, max_span=8), "objective.max_span=8: must be a finite number, min_span=9 or above"),
    ],
)
def test_bad_settings_are_refused(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needs(config)
