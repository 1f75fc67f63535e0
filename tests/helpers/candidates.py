"""Inputs for the tests of preference and sampling objectives."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from training.objectives.dispatch import compute
from training.objectives.inputs import Likelihoods, Stats
from training.objectives.preference import Candidates, Reduce
from training.objectives.sampling import sample_log_probs
from training.training_settings import ObjectiveConfig

JUDGED = [
    ObjectiveConfig(name="dpo"),
    ObjectiveConfig(name="dpo", chosen_weight=0.7),
    ObjectiveConfig(name="dpo", beta=0.5, length_normalized=True, temperature=0.7, scale=0.5),
    ObjectiveConfig(name="kto"),
    ObjectiveConfig(name="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, length_normalized=True),
]
SAMPLED = [
    ObjectiveConfig(name="reinforce"),
    ObjectiveConfig(name="reinforce", kl_weight=0.2, temperature=0.7),
    ObjectiveConfig(name="grpo"),
    ObjectiveConfig(name="grpo", kl_weight=0.1, clip=0.3, scale=2.0),
]
DRAWN = [
    ObjectiveConfig(name="stochastic_rag"),
    ObjectiveConfig(name="stochastic_rag", num_selected=1, relaxation=0.5, temperature=2.0),
    ObjectiveConfig(name="reinforce", reward="likelihood"),
]


def label(config: ObjectiveConfig) -> str:
    """A readable test id."""
    extras = [f"{n}={getattr(config, n)}" for n in ("kl_weight", "num_selected", "beta", "reward")]
    return "-".join([config.name, *extras])


@dataclass
class Inputs:
    """Leaves and masks of candidates (`each` = k, or 1 for samples) and of draws."""

    scores: Tensor  # [batch, k]
    log_probs: Tensor  # [batch, group, each, tokens]
    passage_mask: Tensor
    answer_mask: Tensor  # [batch, group, tokens]
    reference_scores: Tensor | None
    reference_log_probs: Tensor | None
    desirable: Tensor
    drawn: Tensor  # [batch, group]
    rewards: Tensor
    old_log_probs: Tensor
    noise: Tensor  # [batch, group, k]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Scores and log-probabilities."""
        return self.scores, self.log_probs

    def rows(self, start: int, stop: int) -> "Inputs":
        """The questions from start to stop, still in the graph of the whole batch."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        part: dict[str, Any] = {name: None if value is None else value[start:stop] for name, value in values.items()}
        return Inputs(**part)


def random_inputs(
    config: ObjectiveConfig, batch: int = 4, k: int = 3, tokens: int = 5, seed: int = 0,
    dtype: torch.dtype = torch.float64, padded: bool = True,
) -> Inputs:  # fmt: skip
    """Answers of 1 to `tokens` tokens; with `padded`, every second question has one passage less."""
    generator = torch.Generator().manual_seed(seed)
    sampled = config in SAMPLED
    group, each = (4, 1) if sampled else (2, k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    lengths = (torch.arange(batch)[:, None] + torch.arange(group)) % tokens + 1
    answer_mask = torch.arange(tokens) < lengths.unsqueeze(-1)
    passage_mask = torch.ones(batch, k, dtype=torch.bool)
    if padded and k > 1:
        passage_mask[1::2, -1] = False
    log_probs = -normal(batch, group, each, tokens).abs() * 2 - 0.01
    reference = -normal(batch, group, each, tokens).abs() * 2 - 0.01
    drawn = torch.randint(0, max(1, k - 1), (batch, group), generator=generator)
    uniform = torch.rand(batch, 4, k, generator=generator, dtype=dtype).clamp_min(1e-9)
    return Inputs(
        scores=(normal(batch, k) * 2).requires_grad_(),
        log_probs=log_probs.masked_fill(~answer_mask.unsqueeze(2), 0.0).requires_grad_(),
        passage_mask=passage_mask,
        answer_mask=answer_mask,
        reference_scores=normal(batch, k),
        reference_log_probs=reference.masked_fill(~answer_mask.unsqueeze(2), 0.0),
        desirable=torch.arange(batch) % 2 == 0,
        drawn=drawn,
        rewards=torch.rand(batch, group, generator=generator, dtype=dtype),
        old_log_probs=-normal(batch, group).abs() * 6,
        noise=-(-uniform.log()).log(),
    )


def near_samples(config: ObjectiveConfig, inputs: Inputs) -> Inputs:
    """The same, for GRPO drawn by a policy whose ratios to this one are inside of the clip and outside on either side,
    and far from its ends, where the loss has no derivative. A ratio of thousands would drown finite differences."""
    if config.name != "grpo":
        return inputs
    outputs = outputs_of(config, inputs)
    assert isinstance(outputs, Candidates)
    now = sample_log_probs(outputs, config.temperature)[0].detach()
    moved = torch.tensor([0.1, -0.6, 0.6, -0.1], dtype=now.dtype)
    return replace(inputs, old_log_probs=now - torch.stack([moved.roll(shift) for shift in range(len(now))]))


def outputs_of(config: ObjectiveConfig, inputs: Inputs, num_questions: float | None = None) -> Likelihoods:
    """What the trained module hands to the objective."""
    if config in DRAWN:
        return Likelihoods(
            scores=inputs.scores,
            passage_mask=inputs.passage_mask,
            answer_mask=inputs.answer_mask[:, 0],
            per_passage=inputs.log_probs[:, 0],
            noise=inputs.noise,
            num_questions=num_questions,
        )
    return Candidates(
        scores=inputs.scores,
        passage_mask=inputs.passage_mask,
        num_questions=num_questions,
        log_probs=inputs.log_probs,
        log_probs_mask=inputs.answer_mask,
        reference_scores=inputs.reference_scores,
        reference_log_probs=inputs.reference_log_probs,
        desirable=inputs.desirable,
        drawn=inputs.drawn,
        rewards=inputs.rewards,
        old_log_probs=inputs.old_log_probs if config.name == "grpo" else None,
    )


def loss_of(
    config: ObjectiveConfig, inputs: Inputs, num_questions: float | None = None, reduce: Reduce = lambda values: values
) -> tuple[Tensor, Stats]:
    """The objective on these inputs."""
    return compute(config, outputs_of(config, inputs, num_questions), reduce)


def pretend_ranks(config: ObjectiveConfig, parts: list[Inputs], num_questions: float | None = None) -> list[Tensor]:
    """The loss of each rank when what they sum is summed over all of them."""
    told: list[Tensor] = []

    def remember(values: Tensor) -> Tensor:
        told.append(values)
        return values

    for part in parts:
        loss_of(config, part, num_questions, remember)
    total: Callable[[Tensor], Tensor] = lambda values: torch.stack(told).sum(dim=0)  # noqa: E731
    return [loss_of(config, part, num_questions, total)[0] for part in parts]


def without_reference(inputs: Inputs) -> Inputs:
    """The same, without a reference."""
    return replace(inputs, reference_scores=None, reference_log_probs=None)
