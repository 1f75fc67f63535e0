"""The reference: a frozen copy, or the system itself with its adapters off."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.training.models.test_system import ENCODER, FRESH, collate, make
from training.engine.engine import Engine
from training.feeding.alignment import with_candidates
from training.feeding.reference import Reference, build_reference, initial_copy
from training.models.answer_candidates import answer_tensors
from training.models.build import build_system, parameter_groups
from training.models.generators.decode import sample as sample_tokens
from training.models.model_inputs import CandidateBatch
from training.models.parts.adapters import adapters_disabled, trains_adapters_only
from training.models.system import System
from training.models.text.tokenizers import train_wordpiece
from training.objectives.dispatch import compute
from training.training_settings import EngineConfig, GeneratorConfig, LoraConfig, ObjectiveConfig, TokenizerConfig

KINDS = ("copy", "fusion", "causal")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"])


def judged(system: System) -> CandidateBatch:
    """Two questions with two answers each, of different lengths."""
    groups = [[np.array([21]), np.array([24, 25])], [np.array([30, 31, 32]), np.array([33])]]
    return with_candidates(collate(system.generator), system.generator, groups, num_trained=2)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_group_are_scored_as_alone(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    system = make(tokenizer, kind).eval()
    batch = judged(system)
    assert batch.answer_mask.sum(-1).tolist() == [[2, 3], [4, 2]]  # end-of-sequence included
    outputs = system.candidates(batch)
    assert outputs.log_probs is not None
    reader = batch.generator_batch
    for number in (0, 1):
        reader.answer_ids, reader.answer_mask = batch.answer_ids[:, number], batch.answer_mask[:, number]
        alone = system.generator.per_passage_log_probs(system.generator.read(reader), reader)
        real = batch.passage_mask
        torch.testing.assert_close(outputs.log_probs[:, number][real], alone[real])
    torch.testing.assert_close(outputs.scores, system.scores(batch))


def test_answers_without_gradient_get_none(tokenizer: PreTrainedTokenizerFast) -> None:
    system = make(tokenizer, "copy")
    batch = judged(system)
    batch.num_trained = 1
    outputs = system.candidates(batch)
    assert outputs.log_probs is not None
    parameters = [p for p in system.parameters() if p.requires_grad]
    for number, some in ((0, True), (1, False)):
        loss = outputs.log_probs[:, number].sum()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients) is some


@pytest.mark.parametrize("offload", [False, True])
def test_a_frozen_copy_stays_where_training_began(tokenizer: PreTrainedTokenizerFast, offload: bool) -> None:
    system = make(tokenizer, "copy", dropout=0.5)
    initial = initial_copy(system)
    assert initial is not None
    engine = Engine(system, EngineConfig(), parameter_groups(system))
    reference = Reference(engine, initial, offload)
    first = reference(judged(system))
    torch.testing.assert_close(first.reference_scores, system.eval().scores(judged(system)).detach())
    config = ObjectiveConfig(name="dpo")
    loss, _ = compute(config, engine(System.candidates, first))
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    for _ in range(2):
        engine.module.train()
        engine.backward(compute(config, engine(System.candidates, first))[0])
        engine.step({"retriever": 0.01, "generator": 0.01})
    again = reference(judged(system))
    assert first.reference_log_probs is not None
    assert again.reference_log_probs is not None
    assert torch.equal(again.reference_log_probs, first.reference_log_probs)  # also without dropout
    assert not again.reference_log_probs.requires_grad
    trained = engine(System.candidates, again).log_probs
    assert trained is not None
    assert not torch.equal(trained, again.reference_log_probs)
    assert not any(parameter.requires_grad for parameter in initial.parameters())


# ---------------------------------------------------------------- adapters


def with_adapters(model: nn.Module) -> nn.Module:
    """The linear layers of a toy model adapted by peft, which freezes the rest."""
    peft = pytest.importorskip("peft", reason="waits for peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=True))


def test_adapters_off_is_the_model_without_them() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(3, 4)
    expected = plain(inputs).detach()
    model = with_adapters(plain)
    assert trains_adapters_only(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    with adapters_disabled(model):
        torch.testing.assert_close(model(inputs), expected)
    assert not torch.allclose(model(inputs), expected)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_a_model_that_trains_more_than_adapters_needs_a_copy() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    next(parameter for parameter in model.parameters() if not parameter.requires_grad).requires_grad_(True)
    assert not trains_adapters_only(model)
    assert not trains_adapters_only(nn.Linear(2, 2).requires_grad_(False))


def test_where_only_adapters_train_the_reference_is_the_start_without_a_copy(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    generator = GeneratorConfig(kind="causal", fresh=FRESH, lora=lora)
    system = build_system(
        replace(ENCODER, lora=lora), generator, train="both", tokenizers=(tokenizer, tokenizer), seed=0
    )
    assert initial_copy(system) is None
    assert initial_copy(make(tokenizer, "causal", lora=lora)) is not None  # its retriever trains as a whole
    start = system.eval().candidates(judged(system))
    engine = Engine(system, EngineConfig(), parameter_groups(system))
    reference = build_reference(engine, None, offload=False, init_from="", run_dir=tmp_path, resumes=False)
    config = ObjectiveConfig(name="dpo")
    for step in range(3):
        batch = reference(judged(system))
        assert start.scores is not None
        assert start.log_probs is not None
        torch.testing.assert_close(batch.reference_scores, start.scores.detach())
        torch.testing.assert_close(batch.reference_log_probs, start.log_probs.detach())
        loss, _ = compute(config, engine(System.candidates, batch))
        assert (loss.item() == pytest.approx(0.693147, abs=1e-6)) is (step == 0)
        engine.backward(loss)
        engine.step({"retriever": 0.05, "generator": 0.05})


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_likelihood_that_scoring_gives(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    torch.manual_seed(0)
    system = make(tokenizer, kind).eval()
    batch = collate(system.generator)
    written = system.sample(batch.generator_batch, 4, 1.0)
    assert len(written.tokens) == batch.generator_batch.passage_mask.numel()
    assert len({tuple(tokens) for tokens in written.tokens}) > 1
    for place in (0, 1, 2):  # the first question's passages
        tokens = written.tokens[place]
        ids, mask = answer_tensors(system.generator, [[np.array(tokens, dtype=np.int64)]] * 2)
        mask = mask[:, 0] & (torch.arange(mask.shape[-1]) < 4)  # an answer cut for length has no end
        reader = batch.generator_batch
        reader.answer_ids, reader.answer_mask = ids[:, 0], mask
        scored = system.generator.per_passage_log_probs(system.generator.read(reader), reader)[0, place].sum()
        assert written.log_probs[place].item() == pytest.approx(scored.item(), abs=2e-4)


def test_tokens_are_drawn_from_the_distribution_at_the_temperature() -> None:
    torch.manual_seed(0)
    log_probs = torch.tensor([0.1, 0.6, 0.3]).log()  # 0 ends
    for temperature in (1.0, 0.5):
        written = sample_tokens(
            lambda prefix: log_probs.expand(len(prefix), 3),
            20_000,
            start_id=2,
            end_id=0,
            max_tokens=1,
            temperature=temperature,
            device="cpu",
        )
        expected = (log_probs / temperature).softmax(dim=-1)
        first = torch.tensor([tokens[0] if tokens else 0 for tokens in written.tokens])
        shares = [float((first == token).float().mean()) for token in range(3)]
        assert shares == pytest.approx(expected.tolist(), abs=0.015)
    for tokens, log_prob in zip(written.tokens[:50], written.log_probs[:50].tolist(), strict=True):
        known = {(): (0.1,), (1,): (0.6, 0.6 * 0.1), (2,): (0.3, 0.3 * 0.1)}[tuple(tokens)]
        assert any(log_prob == pytest.approx(float(np.log(p)), abs=1e-4) for p in known)
