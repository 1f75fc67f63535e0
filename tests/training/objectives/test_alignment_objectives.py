"""Preference and sampling objectives: worked numbers, finite differences, pretend ranks, and the edges."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.candidates import (
    DRAWN,
    JUDGED,
    SAMPLED,
    label,
    loss_of,
    near_samples,
    outputs_of,
    pretend_ranks,
    random_inputs,
    without_reference,
)
from training.objectives.check import needs_reference
from training.objectives.dispatch import compute, needs
from training.objectives.inputs import (
    Likelihoods,
    Needs,
    answer_tokens,
    mixture_log_probs,
    retrieval_log_probs,
)
from training.objectives.preference import Candidates
from training.objectives.sampling import MAX_GAIN, advantages, gumbel_top_k
from training.training_settings import ObjectiveConfig

ALL = [*JUDGED, *SAMPLED, *DRAWN]
every = pytest.mark.parametrize("config", ALL, ids=label)
STOCHASTIC = ObjectiveConfig(name="stochastic_rag")


# ---------------------------------------------------------------- worked numbers


def of_ratios(*ratios: float, desirable: bool = True) -> Candidates:
    """One question and passage whose answers have these log-ratios to a reference of probability 1."""
    log_probs = torch.tensor(ratios).view(1, -1, 1, 1)
    return Candidates(
        scores=torch.zeros(1, 1, requires_grad=True),
        passage_mask=torch.ones(1, 1, dtype=torch.bool),
        log_probs=log_probs,
        log_probs_mask=torch.ones(1, len(ratios), 1, dtype=torch.bool),
        reference_scores=torch.zeros(1, 1),
        reference_log_probs=torch.zeros_like(log_probs),
        desirable=torch.tensor([desirable]),
    )


@pytest.mark.parametrize(
    ("config", "outputs", "expected"),
    [
        (ObjectiveConfig(name="kto"), of_ratios(1.0, 0.2), 0.4800107),
        (ObjectiveConfig(name="kto"), of_ratios(-0.5, 0.2, desirable=False), 0.4825071),
        (ObjectiveConfig(name="kto", desirable_weight=2.0), of_ratios(1.0, 0.2), 2 * 0.4800107),
        (ObjectiveConfig(name="kto", undesirable_weight=0.5), of_ratios(-0.5, 0.2, desirable=False), 0.5 * 0.4825071),
        # z is at least 0: 1 - sigmoid(.1)
        (ObjectiveConfig(name="kto"), of_ratios(1.0, -3.0), 1 - 1 / (1 + math.exp(-0.1))),
        (ObjectiveConfig(name="dpo"), of_ratios(1.0, -0.5), 0.6209570),
        (ObjectiveConfig(name="dpo"), of_ratios(0.3, 0.3), math.log(2)),
        (ObjectiveConfig(name="dpo", chosen_weight=2.0), of_ratios(1.0, -0.5), 0.6209570 - 2.0),
    ],
)
def test_worked_numbers(config: ObjectiveConfig, outputs: Candidates, expected: float) -> None:
    assert compute(config, outputs)[0].item() == pytest.approx(expected, rel=0, abs=2e-7)


def test_worked_marginal() -> None:
    """p = (.6, .4); chosen (.1, .04) under the two passages, rejected (.05, .2); the reference has p = (.5, .5)."""
    scores = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().requires_grad_()
    each = torch.tensor([[[[0.1], [0.04]], [[0.05], [0.2]]]], dtype=torch.float64).log()
    mask, answers = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, 1, dtype=torch.bool)
    outputs = Candidates(
        scores=scores,
        passage_mask=mask,
        log_probs=each,
        log_probs_mask=answers,
        reference_scores=torch.zeros(1, 2).double(),
        reference_log_probs=each,
    )
    loss, stats = compute(ObjectiveConfig(name="dpo"), outputs)
    margin = math.log(0.076 / 0.07) - math.log(0.11 / 0.125)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * margin)), rel=1e-9)
    assert stats["alignment/log_likelihood_accuracy"].item() == 0.0
    assert stats["alignment/accuracy"].item() == 1.0
    loss.backward()
    assert scores.grad is not None
    # d log pi / d s_1 = posterior_1 - p_1, chosen minus rejected
    slope = -0.1 / (1 + math.exp(0.1 * margin))
    assert scores.grad[0, 0].item() == pytest.approx(slope * (0.06 / 0.076 - 0.03 / 0.11), rel=1e-9)


def test_length_normalised_preferences_divide_by_each_answers_tokens() -> None:
    outputs = of_ratios(0.8, 0.1)
    outputs.log_probs = torch.tensor([[[[0.4, 0.4]], [[0.1, 9.0]]]])
    outputs.log_probs_mask = torch.tensor([[[True, True], [True, False]]])
    outputs.reference_log_probs = torch.zeros(1, 2, 1, 2)
    loss, _ = compute(ObjectiveConfig(name="dpo", length_normalized=True), outputs)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * (0.4 - 0.1))), abs=1e-7)
    # The chosen answer counts by its tokens in any case.
    for normalized, margin in ((True, 0.4 - 0.1), (False, 0.8 - 0.1)):
        config = ObjectiveConfig(name="dpo", length_normalized=normalized, chosen_weight=3.0)
        expected = math.log(1 + math.exp(-0.1 * margin)) - 3.0 * 0.4
        assert compute(config, outputs)[0].item() == pytest.approx(expected, abs=1e-6)


def test_the_chosen_answer_teaches_the_retriever_what_a_preference_does_not() -> None:
    """Passage 0 has both answers, passage 1 neither: the preference is indifferent, the likelihood is not."""
    each = torch.tensor([[[[0.4], [0.04]], [[0.4], [0.04]]]], dtype=torch.float64).log()
    slopes = []
    for weight in (0.0, 1.0):
        scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        outputs = Candidates(
            scores=scores,
            passage_mask=torch.ones(1, 2, dtype=torch.bool),
            log_probs=each,
            log_probs_mask=torch.ones(1, 2, 1, dtype=torch.bool),
            reference_scores=torch.zeros(1, 2).double(),
            reference_log_probs=each,
        )
        compute(ObjectiveConfig(name="dpo", chosen_weight=weight), outputs)[0].backward()
        assert scores.grad is not None
        slopes.append(scores.grad[0, 0].item())
    assert slopes == [pytest.approx(0.0, abs=1e-12), pytest.approx(-(0.4 / 0.44 - 0.5), rel=1e-9)]


def samples(rewards: list[float], old: list[float] | None = None) -> tuple[Tensor, Candidates]:
    """Two samples, one of each passage; p = (.6, .4), answers of probability .5 and .25."""
    scores = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().requires_grad_()
    return scores, Candidates(
        scores=scores,
        passage_mask=torch.ones(1, 2, dtype=torch.bool),
        log_probs=torch.tensor([[[[0.5]], [[0.25]]]], dtype=torch.float64).log(),
        log_probs_mask=torch.ones(1, 2, 1, dtype=torch.bool),
        drawn=torch.tensor([[0, 1]]),
        rewards=torch.tensor([rewards], dtype=torch.float64),
        old_log_probs=None if old is None else torch.tensor([old], dtype=torch.float64),
    )


def test_worked_reinforce() -> None:
    """Rewards 1 and 0: advantages +-.5 / (.5 + 1e-6)."""
    scores, outputs = samples([1.0, 0.0])
    advantage = 0.5 / (0.5 + 1e-6)
    loss, stats = compute(ObjectiveConfig(name="reinforce"), outputs)
    assert loss.item() == pytest.approx(-advantage * (math.log(0.3) - math.log(0.1)) / 2, rel=1e-9)
    assert stats["alignment/reward"].item() == 0.5
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-advantage / 2, advantage / 2], rel=1e-9)


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ((0.0, 0.0), 0.0),  # ratio 1
        ((0.1, 0.1), 0.0),
        ((0.5, 0.0), -(1.2 - 1) / 2),  # a good sample counts no more than 1 + clip
        ((-0.5, 0.0), -(math.exp(-0.5) - 1) / 2),  # but in full where it got less likely
        ((0.0, -0.5), -(1 - 0.8) / 2),  # a bad sample has been pushed far enough
        ((0.0, 0.5), -(1 - math.exp(0.5)) / 2),
    ],
)
def test_worked_clip(moved: tuple[float, float], expected: float) -> None:
    scores, outputs = samples([1.0, 0.0], [math.log(0.3) - moved[0], math.log(0.1) - moved[1]])
    loss, _ = compute(ObjectiveConfig(name="grpo"), outputs)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert scores.grad is not None


def test_grpo_on_its_own_samples_has_the_gradient_of_reinforce() -> None:
    gradients = []
    for name in ("grpo", "reinforce"):
        scores, outputs = samples([3.0, 1.0])
        compute(ObjectiveConfig(name=name), outputs)[0].backward()
        gradients.append(scores.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_worked_divergence() -> None:
    """x = log ref - log pi is log 2 and -log 2: exp(x) - x - 1 is 1 - log 2 and log 2 - .5."""
    _, outputs = samples([1.0, 1.0])
    outputs.reference_scores = outputs.scores.detach()
    outputs.reference_log_probs = torch.tensor([[[[1.0]], [[0.125]]]], dtype=torch.float64).log()
    loss, stats = compute(ObjectiveConfig(name="grpo", kl_weight=0.5), outputs)
    assert stats["alignment/kl"].item() == pytest.approx(0.25, rel=1e-9)
    assert loss.item() == pytest.approx(0.125, rel=1e-9)


def test_worked_stochastic_selection() -> None:
    """Perturbed logits log(.5, .3, .2): the first two are drawn, with probabilities .5 and .3 / .5."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    hard, soft = gumbel_top_k(logits, torch.ones(1, 3, dtype=torch.bool), 2, 1.0)
    assert hard.tolist() == [[True, True, False]]
    assert soft[0].tolist() == pytest.approx([0.5, 0.3 + 0.6, 0.2 + 0.4])


def test_stochastic_rag_is_the_straight_through_mixture() -> None:
    """Against the textbook form, m = hard + soft - detached soft inside the logarithm, where no bound is reached."""
    inputs = random_inputs(STOCHASTIC, padded=False)
    mild = replace(inputs, log_probs=(inputs.log_probs.detach() * 0.1).requires_grad_())
    outputs = outputs_of(STOCHASTIC, mild)
    loss, _ = compute(STOCHASTIC, outputs)
    prior = retrieval_log_probs(mild.scores, mild.passage_mask)
    hard, soft = gumbel_top_k(prior + mild.noise[:, 0], mild.passage_mask, 2, 1.0)
    assert outputs.per_passage is not None
    assert outputs.answer_mask is not None
    totals = answer_tokens(outputs.per_passage, outputs.answer_mask).sum(dim=-1)  # padding gets no gradient
    mixture = hard + soft - soft.detach()
    textbook = -(mixture * totals.exp() / 2).sum(dim=-1).log().mean()
    torch.testing.assert_close(loss, textbook)
    for gradient, reference in zip(
        torch.autograd.grad(loss, mild.leaves()), torch.autograd.grad(textbook, mild.leaves()), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


def test_a_passage_that_was_not_drawn_weighs_at_most_the_bound() -> None:
    scores = torch.tensor([[0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    outputs = Likelihoods(
        scores=scores,
        passage_mask=torch.ones(1, 2, dtype=torch.bool),
        answer_mask=torch.ones(1, 1, dtype=torch.bool),
        per_passage=torch.tensor([[[-1e4], [-0.1]]], dtype=torch.float64),
        noise=torch.zeros(1, 1, 2),
    )
    loss, _ = compute(replace(STOCHASTIC, num_selected=1), outputs)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    p = torch.softmax(scores.detach(), dim=-1)[0]
    assert scores.grad is not None
    # -sum_z gain_z dp_z/ds_1 with gains 1 and MAX_GAIN
    assert scores.grad[0, 1].item() == pytest.approx(-(MAX_GAIN - 1) * float(p[0] * p[1]), rel=1e-6)


def test_worked_reinforce_over_passages() -> None:
    """Draws of passages 1 and 2; the gold answer has .5 under the first, .25 under the second."""
    scores = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().requires_grad_()
    per_passage = torch.tensor([[[0.5], [0.25]]], dtype=torch.float64).log().requires_grad_()
    outputs = Likelihoods(
        scores=scores,
        passage_mask=torch.ones(1, 2, dtype=torch.bool),
        answer_mask=torch.ones(1, 1, dtype=torch.bool),
        per_passage=per_passage,
        noise=torch.tensor([[[5.0, 0.0], [0.0, 5.0]]]),
    )
    loss, stats = compute(ObjectiveConfig(name="reinforce", reward="likelihood"), outputs)
    assert stats["loss/generator"].item() == pytest.approx(-math.log((0.5 + 0.25) / 2), rel=1e-9)
    loss.backward()
    assert scores.grad is not None
    assert per_passage.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-0.5, 0.5], rel=1e-5)
    assert per_passage.grad.flatten().tolist() == pytest.approx([-2 / 3, -1 / 3], rel=1e-9)


def test_worked_centered_advantage() -> None:
    """log .5 and log .25 differ by log 2: each is log 2 / 2 from the mean, whatever the deviation."""
    rewards = torch.tensor([[0.5, 0.25], [0.3, 0.3]], dtype=torch.float64).log()
    half = math.log(2) / 2
    assert advantages(rewards, "centered").flatten().tolist() == pytest.approx([half, -half, 0.0, 0.0])
    scores, outputs = samples([1.0, 0.0])
    loss, _ = compute(ObjectiveConfig(name="reinforce", advantage="centered"), outputs)
    assert loss.item() == pytest.approx(-0.5 * (math.log(0.3) - math.log(0.1)) / 2, rel=1e-9)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-0.25, 0.25], rel=1e-9)


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
def test_a_group_of_equal_rewards_contributes_exactly_nothing(rewards: list[float]) -> None:
    assert advantages(torch.tensor([rewards, [0.0, 1.0, 2.0]]))[0].tolist() == [0.0, 0.0, 0.0]
    for name in ("grpo", "reinforce"):
        config = ObjectiveConfig(name=name)
        inputs = random_inputs(SAMPLED[0], dtype=torch.float32)
        inputs = without_reference(replace(inputs, rewards=torch.full((4, 4), rewards[0])))
        loss, stats = loss_of(config, inputs)
        loss.backward()
        assert loss.item() == 0.0
        assert all(value.isfinite() for value in stats.values())
        for leaf in inputs.leaves():
            assert leaf.grad is not None
            assert (leaf.grad == 0).all()


def test_advantages_do_not_depend_on_the_scale_of_rewards() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 3.0]])
    expected = (rewards - 1) / rewards.std(correction=0)
    torch.testing.assert_close(advantages(rewards), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(100 * rewards + 7), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- finite differences


@every
def test_scores_against_finite_differences(config: ObjectiveConfig) -> None:
    """Padded passages, padded tokens and a question of padding only included. Stochastic RAG's hard selection has no
    derivative: `test_stochastic_rag_is_the_straight_through_mixture` checks it."""
    if config.name == "stochastic_rag":
        return
    inputs = random_inputs(config, tokens=3)
    inputs.passage_mask[3] = False
    inputs = near_samples(config, inputs)
    sums = torch.tensor([0.3, 4.0], dtype=torch.float64)  # KTO's z is a constant of the loss

    def loss(scores: Tensor) -> Tensor:
        moved = replace(inputs, scores=scores, log_probs=inputs.log_probs.detach())
        return loss_of(config, moved, reduce=lambda _: sums)[0]

    assert torch.autograd.gradcheck(loss, (inputs.scores,), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("config", [*JUDGED, *SAMPLED, *(c for c in DRAWN if c.name == "stochastic_rag")], ids=label)
def test_generator_against_finite_differences(config: ObjectiveConfig) -> None:
    """Of the answers that get gradient: KTO's mismatched ones and the rewards of draws are constants."""
    inputs = random_inputs(config, tokens=2)
    inputs.passage_mask[3] = False
    inputs = near_samples(config, inputs)
    first = inputs.log_probs.detach()[:, :1].clone().requires_grad_()
    others = inputs.log_probs.detach()[:, 1:]

    def loss(log_probs: Tensor) -> Tensor:
        scores = inputs.scores.detach().requires_grad_()
        return loss_of(config, replace(inputs, scores=scores, log_probs=torch.cat([log_probs, others], dim=1)))[0]

    assert torch.autograd.gradcheck(loss, (first,), eps=1e-6, atol=1e-8, rtol=1e-6)


# ---------------------------------------------------------------- ranks


@every
@pytest.mark.parametrize("ranks", [2, 4])
def test_pretend_ranks_average_to_the_whole_batch(config: ObjectiveConfig, ranks: int) -> None:
    inputs = random_inputs(config, batch=8)
    share = 8 // ranks
    parts = [inputs.rows(rank * share, (rank + 1) * share) for rank in range(ranks)]
    _same(torch.stack(pretend_ranks(config, parts)).mean(), loss_of(config, inputs)[0], inputs.leaves())


@every
def test_ranks_of_different_size_average_with_the_common_denominator(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config, batch=8)
    parts = [inputs.rows(*span) for span in ((0, 1), (1, 3), (3, 8))]
    averaged = torch.stack(pretend_ranks(config, parts, num_questions=8 / 3)).mean()
    _same(averaged, loss_of(config, inputs)[0], inputs.leaves())


def test_z_of_one_rank_is_not_z_of_all() -> None:
    """Otherwise the tests above prove nothing."""
    config = ObjectiveConfig(name="kto", beta=1.0)
    inputs = random_inputs(JUDGED[2], batch=8)
    inputs = replace(inputs, reference_log_probs=inputs.log_probs.detach() - torch.arange(8).view(8, 1, 1, 1))
    alone = torch.stack([loss_of(config, inputs.rows(r, r + 4))[0] for r in (0, 4)]).mean()
    assert abs(alone.item() - loss_of(config, inputs)[0].item()) > 1e-3


def _same(averaged: Tensor, whole: Tensor, leaves: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(averaged, whole)
    for gradient, reference in zip(
        torch.autograd.grad(averaged, leaves), torch.autograd.grad(whole, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


# ---------------------------------------------------------------- edges


@every
def test_gradient_reaches_the_retriever_and_the_generator(config: ObjectiveConfig) -> None:
    for tokens in (5, 1):  # a one-token answer too
        inputs = random_inputs(config, tokens=tokens, dtype=torch.float32)
        loss_of(config, inputs)[0].backward()
        for leaf in inputs.leaves():
            assert leaf.grad is not None
            assert leaf.grad.abs().max() > 1e-4
            assert leaf.grad.dtype == torch.float32


@every
def test_one_passage(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config, k=1, dtype=torch.float32)
    loss, stats = loss_of(config, inputs)
    loss.backward()
    assert inputs.scores.grad is not None
    assert loss.isfinite()
    assert inputs.scores.grad.abs().max() < 1e-6
    assert all(value.isfinite() for value in stats.values())


@every
@pytest.mark.parametrize("score", [1e4, math.nan])
def test_padded_passages_are_as_if_they_were_not_there(config: ObjectiveConfig, score: float) -> None:
    real = random_inputs(config, padded=False)

    def wider(values: Tensor, fill: float, dim: int) -> Tensor:
        shape = list(values.shape)
        shape[dim] = 1
        return torch.cat([values, torch.full(shape, fill, dtype=values.dtype)], dim=dim)

    assert real.reference_scores is not None
    assert real.reference_log_probs is not None
    wide = replace(
        real,
        scores=wider(real.scores, score, 1),
        passage_mask=wider(real.passage_mask, 0, 1).bool(),
        reference_scores=wider(real.reference_scores, score, 1),
        noise=wider(real.noise, score, 2),
    )
    if config not in SAMPLED:
        wide = replace(
            wide,
            log_probs=wider(real.log_probs, math.nan, 2),
            reference_log_probs=wider(real.reference_log_probs, math.nan, 2),
        )
    loss, stats = loss_of(config, real)
    padded_loss, padded = loss_of(config, wide)
    torch.testing.assert_close(padded_loss, loss)
    assert {n: v.item() for n, v in padded.items()} == pytest.approx({n: v.item() for n, v in stats.items()})
    expected = torch.autograd.grad(loss, real.leaves())
    for gradient, reference in zip(torch.autograd.grad(padded_loss, real.leaves()), expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@every
def test_a_question_of_padding_only_gives_no_gradient_to_the_retriever(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config, dtype=torch.float32)
    inputs.passage_mask[2] = False
    loss, stats = loss_of(config, inputs)
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() for value in stats.values())
    for leaf in inputs.leaves():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert inputs.scores.grad is not None
    assert (inputs.scores.grad[2] == 0).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scores_stay_finite(config: ObjectiveConfig, dtype: torch.dtype) -> None:
    for pattern in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]):
        for log_prob in (-1e4, -1e-6):
            base = random_inputs(config, dtype=torch.float32)
            scores = torch.tensor(pattern, dtype=dtype).repeat(4, 1).requires_grad_()
            log_probs = (base.log_probs.detach() + log_prob).to(dtype).requires_grad_()
            inputs = replace(base, scores=scores, log_probs=log_probs)
            loss, stats = loss_of(config, inputs)
            loss.backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert all(value.isfinite() and not value.requires_grad for value in stats.values())
            for leaf in inputs.leaves():
                assert leaf.grad is not None
                assert leaf.grad.isfinite().all()


@every
def test_only_the_tokens_of_the_answer_count(config: ObjectiveConfig) -> None:
    """Neither prompt nor padding enters a likelihood, not even as NaN: retrieved tokens are context."""
    inputs = random_inputs(config)
    spoiled = replace(inputs, log_probs=inputs.log_probs.masked_fill(~inputs.answer_mask.unsqueeze(2), math.nan))
    expected = torch.autograd.grad(loss_of(config, inputs)[0], inputs.leaves())
    gradients = torch.autograd.grad(loss_of(config, spoiled)[0], inputs.leaves())
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@every
def test_an_empty_answer_is_finite(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config, dtype=torch.float32)
    inputs.answer_mask[:] = False
    loss, _ = loss_of(config, inputs)
    loss.backward()
    assert loss.isfinite()
    assert inputs.scores.grad is not None
    assert inputs.scores.grad.isfinite().all()


@every
def test_a_shift_of_scores_changes_nothing(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config)
    moved = replace(inputs, scores=inputs.scores + 37.0)
    torch.testing.assert_close(loss_of(config, moved)[0], loss_of(config, inputs)[0])


@pytest.mark.parametrize("config", [*JUDGED, *SAMPLED], ids=label)
def test_neither_reference_nor_rewards_carry_gradient(config: ObjectiveConfig) -> None:
    inputs = random_inputs(config)
    assert inputs.reference_scores is not None
    assert inputs.reference_log_probs is not None
    constants = (inputs.reference_scores, inputs.reference_log_probs, inputs.rewards, inputs.old_log_probs)
    for constant in constants:
        constant.requires_grad_()
    loss_of(config, inputs)[0].backward()
    assert inputs.reference_scores.grad is None
    assert inputs.reference_log_probs.grad is None
    assert inputs.old_log_probs.grad is None


def test_without_a_reference_its_log_likelihoods_are_nothing() -> None:
    config = ObjectiveConfig(name="dpo")
    inputs = random_inputs(JUDGED[0])
    loss, _ = loss_of(config, without_reference(inputs))
    prior = retrieval_log_probs(inputs.scores, inputs.passage_mask)
    each = [mixture_log_probs(prior, inputs.log_probs[:, g].sum(-1), inputs.passage_mask) for g in (0, 1)]
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-0.1 * (each[0] - each[1])).mean())


def test_draws_follow_the_retriever() -> None:
    """With Gumbel noise, the share of draws is p(z|q); the first draw of a selection too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20_000, 3)
    noise = -(-torch.rand(20_000, 3, generator=generator).log()).log()
    hard, _ = gumbel_top_k(logits + noise, torch.ones(20_000, 3, dtype=torch.bool), 1, 1.0)
    assert hard.float().mean(dim=0).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


# ---------------------------------------------------------------- settings


def test_needs() -> None:
    assert needs(ObjectiveConfig(name="dpo")) == Needs(candidates=True)
    assert needs(ObjectiveConfig(name="grpo")) == Needs(candidates=True)
    assert needs(ObjectiveConfig(name="kto")).candidates
    passages = ObjectiveConfig(name="reinforce", reward="likelihood", group_size=6)
    assert needs(passages) == Needs(per_passage=True, per_passage_gradient=True, num_draws=6)
    assert needs(STOCHASTIC).num_draws == 1
    assert [needs_reference(ObjectiveConfig(name=name)) for name in ("dpo", "kto", "grpo")] == [True, True, False]
    assert needs_reference(ObjectiveConfig(name="grpo", kl_weight=0.1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(name="grpo", group_size=1), "objective.group_size=1: must be 2 or above"),
        (ObjectiveConfig(name="reinforce", group_size=1), "objective.group_size=1: must be 2 or above"),
        (ObjectiveConfig(name="grpo", reward="likelihood"), "objective.reward=likelihood: must be exact_match, f1"),
        (ObjectiveConfig(name="grpo", reward="exact"), "objective.reward=exact: must be exact_match, f1"),
        (ObjectiveConfig(name="grpo", reward="a/b.py:"), "objective.reward=a/b.py:"),
        (ObjectiveConfig(name="grpo", clip=0.0), "objective.clip=0.0: must be above 0"),
        (ObjectiveConfig(name="grpo", advantage="raw"), "objective.advantage=raw: must be one of normalized, centered"),
        (ObjectiveConfig(name="dpo", beta=math.nan), "objective.beta=nan"),
        (ObjectiveConfig(name="dpo", chosen_weight=-1.0), "objective.chosen_weight=-1.0: must not be negative"),
        (ObjectiveConfig(name="kto", desirable_weight=-1.0), "objective.desirable_weight=-1.0"),
        (ObjectiveConfig(name="stochastic_rag", num_selected=0), "objective.num_selected=0"),
        (ObjectiveConfig(name="stochastic_rag", relaxation=0.0), "objective.relaxation=0.0"),
    ],
)
def test_bad_settings_are_refused(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needs(config)
