"""Objectives against worked numbers; what each needs; settings that are refused."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.objective_inputs import Pairs, contrastive_loss_of
from training.objectives.dispatch import compute, needs
from training.objectives.inputs import Likelihoods, Needs, retrieval_log_probs
from training.training_settings import ObjectiveConfig


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
        left_out=per_passage.flip(1),  # without one of two passages the other one is read
        attention=torch.tensor([[math.log(3.0), 0.0]]),
        null=torch.tensor([[0.05, 0.1]], dtype=torch.float64).log(),
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
        # p = (.6, .4, 1) / 2 with the empty passage at score 0: token marginals .195 and .19
        (ObjectiveConfig(name="realm", null_score="fixed"), -(math.log(0.195) + math.log(0.19)) / 2),
        # g = (-log sqrt(.04), -log sqrt(.1)): with two passages, the target of PDist
        (ObjectiveConfig(name="loop"), 3.305855e-4),
        (ObjectiveConfig(name="loop", reduction="elements"), 3.305855e-4 / 2),
        # target (3, 1) / 4
        (ObjectiveConfig(name="adist"), 0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.4)),
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


def test_a_generator_that_cannot_tell_passages_apart_moves_no_retriever() -> None:
    """Its target is uniform: the divergence pulls the scores together with all its strength, and with none by
    confidence."""
    gradients = []
    for confidence in (False, True):
        scores, outputs = case_a()
        assert outputs.per_passage is not None
        outputs.per_passage = outputs.per_passage.detach()[:, :1].expand_as(outputs.per_passage).clone()
        compute(ObjectiveConfig(name="pdist", confidence=confidence), outputs)[0].backward()
        assert scores.grad is not None
        gradients.append(scores.grad[0].tolist())
    assert gradients[0] == pytest.approx([0.1, -0.1])
    assert gradients[1] == pytest.approx([0.0, 0.0], abs=1e-12)


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
        (ObjectiveConfig(name="loop"), 0.6 - math.sqrt(0.1) / (math.sqrt(0.1) + math.sqrt(0.04))),
        # target_temperature .5 squares it
        (ObjectiveConfig(name="loop", target_temperature=0.5), 0.6 - 0.1 / 0.14),
        (ObjectiveConfig(name="adist"), 0.6 - 0.75),
        # times 1 - H(.75, .25) / log 2
        (ObjectiveConfig(name="adist", confidence=True), (0.6 - 0.75) * 0.1887219),
        (ObjectiveConfig(name="adist", weight=2.0, target_temperature=0.5), 2 * (0.6 - 0.9)),
        (ObjectiveConfig(name="pdist", normalization="none", weight=3.0, scale=0.5), 1.5 * (0.6 - 0.1 / 0.14)),
    ],
)
def test_worked_gradients(config: ObjectiveConfig, first: float) -> None:
    scores, outputs = case_a()
    compute(config, outputs)[0].backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([first, -first], rel=1e-4, abs=1e-7)


def test_worked_empty_passage() -> None:
    """p = (.3, .2, .5). Posteriors of passage 1 are .15 / .195 and .06 / .19, of the empty one .025 / .195 and
    .05 / .19; utility log(.195 / .05) + log(.19 / .1)."""
    scores, outputs = case_a()
    outputs.null_score = torch.zeros(1, requires_grad=True)
    loss, stats = compute(ObjectiveConfig(name="realm"), outputs)
    loss.backward()
    assert scores.grad is not None
    assert outputs.null_score.grad is not None
    assert scores.grad[0, 0].item() == pytest.approx(0.3 - (0.15 / 0.195 + 0.06 / 0.19) / 2)
    assert outputs.null_score.grad.item() == pytest.approx(0.5 - (0.025 / 0.195 + 0.05 / 0.19) / 2)
    assert stats["retrieval/utility"].item() == pytest.approx(math.log(0.195 / 0.05) + math.log(0.19 / 0.1))
    assert stats["retrieval/null_probability"].item() == pytest.approx(0.5)


def test_a_useless_passage_has_negative_utility_and_a_better_score_of_nothing_lowers_the_loss() -> None:
    _, outputs = case_a()
    assert outputs.per_passage is not None
    outputs.null = outputs.per_passage[:, 0] + 0.5
    losses = []
    for score in (0.0, 5.0, 50.0):
        outputs.null_score = torch.tensor([score])
        loss, stats = compute(ObjectiveConfig(name="realm"), outputs)
        losses.append(loss.item())
        assert stats["retrieval/utility"].item() <= 1e-6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(-outputs.null.mean().item())  # p(nothing) = 1


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
    assert needs(ObjectiveConfig(name="realm")) == Needs(per_passage=True, per_passage_gradient=True, null=True)
    assert needs(ObjectiveConfig(name="loop")) == Needs(fused=True, left_out=True)
    assert needs(ObjectiveConfig(name="adist")) == Needs(fused=True, attention=True)
    assert needs(ObjectiveConfig(name="fused")) == Needs(fused=True, score_bias=True)
    assert needs(ObjectiveConfig(name="fused", score_bias=False)) == Needs(fused=True)
    assert needs(ObjectiveConfig(name="independent_cropping")) == Needs(in_batch=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(name="rag"), r"objective.name=rag: must be one of rag_sequence, "),
        (ObjectiveConfig(name="emdr2", level="word"), "objective.level=word: must be one of sequence, token"),
        (ObjectiveConfig(name="pdist", reduction="mean"), "objective.reduction=mean: must be one of batch, elements"),
        (ObjectiveConfig(null_score="zero"), "objective.null_score=zero: must be one of learned, fixed"),
        (ObjectiveConfig(normalization="tokens"), "objective.normalization=tokens: must be one of length, none"),
        (ObjectiveConfig(temperature=0.0), "objective.temperature=0.0: must be above 0"),
        (ObjectiveConfig(target_temperature=math.nan), "objective.target_temperature=nan"),
        (ObjectiveConfig(weight=-1.0), "objective.weight=-1.0: must not be negative"),
        (ObjectiveConfig(scale=math.inf), "objective.scale=inf"),
        (ObjectiveConfig(title_probability=1.5), "objective.title_probability=1.5"),
        (ObjectiveConfig(min_span=0), "objective.min_span=0"),
        (ObjectiveConfig(min_span=9, max_span=8), "objective.min_span=9: must not exceed objective.max_span=8"),
    ],
)
def test_bad_settings_are_refused(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needs(config)
