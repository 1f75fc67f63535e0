"""Read facts about a generator from its configuration, before any weight is loaded."""

from dataclasses import dataclass
from typing import Any

from training.models.parts.checkpoint_layout import find_config, transformer_folder
from training.training_settings import FRESH_CONTEXT, GeneratorConfig

STATE_SPACE = ("mamba", "mamba2")  # of generator.fresh.family


@dataclass(frozen=True)
class Shape:
    """Holds the facts that decide whether an objective, or a number of passages, fits a generator."""

    attention: bool  # True if some layer attends; False for a pure state-space model
    context: int | None  # number of tokens of one sequence; None: no limit, or unknown


def read_shape(generator: GeneratorConfig) -> Shape | None:
    """Return the shape of the generator that `generator` describes; None if its configuration is not on disk."""
    if not generator.traits.one_sequence and not generator.name:
        return Shape(attention=True, context=None)
    if not generator.name:
        from training.models.generators.fresh_causal import FRESH_GPT2_CONTEXT

        family = generator.fresh.family
        hybrid_without = family == "jamba" and generator.fresh.num_decoder_layers < 2  # its second layer attends
        if family in STATE_SPACE or hybrid_without:
            return Shape(attention=False, context=None)
        return Shape(attention=True, context=FRESH_GPT2_CONTEXT if family == "gpt2" else FRESH_CONTEXT)
    reads_with_encoder = generator.traits.checkpoint == "encoder"
    folder = transformer_folder(generator.name) if reads_with_encoder else ""
    if find_config(generator.name, folder) is None:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            generator.name, subfolder=folder, trust_remote_code=generator.trust_remote_code
        )
    except (OSError, ValueError, ImportError):  # loading the model raises it again, with a better message
        return None
    if reads_with_encoder:
        from training.models.generators.copy_encoder import check_encoder

        check_encoder(generator, config)
    return Shape(has_attention(config), context_of(config))


def has_attention(config: Any) -> bool:
    """Return true if a model of this transformers configuration has a layer that attends. Hybrids list the kind of each
    layer; pure state-space models have no attention heads."""
    if config.is_encoder_decoder:
        return True
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds:
        return any(("attention" in kind and kind != "linear_attention") or kind == "hybrid" for kind in kinds)
    return bool(getattr(text, "num_attention_heads", None))


def context_of(config: Any) -> int | None:
    """Return the number of tokens that a sequence may have; None if positions are relative, or there are none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit and has_attention(config) else None


def check_context(generator: GeneratorConfig, k: int, fused: bool) -> None:
    """Raise ValueError if question, passages and answer at their longest do not fit the generator's context.

    If `fused`, all `k` passages stand in one prompt of a causal model; otherwise one passage at a time. The tokens of
    the template are not counted here, but when prompts are made.
    """
    shape = read_shape(generator)
    if shape is None or shape.context is None:
        return
    causal = generator.traits.one_sequence
    passages = k if causal and fused else 1
    answer = generator.max_answer_tokens + 1 if causal else 0  # an encoder reads no answer
    longest = passages * generator.max_passage_tokens + generator.max_question_tokens + answer
    if longest > shape.context:
        counted = f"{passages} x generator.max_passage_tokens={generator.max_passage_tokens}"
        counted += f" + generator.max_question_tokens={generator.max_question_tokens}"
        counted += f" + generator.max_answer_tokens={generator.max_answer_tokens} + 1" if answer else ""
        lower = "generator.max_passage_tokens or retrieval.k" if passages > 1 else "generator.max_passage_tokens"
        raise ValueError(f"{counted} = {longest} tokens, the generator's context is {shape.context}: lower {lower}")
