"""Gradients of every objective against finite differences, and of pretend ranks against the whole batch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.objective_inputs import (
    CONTRASTIVE,
    GENERATIVE,
    Inputs,
    Pairs,
    contrastive_loss_of,
    label,
    loss_of,
    random_inputs,
    random_pairs,
    toy_fused,
    toy_outputs,
)
from training.objectives.contrastive import Gather
from training.objectives.dispatch import compute, needs
from training.training_settings import ObjectiveConfig

generative = pytest.mark.parametrize("config", GENERATIVE, ids=label)
contrastive = pytest.mark.parametrize("config", CONTRASTIVE, ids=label)


@generative
def test_scores_against_finite_differences(config: ObjectiveConfig) -> None:
    """Padded passages, padded tokens and a question of padding only included."""
    inputs = random_inputs()
    inputs.passage_mask[3] = False

    def loss(scores: Tensor) -> Tensor:
        return loss_of(config, Inputs(scores, inputs.per_passage, inputs.passage_mask, inputs.answer_mask))[0]

    assert torch.autograd.gradcheck(loss, (inputs.scores,), eps=1e-6, atol=1e-8, rtol=1e-6)


@generative
def test_generator_against_finite_differences(config: ObjectiveConfig) -> None:
    """With respect to the likelihoods that carry gradient: per passage or fused."""
    inputs = random_inputs()
    given = toy_outputs(inputs)

    def loss(per_passage: Tensor, fused: Tensor) -> Tensor:
        outputs = replace(given, scores=inputs.scores.detach(), per_passage=per_passage, fused=fused)
        return compute(config, outputs)[0]

    fused = toy_fused(inputs, None).detach()
    per_passage = inputs.per_passage.detach()
    carries = needs(config).per_passage_gradient
    checked = (per_passage.requires_grad_(carries), fused.requires_grad_(not carries))
    assert torch.autograd.gradcheck(loss, checked, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_empty_passage_against_finite_differences() -> None:
    """REALM's gradient with respect to what the closed-book reader says and to the score of reading nothing."""
    inputs = random_inputs()
    inputs.passage_mask[3] = False  # nothing but the empty passage is left
    given = toy_outputs(inputs)

    def loss(null: Tensor, null_score: Tensor) -> Tensor:
        outputs = replace(given, null=null, null_score=null_score.expand(4))
        return compute(ObjectiveConfig(name="realm"), outputs)[0]

    assert given.null is not None
    checked = (given.null.nan_to_num().requires_grad_(), torch.tensor([0.4], dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(loss, checked, eps=1e-6, atol=1e-8, rtol=1e-6)
    gradients = torch.autograd.grad(loss(*checked), checked)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


@contrastive
def test_contrastive_against_finite_differences(config: ObjectiveConfig) -> None:
    pairs = random_pairs(batch=5)

    def loss(queries: Tensor, passages: Tensor) -> Tensor:
        return contrastive_loss_of(config, Pairs(queries, passages, pairs.numbers))[0]

    assert torch.autograd.gradcheck(loss, (pairs.queries, pairs.passages), eps=1e-6, atol=1e-8, rtol=1e-6)


@generative
@pytest.mark.parametrize("ranks", [2, 4])
def test_pretend_ranks_average_to_the_whole_batch(config: ObjectiveConfig, ranks: int) -> None:
    """Loss and gradient; answers and numbers of passages differ from rank to rank."""
    inputs = random_inputs(batch=8)
    share = 8 // ranks
    parts = [loss_of(config, inputs.rows(r * share, (r + 1) * share))[0] for r in range(ranks)]
    _same(torch.stack(parts).mean(), loss_of(config, inputs)[0], inputs.leaves())


@generative
def test_ranks_of_different_size_average_with_the_common_denominator(config: ObjectiveConfig) -> None:
    inputs = random_inputs(batch=8)
    parts = [loss_of(config, inputs.rows(*span), num_questions=8 / 3)[0] for span in ((0, 1), (1, 3), (3, 8))]
    _same(torch.stack(parts).mean(), loss_of(config, inputs)[0], inputs.leaves())


@contrastive
@pytest.mark.parametrize("ranks", [2, 4])
def test_pretend_ranks_with_gathered_passages(config: ObjectiveConfig, ranks: int) -> None:
    """With all passages gathered, each rank's own queries against all of them average to the whole batch."""
    pairs = random_pairs()
    share = 8 // ranks

    def gather_at(rank: int) -> Gather:
        def gather(rows: Tensor) -> tuple[Tensor, int]:
            return (pairs.passages if rows.is_floating_point() else pairs.numbers), rank * share

        return gather

    parts = [contrastive_loss_of(config, pairs.rows(r * share, (r + 1) * share), gather_at(r))[0] for r in range(ranks)]
    whole = contrastive_loss_of(config, pairs)[0]
    _same(torch.stack(parts).mean(), whole, (pairs.queries, pairs.passages))


def _same(averaged: Tensor, whole: Tensor, leaves: tuple[Tensor, Tensor]) -> None:
    """Equal loss and equal gradients."""
    torch.testing.assert_close(averaged, whole)
    for gradient, reference in zip(
        torch.autograd.grad(averaged, leaves), torch.autograd.grad(whole, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, reference)
