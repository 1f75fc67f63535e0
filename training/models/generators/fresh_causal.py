"""Build causal language models of transformers with random weights, of `generator.fresh`'s size."""

from typing import Any, cast

from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from indexing.declare import check_values, refuse
from training.models.text.tokenizers import end_id, pad_id, start_id
from training.training_settings import FRESH_CONTEXT, FreshGeneratorConfig

FRESH_GPT2_CONTEXT = 1024  # number of learned positions
STATE = 16  # number of values that a state-space layer keeps for each channel


def fresh_causal(fresh: FreshGeneratorConfig, tokenizer: PreTrainedTokenizerFast, attention: str) -> PreTrainedModel:
    """Return a model of `fresh.family` with tied embeddings. Raises ValueError for an unknown family or size."""
    attends = fresh.family not in ("mamba", "mamba2")
    config = _config(fresh, tokenizer)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention if attends else "eager")
    return cast(PreTrainedModel, model)


def _config(fresh: FreshGeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    check_values(fresh, "generator.fresh.")
    if fresh.hidden % (2 * fresh.num_heads):
        allowed = f"must be a multiple of 2 * num_heads={2 * fresh.num_heads} with generator.kind=causal"
        raise refuse("generator.fresh.hidden", fresh.hidden, allowed)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": fresh.hidden,
        "num_hidden_layers": fresh.num_decoder_layers,
        "pad_token_id": pad_id(tokenizer),
        "bos_token_id": start_id(tokenizer),
        "eos_token_id": end_id(tokenizer),
        "tie_word_embeddings": True,
    }
    attending: dict[str, Any] = {
        "intermediate_size": fresh.intermediate,
        "num_attention_heads": fresh.num_heads,
        "num_key_value_heads": fresh.num_heads,
        "attention_dropout": fresh.dropout,
        "max_position_embeddings": FRESH_CONTEXT,
    }
    match fresh.family:
        case "llama":
            return LlamaConfig(**common, **attending)
        case "qwen2":
            return Qwen2Config(**common, **attending)
        case "gpt2":
            size: dict[str, Any] = {"n_inner": fresh.intermediate, "n_head": fresh.num_heads}
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), fresh.dropout)
            return GPT2Config(**common, **size, **dropout, n_positions=FRESH_GPT2_CONTEXT)
        case "mamba":
            return MambaConfig(**common, state_size=STATE)
        case "mamba2":  # twice as wide inside, cut into heads
            heads: dict[str, Any] = {"num_heads": 2 * fresh.num_heads, "head_dim": fresh.hidden // fresh.num_heads}
            return Mamba2Config(**common, **heads, state_size=STATE, n_groups=1, chunk_size=64)
        case "jamba":  # the second, fourth... layer attends; no mixture of experts
            layers: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": STATE}
            return JambaConfig(**common, **attending, **layers, num_experts=1, num_experts_per_tok=1)
    raise AssertionError(f"check_values let {fresh.family!r} through")
