"""Costs of an answer: formulas by hand, shapes against torch's operation counter and against real caches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers.tiny_world import TinyWorld
from training.data import Collator
from training.measuring.costs import (
    CostModel,
    answer_flops,
    kept_bytes,
    prompt_lengths,
    read_flops,
    write_flops,
)
from training.models.arithmetic import Shape, Stack, causal_shape, encoder_stack, fusion_shape, shape_of
from training.models.build import build_system
from training.models.generators.copy_reader import CopyBatch
from training.training_settings import EncoderConfig, FreshEncoderConfig, GeneratorConfig

SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, **SPECIAL}


def model_of(family: str) -> PreTrainedModel:
    """A tiny random model, in evaluation mode."""
    match family:
        case "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS, intermediate_size=48))
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
            )
        case "mamba":
            model = MambaForCausalLM(MambaConfig(**SIZE, state_size=8, conv_kernel=4, expand=2))
        case "mamba2":
            model = Mamba2ForCausalLM(
                Mamba2Config(**SIZE, state_size=8, expand=2, head_dim=16, num_heads=4, n_groups=1, chunk_size=8)
            )
        case "jamba":
            places: dict[str, Any] = {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
            }
            experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
            mamba: dict[str, Any] = {"mamba_d_state": 8, "mamba_dt_rank": 4}
            model = JambaForCausalLM(JambaConfig(**SIZE, **HEADS, **places, **experts, **mamba, intermediate_size=48))
        case "bamba":
            mamba: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
            model = BambaForCausalLM(BambaConfig(**SIZE, **HEADS, **mamba, attn_layer_indices=[1], mamba_chunk_size=8))
        case _:
            raise AssertionError(family)
    return counting(model)


def counting(model: Any) -> Any:
    """Evaluation mode, and attention by plain products: torch's counter does not know the fused kernel of a CPU."""
    model.set_attn_implementation("eager")
    return model.eval()


# ---------------------------------------------------------------- by hand


def test_operations_of_one_stack_by_hand() -> None:
    stack = Stack(weights=100, attention_layers=2, attention_dim=8, kv_dim=4)
    assert read_flops(stack, 5) == 2 * 100 * 5 + 2 * (4 * 8 * 5 * 5)  # 1,000 + 1,600
    # Two tokens after five: they see 6 and 7 tokens.
    assert write_flops(stack, 5, 2) == 2 * 100 * 2 + 2 * 4 * 8 * (6 + 7)  # 400 + 832
    assert write_flops(stack, 5, 0) == 0
    states = Stack(weights=10, state_layers=3, state_scanned=7, state_kept=9)
    assert read_flops(states, 4) == 2 * 10 * 4 + 6 * 3 * 7 * 4  # 80 + 504


def test_a_causal_answer_by_hand() -> None:
    shape = Shape(decoder=Stack(weights=100, attention_layers=2, attention_dim=8, kv_dim=4), output=50)
    # Prompt of 5, answer of 2 and the end: three predictions.
    expected = (1000 + 1600) + (400 + 832) + 2 * 50 * 3
    assert answer_flops(shape, [5], [2], fused=True) == expected
    assert answer_flops(shape, [5, 5], [2, 2], fused=False) == 2 * expected
    assert kept_bytes(shape, [5], 2) == (2 * 2 * 4 * 5 * 2, 0)  # keys and values, layers, size, tokens, bytes
    assert kept_bytes(shape, [5, 3], 4) == (2 * 2 * 4 * 8 * 4, 0)


def test_an_encoder_decoder_answer_by_hand() -> None:
    decoder = Stack(weights=30, attention_layers=1, attention_dim=8, kv_dim=8)
    shape = Shape(
        decoder=decoder,
        output=50,
        encoder=Stack(weights=100, attention_layers=2, attention_dim=8, kv_dim=8),
        memory_weights=20,
        memory_kept=16,
        cross_products=16,
    )
    read = {5: 1000 + 1600 + 2 * 20 * 5, 3: 600 + 576 + 2 * 20 * 3}
    own = 2 * 30 * 3 + 4 * 8 * (1 + 2 + 3)  # the start token and two answer tokens
    fused = read[5] + read[3] + own + 2 * 16 * 8 * 3 + 2 * 50 * 3
    assert answer_flops(shape, [5, 3], [2], fused=True) == fused
    each = read[5] + read[3] + 2 * own + 2 * 16 * (5 + 3) * 3 + 2 * 2 * 50 * 3
    assert answer_flops(shape, [5, 3], [2, 2], fused=False) == each
    assert kept_bytes(shape, [5, 3], 4) == (16 * 8 * 4, 0)


def test_states_cost_the_same_bytes_at_every_length() -> None:
    shape = Shape(decoder=Stack(weights=10, state_layers=3, state_scanned=7, state_kept=9), output=5)
    assert kept_bytes(shape, [10], 4) == kept_bytes(shape, [10_000], 4) == (0, 3 * 9 * 4)
    assert kept_bytes(shape, [10, 20], 4) == (0, 2 * 3 * 9 * 4)


# ---------------------------------------------------------------- against torch


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [7, 40])
def test_reading_is_what_torch_counts(family: str, tokens: int) -> None:
    model = model_of(family)
    shape = causal_shape(model)
    ids = torch.randint(3, 50, (1, tokens))
    found = counted(lambda: model(input_ids=ids, use_cache=False))
    assert found == read_flops(shape.decoder, tokens) + 2 * shape.output * tokens


def test_writing_with_a_cache_is_what_torch_counts() -> None:
    model = model_of("gpt2")
    shape = causal_shape(model)
    ids = torch.randint(3, 50, (1, 9))

    def write() -> None:
        cache = model(input_ids=ids[:, :6], use_cache=True, logits_to_keep=1).past_key_values
        for place in range(6, 9):
            cache = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values

    assert counted(write) == answer_flops(shape, [6], [3], fused=True)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_what_torch_counts(family: str) -> None:
    ids: dict[str, Any] = {**SPECIAL, "decoder_start_token_id": 0}
    if family == "t5":
        size: dict[str, Any] = {
            "d_model": 32,
            "d_kv": 8,
            "num_heads": 4,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
        }
        model: Any = T5ForConditionalGeneration(T5Config(vocab_size=50, **size, **ids))
    else:
        sides: dict[str, Any] = {
            f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BART[side].items()
        }
        model = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=32, **sides, **ids))
    model = counting(model)
    shape = fusion_shape(model)
    assert shape.encoder is not None
    source, target = torch.randint(3, 50, (1, 11)), torch.randint(3, 50, (1, 4))
    found = counted(lambda: model(input_ids=source, decoder_input_ids=target, use_cache=False))
    expected = read_flops(shape.encoder, 11) + 2 * shape.memory_weights * 11
    expected += read_flops(shape.decoder, 4) + 2 * shape.cross_products * 11 * 4 + 2 * shape.output * 4
    assert found == expected
    with torch.no_grad():
        cache = model(input_ids=source, decoder_input_ids=target[:, :1], use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.cross_attention_cache.layers)
    assert kept_bytes(shape, [11], 4) == (4 * kept, 0)


BART = {
    "encoder": {"layers": 3, "attention_heads": 4, "ffn_dim": 48},
    "decoder": {"layers": 2, "attention_heads": 2, "ffn_dim": 40},
}


def test_the_retriever_is_what_torch_counts(world: TinyWorld) -> None:
    encoder = EncoderConfig(fresh=FreshEncoderConfig(num_layers=2, hidden=32, num_heads=4, intermediate=48))
    system = build_system(
        encoder, world.generator, train="none", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    tower = system.retriever.query_encoder
    ids, mask = torch.randint(5, 50, (1, 13)), torch.ones(1, 13, dtype=torch.bool)
    assert counted(lambda: tower(ids, mask)) == read_flops(encoder_stack(tower), 13)


def test_the_copy_reader_is_what_torch_counts(world: TinyWorld) -> None:
    system = build_system(
        world.encoder, world.generator, train="none", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    reader, shape = system.generator, shape_of(system.generator)
    assert shape.encoder is not None
    batch = reader.collate([np.arange(5, 9)], [[np.arange(5, 15), np.arange(5, 12)]], [np.arange(5, 8)])
    assert isinstance(batch, CopyBatch)
    assert prompt_lengths(batch, fused=True) == prompt_lengths(batch, fused=False) == [[17, 14]]
    read = 2 * read_flops(shape.encoder, 17)  # padded to the longer one
    assert counted(lambda: reader.read(batch)) == read
    fused = counted(lambda: reader.fused_log_probs(reader.read(batch), batch))
    expected = 2 * shape.memory_weights * 31 + read_flops(shape.decoder, 4) + 2 * shape.cross_products * 31 * 4
    assert fused == read + expected + 2 * shape.output * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "mamba2", "jamba", "bamba"])
def test_kept_bytes_are_those_of_a_real_cache(family: str) -> None:
    model = model_of(family)
    shape = causal_shape(model)
    growing = {}
    for tokens in (6, 12):
        with torch.no_grad():
            output: Any = model(torch.randint(3, 50, (1, tokens)), use_cache=True)
        layers = output["past_key_values" if "past_key_values" in output else "cache_params"].layers
        held = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        held += [
            part
            for layer in layers
            for value in vars(layer).values()
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, torch.Tensor)
        ]
        cache, state = kept_bytes(shape, [tokens], 4)
        assert cache + state == sum(tensor.numel() * 4 for tensor in held)
        growing[tokens] = cache
    assert growing[12] == 2 * growing[6]
    assert (growing[6] == 0) == family.startswith("mamba")


def test_only_the_experts_that_a_token_visits_are_counted() -> None:
    model = model_of("jamba")
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "A_log" not in name}
    experts = sum(count for name, count in matrices.items() if "experts" in name)
    rest = sum(count for name, count in matrices.items() if "experts" not in name and "embed" not in name)
    rest -= 50 * 32 if "lm_head.weight" in matrices else 0
    assert experts > 0
    assert causal_shape(model).decoder.weights == rest + experts // 2  # two of four


# ---------------------------------------------------------------- of a whole batch


def test_retrieval_is_counted_apart(world: TinyWorld) -> None:
    system = build_system(
        world.encoder, world.generator, train="none", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    questions, store = world.question_store("test"), world.store()
    collator = Collator(store, questions, system.generator, 0)
    batch = collator(np.array([0, 1]), [np.array([3, 4]), np.array([5])])
    costs = CostModel(system, 4, len(store))
    written = [[7, 7], [7], [7, 7, 7], []]  # the last passage is padding
    with_search = costs(batch, written, fused=False, retrieved=True)
    without = costs(batch, written, fused=False, retrieved=False)
    assert [cost.flops for cost in with_search] == [cost.flops for cost in without]
    lengths = prompt_lengths(batch.generator_batch, fused=False)
    assert [len(row) for row in lengths] == [2, 1]
    assert [cost.prompt_tokens for cost in without] == [sum(row) for row in lengths]
    for cost, row, answers in zip(without, lengths, ([2, 1], [3]), strict=True):
        assert cost.retrieval_flops == 0
        assert cost.flops == answer_flops(costs.shape, row, answers, fused=False)
        assert cost.kv_cache_bytes == 4 * sum(row) * costs.shape.memory_kept
    tower = encoder_stack(system.retriever.query_encoder)
    own = store.tokens("retriever").lengths
    for number, (cost, passages) in enumerate(zip(with_search, ([3, 4], [5]), strict=True)):
        asked = int(questions.tokens("retriever").lengths[number])
        expected = read_flops(tower, asked) + 2 * system.retriever.dim * len(store)
        assert cost.retrieval_flops == expected + sum(read_flops(tower, int(own[row])) for row in passages)


def test_a_causal_model_reads_one_prompt_or_one_a_passage(world: TinyWorld) -> None:
    generator = GeneratorConfig(kind="causal", fresh=world.generator.fresh)
    system = build_system(
        world.encoder, generator, train="none", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    passages = [np.arange(5, 15), np.arange(5, 12)]
    batch = system.generator.collate([np.arange(5, 9)] * 2, [passages, passages[:1]], None)
    fused, single = prompt_lengths(batch, fused=True), prompt_lengths(batch, fused=False)
    overhead = fused[1][0] - 10
    after = single[0][0] - overhead - 10
    assert after == 0  # both prompts of one passage are the same
    assert single == [[10 + overhead, 7 + overhead], [10 + overhead]]
    assert single[0][0] + 7 <= fused[0][0] < sum(single[0])
