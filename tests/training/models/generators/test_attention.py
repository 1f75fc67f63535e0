"""Attention mass of passages against the models' own attentions and values; which generators are refused."""

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.models.build import build_generator, build_system
from training.models.generators.attention import has_attention, rerouted
from training.models.generators.copy_layers import Attention
from training.models.generators.copy_reader import CopyReader
from training.models.generators.generator import Generator
from training.models.text.tokenizers import train_wordpiece
from training.training_settings import (
    EncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    TokenizerConfig,
)

FRESH = FreshGeneratorConfig(num_encoder_layers=1, num_decoder_layers=2, hidden=16, num_heads=2, intermediate=32)
QUESTIONS = [np.array([40, 41, 42]), np.array([50, 51]), np.array([60])]
PASSAGES = [
    [np.array([70, 71, 72, 73]), np.array([80]), np.array([81, 82, 83, 84, 85, 86, 87])],
    [np.array([90, 91]), np.array([92, 93, 94])],  # one passage fewer
    [np.array([95, 96])],
]
ANSWERS = [np.array([70, 72]), np.array([93, 94, 90, 91]), np.array([], dtype=np.int64)]
CASES = ("t5", "bart", "fresh llama", "llama", "gpt2")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"])


def checkpoint(case: str, folder: Path, words: int) -> str:
    """A folder with tiny random weights; empty for what is built fresh."""
    ids: dict[str, Any] = {"vocab_size": words, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    match case:
        case "bart":
            sizes: dict[str, Any] = {"d_model": 16, "max_position_embeddings": 200, "decoder_start_token_id": 3}
            for side in ("encoder", "decoder"):
                sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
            model: Any = BartForConditionalGeneration(BartConfig(**sizes, **ids, init_std=0.5))
        case "llama":  # two query heads share a key head
            shape = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
            model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, initializer_range=0.5, **ids))  # pyright: ignore
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=300, **ids))
        case "mamba":
            model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **ids))
        case _:
            return ""
    model.save_pretrained(folder / case)
    return str(folder / case)


def make(case: str, tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any) -> Any:
    kind = "copy" if case == "copy" else "fusion" if case in ("t5", "bart") else "causal"
    config = GeneratorConfig(
        kind=kind, fresh=FRESH, name=checkpoint(case, folder, len(tokenizer)), length_groups=2, max_passage_tokens=12
    )
    torch.manual_seed(0)
    generator = build_generator(replace(config, **changes), tokenizer).eval()
    with torch.no_grad():
        for parameter in generator.parameters():  # far from uniform attention
            parameter.mul_(2.0)
    return generator


def taken(attentions: Any, values: list[Tensor], first: int, last: int) -> Tensor:
    """[keys] of one row: probability times norm of the value, mean over heads, summed over layers and over the queries
    from `first` to `last`, number by number."""
    keys = attentions[0].shape[-1]
    total = torch.zeros(keys)
    for layer, weights in enumerate(attentions):
        heads = weights.shape[1]
        for head, key in itertools.product(range(heads), range(keys)):
            value = values[layer][0, head * values[layer].shape[1] // heads, key]
            probability = weights[0, head, first:last, key].sum()
            total[key] += probability * math.sqrt(float((value * value).sum())) / heads
    return total


def by_hand(generator: Any, batch: Any, question: int) -> list[float]:
    """Mass of each passage of one question, by the model's own `output_attentions` and cache."""
    model, answer = generator.model, [*ANSWERS[question].tolist(), 3]
    if hasattr(batch, "joint_ids"):
        prompt = batch.joint_ids[question][batch.joint_mask[question]].tolist()
        out = model(input_ids=torch.tensor([[*prompt, *answer]]), output_attentions=True, use_cache=True)
        values = [layer.values for layer in out.past_key_values.layers]
        mass = taken(out.attentions, values, len(prompt) - 1, len(prompt) - 1 + len(answer))
        owners = batch.joint_passage[question][batch.joint_mask[question]].tolist()
        return [float(mass[: len(owners)][torch.tensor(owners) == k].sum()) for k in range(len(PASSAGES[question]))]
    states, spans = [], []
    k = batch.passage_mask.shape[1]
    for number in range(len(PASSAGES[question])):
        row = question * k + number
        ids = batch.source_ids[row][batch.source_mask[row]][None]
        states.append(model.get_encoder()(input_ids=ids).last_hidden_state[0])
        spans.append(len(states[-1]))
    out = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=torch.cat(states)[None]),  # pyright: ignore
        decoder_input_ids=torch.tensor([[generator.decoder_start_id, *answer[:-1]]]),
        output_attentions=True,
        use_cache=True,
    )
    values = [layer.values for layer in out.past_key_values.cross_attention_cache.layers]
    return [float(part.sum()) for part in taken(out.cross_attentions, values, 0, len(answer)).split(spans)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_mass_equals_the_models_own_attentions_and_values(
    case: str, attention: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    generator = make(case, tokenizer, tmp_path, attention=attention)
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    reading = generator.read(batch)
    log_probs, mass = generator.fused_with_attention(reading, batch)
    torch.testing.assert_close(log_probs, generator.fused_log_probs(reading, batch))
    assert not mass.requires_grad
    assert (mass.shape, mass.dtype) == ((3, 3), torch.float32)
    assert mass[1, 2] == 0
    assert (mass[2, 1:] == 0).all()
    reference = make(case, tokenizer, tmp_path, attention="eager")
    with torch.no_grad():
        for question, rows in enumerate(PASSAGES):
            expected = by_hand(reference, batch, question)
            assert mass[question, : len(rows)].tolist() == pytest.approx(expected, rel=1e-3)
            assert min(expected) > 0


def test_mass_of_the_copy_reader(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """From what enters its cross-attention, one question at a time."""
    reader = make("copy", tokenizer, tmp_path)
    assert isinstance(reader, CopyReader)
    batch = reader.collate(QUESTIONS, PASSAGES, ANSWERS)
    log_probs, mass = reader.fused_with_attention(reader.read(batch), batch)
    torch.testing.assert_close(log_probs, reader.fused_log_probs(reader.read(batch), batch))
    caught: list[tuple[Attention, Tensor, Tensor, Tensor]] = []
    for layer in reader.decoder:
        cross: Any = layer.get_submodule("cross_attention")
        cross.register_forward_hook(lambda module, given, _: caught.append((module, *given[:3])))
    for question, rows in enumerate(PASSAGES):
        caught.clear()
        alone = reader.collate(QUESTIONS[question : question + 1], [rows], ANSWERS[question : question + 1])
        with torch.no_grad():
            reader.fused_log_probs(reader.read(alone), alone)
        lengths = [len(QUESTIONS[question]) + len(row) + 3 for row in rows]
        expected = torch.zeros(len(rows))
        for module, x, keys, values in caught:
            for head, t in itertools.product(range(2), range(len(ANSWERS[question]) + 1)):
                query = module.split(module.query(x))[0, head, t]
                weights = (keys[0, head] @ query / math.sqrt(len(query))).softmax(0)
                parts = (weights * values[0, head].norm(dim=-1)).split(lengths)
                expected += torch.stack([part.sum() for part in parts]) / 2
        torch.testing.assert_close(mass[question, : len(rows)], expected, rtol=1e-4, atol=1e-5)
        assert not mass[question, len(rows) :].any()


@pytest.mark.parametrize("case", ["copy", "t5", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_looking_changes_no_gradient(
    case: str, checkpointing: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if case == "copy" and checkpointing:
        pytest.skip("the copy reader has no checkpointed layers")
    generator = make(case, tokenizer, tmp_path, gradient_checkpointing=checkpointing).train()
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    found = []
    for look in (True, False):
        generator.zero_grad()
        reading = generator.read(batch)
        log_probs = (
            generator.fused_with_attention(reading, batch)[0] if look else generator.fused_log_probs(reading, batch)
        )
        log_probs.sum().backward()
        found.append({name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_only_the_models_own_attention_is_rerouted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, second = (make("fresh llama", tokenizer, tmp_path) for _ in range(2))
    calls: list[nn.Module] = []

    def note(attend: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any) -> Any:
        calls.append(module)
        return attend(module, query, key, value, mask, **options)

    ids = torch.tensor([[40, 41]])
    with rerouted(first.model, note):
        with rerouted(first.model, note):
            second.model(input_ids=ids)
            assert not calls
            first.model(input_ids=ids)
            assert len(calls) == 4  # two layers, both reroutings
        first.model(input_ids=ids)
        assert len(calls) == 6
    with contextlib.suppress(IndexError), rerouted(first.model, note):
        first.model(input_ids=torch.tensor([[10_000]]))
    first.model(input_ids=ids)
    assert len(calls) == 6
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_generators_without_attention_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    mamba = make("mamba", tokenizer, tmp_path, attention="eager")
    assert isinstance(mamba, Generator)
    batch = mamba.collate(QUESTIONS, PASSAGES, ANSWERS)
    message = r"objective\.name=adist: must be another one.* MambaForCausalLM \(a state-space model\) has no"
    with pytest.raises(ValueError, match=message):
        mamba.fused_with_attention(None, batch)
    config = GeneratorConfig(kind="causal", name=str(tmp_path / "mamba"), attention="eager")
    models: dict[str, Any] = {"train": "both", "tokenizers": (tokenizer, tokenizer), "seed": 0}
    with pytest.raises(ValueError, match=message):
        build_system(EncoderConfig(), config, objective=ObjectiveConfig(name="adist"), **models)
    build_system(EncoderConfig(), config, objective=ObjectiveConfig(name="loop"), **models)  # needs no attention of it
    for case in ("t5", "fresh llama"):
        generator = make(case, tokenizer, tmp_path)
        generator.attention = "flash_attention_2"
        given = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
        with pytest.raises(ValueError, match=r"generator\.attention=flash_attention_2: must be auto, eager or sdpa"):
            generator.fused_with_attention(generator.read(given), given)
    with torch.device("meta"):
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        hybrid = JambaForCausalLM(
            JambaConfig(**sizes, vocab_size=50, attn_layer_period=2, attn_layer_offset=1, num_experts=1)
        )
    assert has_attention(hybrid)
