"""Leaving one passage out, against physically dropping it; reading closed book; how often passages are encoded."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from training.models.build import build_generator, build_system
from training.models.generators.generator import Generator
from training.models.model_inputs import RetrievalBatch
from training.models.system import System
from training.models.text.packing import pad_rows
from training.models.text.tokenizers import train_wordpiece
from training.objectives.dispatch import compute, needs
from training.training_settings import (
    EncoderConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    TokenizerConfig,
)

ENCODER = EncoderConfig(fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32))
FRESH = FreshGeneratorConfig(num_encoder_layers=1, num_decoder_layers=2, hidden=16, num_heads=2, intermediate=32)
KINDS = ("copy", "fusion", "causal")
OBJECTIVES = ("rag_sequence", "rag_token", "realm", "emdr2", "pdist", "loop", "adist", "fused")
QUESTIONS = [np.array([40, 41, 42]), np.array([50, 51]), np.array([60])]
PASSAGES = [
    [np.array([70, 71, 72, 73]), np.array([80]), np.array([81, 82, 83, 84, 85, 86, 87])],
    [np.array([90, 91]), np.array([92, 93, 94])],  # one passage fewer
    [np.array([95, 96])],  # leaving it out is closed book
]
ANSWERS = [np.array([70, 72]), np.array([93, 94, 90, 91]), np.array([], dtype=np.int64)]
NOTHING = np.array([], dtype=np.int64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"])


def make(tokenizer: PreTrainedTokenizerFast, kind: str, **changes: Any) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(kind=kind, fresh=FRESH, length_groups=2, max_passage_tokens=12)
    generator = build_generator(replace(config, **changes), tokenizer).eval()
    with torch.no_grad():
        for parameter in generator.parameters():  # far from uniform, so that equal numbers mean something
            parameter.mul_(2.0)
    return generator


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after_fused", [False, True])
def test_leaving_out_equals_dropping(
    tokenizer: PreTrainedTokenizerFast, kind: str, attention: str, after_fused: bool
) -> None:
    generator = make(tokenizer, kind, attention=attention).train()
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    reading = generator.read(batch)
    if after_fused:  # whose projections of the passages are used again
        generator.fused_log_probs(reading, batch)
    with torch.no_grad():
        left_out = generator.left_out_log_probs(reading, batch)
        assert (left_out.shape, left_out.dtype) == ((3, 3, 5), torch.float32)
        assert left_out.isfinite().all()
        for question, rows in enumerate(PASSAGES):
            for number in range(len(rows)):
                others = [row for i, row in enumerate(rows) if i != number] or [NOTHING]
                asked, answer = QUESTIONS[question : question + 1], ANSWERS[question : question + 1]
                alone = generator.collate(asked, [others], answer)
                expected = generator.fused_log_probs(generator.read(alone), alone)[0]
                found = left_out[question, number]
                torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-4)
                assert not found[len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_with_gradient_is_the_same(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    generator = make(tokenizer, kind).train()
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    reading = generator.read(batch)
    with_gradient = generator.left_out_log_probs(reading, batch)
    generator.fused_log_probs(reading, batch)
    with torch.no_grad():
        without = generator.left_out_log_probs(reading, batch)
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_closed_book(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    generator = make(tokenizer, kind)
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    null = generator.null_log_probs(generator.read(batch), batch)
    closed = generator.collate(QUESTIONS, [[NOTHING]] * 3, ANSWERS)
    torch.testing.assert_close(null, generator.fused_log_probs(generator.read(closed), closed), rtol=1e-4, atol=1e-5)
    assert null.requires_grad
    one = generator.per_passage_log_probs(generator.read(closed), closed)
    torch.testing.assert_close(null, one[:, 0], rtol=1e-4, atol=1e-5)


def test_flash_attention_cannot_leave_out(tokenizer: PreTrainedTokenizerFast) -> None:
    generator: Any = make(tokenizer, "fusion")
    generator.attention = "flash_attention_2"
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    with pytest.raises(ValueError, match=r"generator\.attention=flash_attention_2: must be auto, eager or sdpa"):
        generator.left_out_log_probs(generator.read(batch), batch)


# ---------------------------------------------------------------- the system: encodings and gradients


def system_of(
    tokenizer: PreTrainedTokenizerFast, kind: str, objective: ObjectiveConfig, dropout: float = 0.0, **changes: Any
) -> System:
    config = replace(GeneratorConfig(kind=kind, fresh=replace(FRESH, dropout=dropout)), **changes)
    encoder = replace(ENCODER, towers="separate")
    return build_system(
        encoder, config, train="both", tokenizers=(tokenizer, tokenizer), seed=0, objective=objective
    ).train()


def collate(generator: Generator, k: int = 3) -> RetrievalBatch:
    rows = [list(passages[:k]) for passages in PASSAGES]
    flat = [row for passages in rows for row in [*passages, *[np.array([0])] * (k - len(passages))]]
    return RetrievalBatch(*pad_rows(QUESTIONS, 0), *pad_rows(flat, 0), generator.collate(QUESTIONS, rows, ANSWERS))


def count_rows(module: nn.Module) -> list[int]:
    """A list that grows by the number of rows of every call."""
    rows: list[int] = []
    module.register_forward_hook(
        lambda _, args, kwargs, output: rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["copy", "fusion"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_encodes_every_passage_once(
    tokenizer: PreTrainedTokenizerFast, name: str, kind: str, dropout: float
) -> None:
    """3 x 3 passages by the reader, again only for a target that dropout would touch; 3 closed-book questions where the
    objective reads nothing. The retriever's towers see each text once."""
    objective = ObjectiveConfig(name=name)
    system = system_of(tokenizer, kind, objective, dropout)
    encoder: Any = system.generator
    reader = count_rows(encoder.model.get_encoder() if kind == "fusion" else encoder.encoder.layers[0])
    queries, passages = count_rows(system.retriever.query_encoder), count_rows(system.retriever.passage_encoder)
    compute(objective, system.likelihoods(collate(system.generator), needs(objective), 1.0))[0].backward()
    target = name in ("emdr2", "pdist", "loop", "adist")
    assert sum(reader) == 9 * (2 if target and dropout else 1) + (3 if name in ("loop", "realm") else 0)
    assert (queries, passages) == ([3], [9])


def test_leaving_out_projects_nothing_again(tokenizer: PreTrainedTokenizerFast) -> None:
    """Keys of the fused memories, and of the closed-book questions."""
    objective = ObjectiveConfig(name="loop")
    system = system_of(tokenizer, "fusion", objective)
    keys = count_rows(system.generator.get_submodule("model.decoder.block.0.layer.1.EncDecAttention.k"))
    system.likelihoods(collate(system.generator), needs(objective), 1.0)
    assert keys == [3, 3]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reaches_towers_and_generator(
    tokenizer: PreTrainedTokenizerFast, name: str, kind: str, k: int
) -> None:
    """One passage: everything is finite, and only an empty passage beside it leaves something to learn."""
    objective = ObjectiveConfig(name=name)
    system = system_of(tokenizer, kind, objective)
    batch = collate(system.generator, k)
    if name == "fused" and kind == "causal":
        with pytest.raises(ValueError, match="score_bias=true"):
            system.likelihoods(batch, needs(objective), 1.0)
        return
    loss, stats = compute(objective, system.likelihoods(batch, needs(objective), 1.0))
    loss.backward()
    assert all(value.isfinite() for value in (loss, *stats.values()))
    parts = {
        "query tower": system.retriever.query_encoder,
        "passage tower": system.retriever.passage_encoder,
        "generator": system.generator,
    }
    for part, module in parts.items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert gradients, part
        assert all(gradient.isfinite().all() for gradient in gradients), part
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        if part == "generator" or k > 1:
            assert largest > (1e-3 if part == "generator" else 1e-6), part
    null = system.retriever.null
    assert (null is not None) == (name == "realm")
    if null is not None:
        assert null.score.shape == (1,)
        assert null.score.grad is not None


def test_a_fixed_score_of_nothing_is_no_parameter(tokenizer: PreTrainedTokenizerFast) -> None:
    system = system_of(tokenizer, "copy", ObjectiveConfig(name="realm", null_score="fixed"))
    assert system.retriever.null is None
    outputs = system.likelihoods(collate(system.generator), needs(ObjectiveConfig(name="realm")), 1.0)
    assert outputs.null_score is None
