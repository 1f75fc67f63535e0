"""Inputs for the tests of objectives: every objective, random likelihoods, and a toy reader that takes score bias."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.objectives.contrastive import Gather, in_batch
from training.objectives.dispatch import compute, needs
from training.objectives.inputs import Likelihoods, Stats, retrieval_log_probs
from training.training_settings import ObjectiveConfig

GENERATIVE = [
    ObjectiveConfig(name="rag_sequence"),
    ObjectiveConfig(name="rag_token", temperature=0.7, scale=0.25),
    ObjectiveConfig(name="realm", temperature=0.7),
    ObjectiveConfig(name="emdr2", level="sequence", weight=0.5),
    ObjectiveConfig(name="emdr2", level="token", temperature=2.0),
    ObjectiveConfig(name="pdist", normalization="length", reduction="batch", target_temperature=0.5),
    ObjectiveConfig(name="pdist", normalization="length", reduction="elements", weight=2.0),
    ObjectiveConfig(name="pdist", normalization="none", reduction="batch", temperature=0.7),
    ObjectiveConfig(name="pdist", normalization="none", reduction="elements"),
    ObjectiveConfig(name="pdist", confidence=True),
    ObjectiveConfig(name="loop", target_temperature=0.5),
    ObjectiveConfig(name="loop", reduction="elements", weight=2.0, temperature=0.7),
    ObjectiveConfig(name="adist", weight=0.5),
    ObjectiveConfig(name="adist", reduction="elements", target_temperature=0.5),
    ObjectiveConfig(name="fused", score_bias=True),
    ObjectiveConfig(name="fused", score_bias=False),
]
DISTILLED = ("emdr2", "pdist", "loop", "adist")  # the retriever learns from a detached target
CONTRASTIVE = [ObjectiveConfig(name="inverse_cloze", temperature=0.5), ObjectiveConfig(name="independent_cropping")]


def label(config: ObjectiveConfig) -> str:
    """A readable test id."""
    match config.name:
        case "emdr2":
            return f"emdr2-{config.level}"
        case "pdist":
            sure = "-confidence" if config.confidence else ""
            return f"pdist-{config.normalization}-{config.reduction}{sure}"
        case "loop" | "adist":
            return f"{config.name}-{config.reduction}"
        case "fused":
            return f"fused-{'biased' if config.score_bias else 'plain'}"
        case _:
            return config.name


@dataclass
class Inputs:
    """What encoders and generator give: the leaves of the graph."""

    scores: Tensor  # [batch, k]
    per_passage: Tensor  # [batch, k, tokens]
    passage_mask: Tensor  # bool [batch, k]
    answer_mask: Tensor  # bool [batch, tokens]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Scores and log-probabilities."""
        return self.scores, self.per_passage

    def rows(self, start: int, stop: int) -> "Inputs":
        """The questions from start to stop, still in the graph of the whole batch."""
        return Inputs(
            self.scores[start:stop],
            self.per_passage[start:stop],
            self.passage_mask[start:stop],
            self.answer_mask[start:stop],
        )


def random_inputs(
    batch: int = 4, k: int = 3, tokens: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, padded: bool = True
) -> Inputs:
    """Answers of 1 to `tokens` tokens; with `padded`, every second question has one passage less."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, k, generator=generator, dtype=dtype) * 2
    log_probs = -torch.rand(batch, k, tokens, generator=generator, dtype=dtype) * 3 - 0.01
    lengths = torch.arange(batch) % tokens + 1
    answer_mask = torch.arange(tokens) < lengths.unsqueeze(1)
    passage_mask = torch.ones(batch, k, dtype=torch.bool)
    if padded and k > 1:
        passage_mask[1::2, -1] = False
    log_probs = log_probs.masked_fill(~answer_mask.unsqueeze(1), 0.0)
    return Inputs(scores.requires_grad_(), log_probs.requires_grad_(), passage_mask, answer_mask)


def toy_fused(inputs: Inputs, bias: Tensor | None) -> Tensor:
    """f [batch, tokens] of a reader whose attention is one softmax over passages, with `bias` on its logits."""
    attention = inputs.per_passage.new_tensor([0.3, -0.2, 0.1]).repeat(4)[: inputs.scores.shape[1]]
    logits = attention.expand_as(inputs.scores).masked_fill(~inputs.passage_mask, -1e9)
    if bias is not None:
        logits = logits + bias.masked_fill(~inputs.passage_mask, 0.0)
    counted = inputs.passage_mask.unsqueeze(-1) & inputs.answer_mask.unsqueeze(1)
    values = inputs.per_passage.masked_fill(~counted, 0.0)
    return torch.logsumexp(torch.log_softmax(logits, dim=-1).unsqueeze(-1) + values, dim=1)


def toy_left_out(inputs: Inputs) -> Tensor:
    """f^(-k) [batch, k, tokens] of the toy reader: `toy_fused` with one passage masked at a time."""
    rows: list[Tensor] = []
    for k in range(inputs.scores.shape[1]):
        mask = inputs.passage_mask.clone()
        mask[:, k] = False
        rows.append(toy_fused(replace(inputs, passage_mask=mask), None))
    return torch.stack(rows, dim=1)


def toy_attention(inputs: Inputs) -> Tensor:
    """[batch, k]: what is taken from each passage, the more the likelier it makes the answer."""
    counted = inputs.passage_mask.unsqueeze(-1) & inputs.answer_mask.unsqueeze(1)
    return inputs.per_passage.masked_fill(~counted, 0.0).exp().masked_fill(~counted, 0.0).sum(dim=-1)


def toy_null(inputs: Inputs) -> Tensor:
    """[batch, tokens]: the closed-book reader is the same for every question; NaN where there is no token."""
    tokens = inputs.answer_mask.shape[1]
    null = -0.5 - 0.3 * torch.arange(tokens, dtype=inputs.per_passage.dtype)
    return null.expand(len(inputs.scores), -1).masked_fill(~inputs.answer_mask, float("nan"))


def toy_outputs(inputs: Inputs, num_questions: float | None = None) -> Likelihoods:
    """Everything that an objective may ask for, in the graph of the inputs; the score of no passage is 0.3."""
    return Likelihoods(
        scores=inputs.scores,
        passage_mask=inputs.passage_mask,
        answer_mask=inputs.answer_mask,
        per_passage=inputs.per_passage,
        fused=toy_fused(inputs, None),
        left_out=toy_left_out(inputs),
        attention=toy_attention(inputs),
        null=toy_null(inputs),
        null_score=torch.full((len(inputs.scores),), 0.3),
        num_questions=num_questions,
    )


def loss_of(config: ObjectiveConfig, inputs: Inputs, num_questions: float | None = None) -> tuple[Tensor, Stats]:
    """Computes what the objective needs, as the trained module does, and the objective."""
    wanted = needs(config)
    bias = retrieval_log_probs(inputs.scores, inputs.passage_mask, config.temperature) if wanted.score_bias else None
    given = toy_outputs(inputs, num_questions)
    assert given.per_passage is not None
    assert given.left_out is not None
    assert given.attention is not None
    per_passage = given.per_passage if wanted.per_passage_gradient else given.per_passage.detach()
    outputs = replace(
        given,
        per_passage=per_passage if wanted.per_passage else None,
        fused=toy_fused(inputs, bias) if wanted.fused else None,
        left_out=given.left_out.detach() if wanted.left_out else None,
        attention=given.attention.detach() if wanted.attention else None,
        null=given.null if wanted.null else None,
        null_score=given.null_score if wanted.null else None,
    )
    return compute(config, outputs)


@dataclass
class Pairs:
    """Inputs of a contrastive objective."""

    queries: Tensor  # [batch, dim]
    passages: Tensor  # [batch, dim]
    numbers: Tensor  # int64 [batch]

    def rows(self, start: int, stop: int) -> "Pairs":
        """The pairs from start to stop, still in the graph of the whole batch."""
        return replace(
            self,
            queries=self.queries[start:stop],
            passages=self.passages[start:stop],
            numbers=self.numbers[start:stop],
        )


def random_pairs(batch: int = 8, dim: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pairs:
    """Pairs of which the last two share their passage with the first two."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, dim, generator=generator, dtype=dtype).requires_grad_()
    passages = torch.randn(batch, dim, generator=generator, dtype=dtype).requires_grad_()
    numbers = torch.arange(batch)
    numbers[-2:] = numbers[:2]
    return Pairs(queries, passages, numbers)


def contrastive_loss_of(config: ObjectiveConfig, pairs: Pairs, gather: Gather | None = None) -> tuple[Tensor, Stats]:
    """The contrastive objective at encoder temperature 0.5."""
    assert needs(config).in_batch
    return compute(
        config, in_batch(pairs.queries, pairs.passages, passage_numbers=pairs.numbers, temperature=0.5, gather=gather)
    )
