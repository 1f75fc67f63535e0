"""Objectives at the edges: one passage, padding, extreme scores, short and empty answers, duplicates."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.objective_inputs import (
    CONTRASTIVE,
    DISTILLED,
    GENERATIVE,
    Inputs,
    Pairs,
    contrastive_loss_of,
    label,
    loss_of,
    random_inputs,
    random_pairs,
    toy_outputs,
)
from training.objectives.dispatch import compute, needs
from training.training_settings import ObjectiveConfig

generative = pytest.mark.parametrize("config", GENERATIVE, ids=label)
contrastive = pytest.mark.parametrize("config", CONTRASTIVE, ids=label)
distilled = pytest.mark.parametrize("config", [c for c in GENERATIVE if c.name in DISTILLED], ids=label)


@generative
def test_gradient_of_the_scores_flows_unless_only_the_generator_learns(config: ObjectiveConfig) -> None:
    inputs = random_inputs(dtype=torch.float32)
    loss_of(config, inputs)[0].backward()
    scores, per_passage = inputs.leaves()
    assert scores.grad is not None  # always part of the graph
    assert per_passage.grad is not None
    assert bool(scores.grad.abs().max() > 1e-4) is (config != ObjectiveConfig(name="fused", score_bias=False))
    assert per_passage.grad.abs().max() > 1e-4


@distilled
def test_the_target_is_detached_whatever_graph_it_has(config: ObjectiveConfig) -> None:
    inputs = random_inputs()
    outputs = toy_outputs(inputs)
    assert outputs.fused is not None
    compute(config, replace(outputs, fused=outputs.fused.detach()))[0].backward()
    assert inputs.per_passage.grad is None


@generative
def test_a_one_token_answer_teaches_the_retriever(config: ObjectiveConfig) -> None:
    if config == ObjectiveConfig(name="fused", score_bias=False):
        return  # teaches it nothing at any length
    inputs = random_inputs(tokens=1, dtype=torch.float32)
    loss_of(config, inputs)[0].backward()
    assert inputs.scores.grad is not None
    assert (inputs.scores.grad.abs().amax(dim=-1) > 1e-4).all()


@generative
def test_one_passage(config: ObjectiveConfig) -> None:
    inputs = random_inputs(k=1, dtype=torch.float32)
    loss, stats = loss_of(config, inputs)
    loss.backward()
    assert inputs.scores.grad is not None
    assert loss.isfinite()
    if not needs(config).null:  # an empty passage is another one
        assert inputs.scores.grad.abs().max() < 1e-7
    assert stats["retrieval/entropy"].abs() < 1e-7


@generative
@pytest.mark.parametrize("score", [1e4, math.nan])
def test_padded_passages_are_as_if_they_were_not_there(config: ObjectiveConfig, score: float) -> None:
    real = random_inputs(k=3, padded=False)
    wide = Inputs(
        torch.cat([real.scores, torch.full((4, 1), score)], dim=1),
        torch.cat([real.per_passage, torch.full((4, 1, 5), math.nan)], dim=1),
        torch.cat([real.passage_mask, torch.zeros(4, 1, dtype=torch.bool)], dim=1),
        real.answer_mask,
    )
    loss, stats = loss_of(config, real)
    padded_loss, padded = loss_of(config, wide)
    torch.testing.assert_close(padded_loss, loss)
    assert {n: v.item() for n, v in padded.items()} == pytest.approx({n: v.item() for n, v in stats.items()})
    expected = torch.autograd.grad(loss, real.leaves())
    for gradient, reference in zip(torch.autograd.grad(padded_loss, real.leaves()), expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@generative
def test_a_question_of_padding_only_gives_no_gradient_to_the_retriever(config: ObjectiveConfig) -> None:
    inputs = random_inputs(dtype=torch.float32)
    inputs.passage_mask[2] = False
    loss, stats = loss_of(config, inputs)
    loss.backward()
    assert inputs.scores.grad is not None
    assert inputs.per_passage.grad is not None
    assert loss.isfinite()
    assert all(value.isfinite() for value in stats.values())
    assert (inputs.scores.grad[2] == 0).all()
    others = [0, 1, 3]
    kept = Inputs(inputs.scores[others], inputs.per_passage[others], *(mask[others] for mask in _masks(inputs)))
    if not (needs(config).fused or needs(config).null):  # these may still answer without passages
        torch.testing.assert_close(loss, loss_of(config, kept, num_questions=4)[0])
    assert inputs.scores.grad.isfinite().all()
    assert inputs.per_passage.grad.isfinite().all()


@generative
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scores_stay_finite(config: ObjectiveConfig, dtype: torch.dtype) -> None:
    for pattern in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]):
        for log_prob in (-1e4, -1e-6):
            inputs = random_inputs(dtype=torch.float32)
            scores = torch.tensor(pattern, dtype=dtype).repeat(4, 1).requires_grad_()
            inputs = Inputs(scores, (inputs.per_passage.detach() + log_prob).to(dtype), *_masks(inputs))
            inputs.per_passage.requires_grad_()
            loss, stats = loss_of(config, inputs)
            loss.backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert all(value.isfinite() and not value.requires_grad for value in stats.values())
            for leaf in inputs.leaves():
                assert leaf.grad is not None
                assert leaf.grad.isfinite().all()


@generative
def test_only_the_tokens_of_the_answer_count(config: ObjectiveConfig) -> None:
    """Neither prompt nor padding enters the likelihood, not even as NaN."""
    inputs = random_inputs()
    prompt_and_padding = inputs.per_passage.masked_fill(~inputs.answer_mask.unsqueeze(1), math.nan)
    spoiled = Inputs(inputs.scores, prompt_and_padding, *_masks(inputs))
    expected = torch.autograd.grad(loss_of(config, inputs)[0], inputs.leaves())
    loss, _ = loss_of(config, spoiled)
    gradients = torch.autograd.grad(loss, inputs.leaves())
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@generative
def test_an_empty_answer_costs_nothing(config: ObjectiveConfig) -> None:
    inputs = random_inputs(dtype=torch.float32)
    inputs.answer_mask[:] = False
    loss, _ = loss_of(config, inputs)
    loss.backward()
    assert loss.isfinite()
    assert inputs.scores.grad is not None
    assert inputs.scores.grad.isfinite().all()
    if config.name not in ("pdist", "loop", "adist"):  # their target is uniform then: nothing is known of the passages
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


@generative
def test_neither_a_shift_of_scores_nor_the_order_of_passages_counts(config: ObjectiveConfig) -> None:
    inputs = random_inputs(padded=False)
    order = torch.tensor([2, 0, 1])
    if needs(config).fused:
        order = torch.arange(3)  # the toy reader reads passages by place
    shift = 0.0 if needs(config).null else 37.0  # the score of reading nothing stays where it is
    moved = Inputs(inputs.scores[:, order] + shift, inputs.per_passage[:, order], *_masks(inputs))
    torch.testing.assert_close(loss_of(config, moved)[0], loss_of(config, inputs)[0])


@contrastive
def test_contrastive_edges(config: ObjectiveConfig) -> None:
    one = random_pairs(batch=2, dtype=torch.float32).rows(0, 1)  # nothing to contrast with
    loss, _ = contrastive_loss_of(config, one)
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    pairs = random_pairs(batch=4, dtype=torch.float32)
    pairs.numbers[:] = 5  # all from one passage
    loss, _ = contrastive_loss_of(config, pairs)
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    pairs = random_pairs(batch=4, dtype=torch.float32)
    huge = Pairs(pairs.queries * 1e2, pairs.passages * 1e2, pairs.numbers)
    loss, stats = contrastive_loss_of(config, huge)
    gradients = torch.autograd.grad(loss, (pairs.queries, pairs.passages))
    assert all(value.isfinite().all() for value in (loss, *gradients, *stats.values()))


@contrastive
def test_hard_negatives_are_further_rows_of_passages(config: ObjectiveConfig) -> None:
    pairs = random_pairs(batch=8)
    fewer = Pairs(pairs.queries[:3], pairs.passages, torch.arange(8))
    loss, _ = contrastive_loss_of(config, fewer)
    logits = fewer.queries @ fewer.passages.T / 0.5 / config.temperature
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.arange(3)))


def test_autocast_leaves_contrastive_scores_in_full_precision() -> None:
    pairs = random_pairs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = contrastive_loss_of(CONTRASTIVE[0], pairs)
    reference, _ = contrastive_loss_of(
        CONTRASTIVE[0], Pairs(pairs.queries.double(), pairs.passages.double(), pairs.numbers)
    )
    assert inside.item() == pytest.approx(reference.item(), rel=1e-6)


def _masks(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Passage mask and answer mask."""
    return inputs.passage_mask, inputs.answer_mask
