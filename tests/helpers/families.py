"""Generators of every family of transformers, tiny and with random weights, as folders that `generator.name` reads."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    BartConfig,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from training.models.text.tokenizers import train_wordpiece
from training.training_settings import GeneratorConfig, TokenizerConfig

FUSION = ("t5", "t5_untied", "bart")
ATTENTION = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")
STATE_SPACE = ("mamba", "mamba2", "jamba", "bamba")
CAUSAL = ATTENTION + STATE_SPACE
COPY = ("bert", "roberta")  # encoders that a copy reader reads with
WORDS = "some text of some words that are read"


def family_config(family: str, vocabulary: int) -> PreTrainedConfig:
    """Two layers of 16."""
    words: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    body: dict[str, Any] = {**words, "hidden_size": 16, "num_hidden_layers": 2}
    attending: dict[str, Any] = {**body, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    mixer: dict[str, Any] = {"mamba_d_state": 4}
    match family:
        case "t5" | "t5_untied":
            size: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
            tied: dict[str, Any] = {"tie_word_embeddings": family == "t5", "decoder_start_token_id": 0}
            activation = "relu" if family == "t5" else "gated-gelu"
            return T5Config(**words, **size, **tied, feed_forward_proj=activation, dropout_rate=0.0)
        case "bart":
            layers: dict[str, Any] = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
            layers |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
            layers |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
            start: dict[str, Any] = {"decoder_start_token_id": 3, "forced_eos_token_id": None}
            return BartConfig(**words, **layers, **start, d_model=16, max_position_embeddings=64, dropout=0.0)
        case "bert" | "roberta":
            dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            encoder: dict[str, Any] = {**dropout, "num_attention_heads": 2, "intermediate_size": 32}
            config = BertConfig if family == "bert" else RobertaConfig
            return config(**body, **encoder, max_position_embeddings=40)
        case "llama":
            return LlamaConfig(**attending, tie_word_embeddings=True)
        case "qwen2":
            return Qwen2Config(**attending)
        case "qwen3":
            return Qwen3Config(**attending, head_dim=8)
        case "gemma2":  # logits are capped
            return Gemma2Config(**attending, head_dim=8, final_logit_softcapping=3.0)
        case "gpt2":
            none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2Config(**words, **none, n_embd=16, n_layer=2, n_head=2, n_positions=128)
        case "mamba":
            return MambaConfig(**body, state_size=4)
        case "mamba2":
            return Mamba2Config(**body, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=8)
        case "jamba":  # a state-space layer, then an attending one with two experts
            every: dict[str, Any] = {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
            }
            return JambaConfig(**attending, **mixer, **every, num_experts=2, num_experts_per_tok=1, mamba_dt_rank=4)
        case "bamba":
            heads: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
            return BambaConfig(**attending, **mixer, **heads, attn_layer_indices=[1])
    raise AssertionError(family)


def kind_of(family: str) -> str:
    """The `generator.kind` that reads it."""
    return "fusion" if family in FUSION else "copy" if family in COPY else "causal"


def write_family(family: str, folder: Path, vocabulary: int, sharpen: float = 3.0) -> Path:
    """Save a model of `family` in `folder`; weights times `sharpen`, so that its distributions are far from uniform."""
    torch.manual_seed(7)
    auto: Any = {"fusion": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM, "copy": AutoModel}[kind_of(family)]
    model = auto.from_config(family_config(family, vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharpen)
    model.save_pretrained(folder / family)
    return folder / family


def write_tokenizer(folder: Path) -> Path:
    """Save a tokeniser of 120 pieces at most."""
    train_wordpiece(TokenizerConfig(vocabulary=120), [WORDS]).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def generator_config(family: str, folder: Path, **changes: Any) -> GeneratorConfig:
    """Settings that read what `write_family` saved."""
    values: dict[str, Any] = {"max_passage_tokens": 16, "max_question_tokens": 8, "max_answer_tokens": 8}
    values |= {"kind": kind_of(family), "name": str(folder / family)}
    return GeneratorConfig(**values | changes)


def write_families(folder: Path, tokenizer: PreTrainedTokenizerFast, families: tuple[str, ...]) -> None:
    """Save all of them."""
    for family in families:
        write_family(family, folder, len(tokenizer))
