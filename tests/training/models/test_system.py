"""The trained module computes shared parts once, and dropout touches no distillation target."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from transformers import PreTrainedTokenizerFast

from training.models.build import build_system
from training.models.generators.generator import Generator
from training.models.generators.token_scores import token_log_probs
from training.models.model_inputs import RetrievalBatch
from training.models.system import System, has_dropout
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
PASSAGES = [[[20, 21, 22], [23, 24], [25, 26, 27, 28]], [[30, 31], [32]]]  # the second question has one less


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"])


def make(tokenizer: PreTrainedTokenizerFast, kind: str, dropout: float = 0.0, **changes: Any) -> System:
    config = replace(GeneratorConfig(kind=kind, fresh=replace(FRESH, dropout=dropout)), **changes)
    return build_system(ENCODER, config, train="both", tokenizers=(tokenizer, tokenizer), seed=0)


def collate(generator: Generator) -> RetrievalBatch:
    rows = [[np.array(tokens) for tokens in question] for question in PASSAGES]
    questions, answers = [np.array([10, 11]), np.array([12])], [np.array([21]), np.array([30, 31])]
    flat = [rows[0][0], rows[0][1], rows[0][2], rows[1][0], rows[1][1], np.array([0])]
    reader = generator.collate(questions, rows, answers)
    return RetrievalBatch(*pad_rows(questions, 0), *pad_rows(flat, 0), reader)


def count_calls(module: nn.Module) -> list[int]:
    """A list that grows by the number of rows of every call."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_distillation_target_is_scored_without_dropout(
    tokenizer: PreTrainedTokenizerFast, kind: str, dropout: float
) -> None:
    system = make(tokenizer, kind, dropout)
    assert has_dropout(system.generator) == (dropout > 0)
    batch = collate(system.generator)
    objective = ObjectiveConfig(name="pdist")
    expected = system.eval().likelihoods(batch, needs(objective), 1.0)
    found = system.train().likelihoods(batch, needs(objective), 1.0)
    assert system.generator.training
    assert found.per_passage is not None
    assert expected.per_passage is not None
    assert not found.per_passage.requires_grad
    real = batch.generator_batch.passage_mask
    torch.testing.assert_close(found.per_passage[real], expected.per_passage[real])
    assert found.fused is not None
    assert expected.fused is not None
    assert torch.equal(found.fused, expected.fused) == (dropout == 0)


@pytest.mark.parametrize("name", ["pdist", "emdr2"])
@pytest.mark.parametrize("biased", [False, True])
def test_passages_are_projected_once_for_both_scores(
    tokenizer: PreTrainedTokenizerFast, name: str, biased: bool
) -> None:
    """Loss and gradients are those of two passes that share nothing but the encoder."""
    needed = replace(needs(ObjectiveConfig(name=name)), score_bias=biased)
    found = {}
    for checkpointing in (False, True):  # checkpointed layers keep no projections
        system = make(tokenizer, "fusion", gradient_checkpointing=checkpointing).train()
        keys: Any = system.generator.get_submodule("model.decoder.block.0.layer.1.EncDecAttention.k")
        calls = count_calls(keys)
        outputs = system.likelihoods(collate(system.generator), needed, 1.0)
        assert calls == ([2, 6] if checkpointing else [2])
        loss, _ = compute(ObjectiveConfig(name=name), outputs)
        loss.backward()
        gradients = {name: p.grad for name, p in system.named_parameters() if p.grad is not None}
        found[checkpointing] = (loss.detach(), outputs.scores.detach(), gradients)
    torch.testing.assert_close(found[False], found[True], rtol=1e-4, atol=1e-6)


def test_dropout_is_found_wherever_it_is_kept() -> None:
    class Functional(nn.Module):
        def __init__(self, probability: float) -> None:
            super().__init__()
            self.attention_dropout = probability

    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), Functional(0.0)))
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1))))
    assert has_dropout(nn.Sequential(Functional(0.1)))


def test_a_wrong_shape_is_refused() -> None:
    logits, targets, mask = torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3).bool()
    assert token_log_probs(logits, targets, mask).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="targets"):
        token_log_probs(logits, targets[:, :2], mask)
