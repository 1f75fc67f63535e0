"""Computes the sizes of the models that settings describe, without their weights: from the configuration of a
checkpoint, from `encoder.fresh` and `generator.fresh`, or from three numbers, "LAYERSxHIDDENxVOCABULARY".

Modules are built on torch's meta device, which holds no numbers. Three numbers stand for a plain transformer with a
feed-forward layer of four times its width.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from training.generator_kinds import GeneratorKind
from training.measuring.costs import answer_flops, read_flops
from training.models.arithmetic import Shape, Stack, causal_shape, encoder_stack, fusion_shape, shape_of
from training.models.generators.copy_encoder import PretrainedSource
from training.models.generators.copy_reader import CopyReader
from training.models.parts.checkpoint_layout import find_config, read_layout, transformer_folder
from training.models.parts.pretrained import encoder_only
from training.models.retriever.encoder import TextEncoder, build_encoder
from training.training_settings import EncoderConfig, GeneratorConfig

POSITIONS = 512  # Number of learned positions of an encoder that three numbers describe


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """The size of one tower."""

    parameters: int
    dim: int  # Numbers in a vector
    layers: int
    hidden: int
    heads: int
    stack: Stack

    def flops(self, tokens: float) -> float:
        """Return the operations of one text, forward."""
        return read_flops(self.stack, max(1, round(tokens)))


@dataclass(frozen=True, kw_only=True)
class GeneratorSize:
    """The size of a generator; `layers` counts those of encoder and decoder together."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    shape: Shape

    def flops(self, prompt_tokens: float, k: int, answer_tokens: int, fused: bool) -> float:
        """Return the operations of one question, forward: `k` prompts read, one answer (`fused`) or `k` scored."""
        prompts = [max(1, round(prompt_tokens))] * k
        return answer_flops(self.shape, prompts, [answer_tokens] * (1 if fused else k), fused)


def encoder_size(config: EncoderConfig, given: str = "") -> EncoderSize:
    """Return the size of the tower that `config` describes, or `given` if it is not empty. Raises ValueError, naming
    `plan.encoder`, if the configuration of `encoder.name` is not on this machine."""
    if given:
        layers, hidden, vocabulary = three_numbers("plan.encoder", given)
        stack = Stack(
            weights=12 * layers * hidden * hidden, attention_layers=layers, attention_dim=hidden, kv_dim=hidden
        )
        parameters = stack.weights + (vocabulary + POSITIONS) * hidden
        return EncoderSize(
            parameters=parameters, dim=hidden, layers=layers, hidden=hidden, heads=max(1, hidden // 64), stack=stack
        )
    with torch.device("meta"):
        if config.name:
            tower = _named_tower(config)
        else:
            tower = build_encoder(config, config.tokenizer.vocabulary)
    settings: Any = tower.backbone.config
    return EncoderSize(
        parameters=_count(tower),
        dim=tower.dim,
        layers=settings.num_hidden_layers,
        hidden=settings.hidden_size,
        heads=getattr(settings, "num_attention_heads", None) or 1,
        stack=encoder_stack(tower),
    )


def generator_size(config: GeneratorConfig, vocabulary: int, given: str = "") -> GeneratorSize:
    """Return the size of the generator that `config` describes, or `given` if it is not empty; a fresh one has
    `vocabulary` tokens. Raises ValueError, naming `plan.generator`, if the configuration of `generator.name` is not on
    this machine."""
    if given:
        layers, hidden, vocabulary = three_numbers("plan.generator", given)
        return _plain_generator(
            config.traits, layers, hidden=hidden, wide=4 * hidden, vocabulary=vocabulary, heads=max(1, hidden // 64)
        )
    fresh = config.fresh
    if config.traits.checkpoint == "encoder":
        return _copy_reader(config, vocabulary)
    if config.name:
        return _named_generator(config)
    layers = fresh.num_decoder_layers + (fresh.num_encoder_layers if config.traits.encoder_decoder else 0)
    return _plain_generator(
        config.traits,
        layers,
        hidden=fresh.hidden,
        wide=fresh.intermediate,
        vocabulary=vocabulary,
        heads=fresh.num_heads,
    )


def three_numbers(setting: str, text: str) -> tuple[int, int, int]:
    """Return layers, width and vocabulary of "12x768x30522". Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.lower())
    if found is None:
        raise ValueError(f"{setting}={text}: must be LAYERSxHIDDENxVOCABULARY, for instance 12x768x30522")
    return int(found[1]), int(found[2]), int(found[3])


def _named_tower(config: EncoderConfig) -> TextEncoder:
    layout = read_layout(config.name)
    folder = layout.transformer_folder if layout is not None else ""
    shape = _configuration("encoder", config.name, config.trust_remote_code, folder)
    backbone = AutoModel.from_config(shape, trust_remote_code=config.trust_remote_code)
    backbone = encoder_only(backbone)
    dense = layout.dense if layout is not None else []
    projections = torch.nn.Sequential(*(torch.nn.Linear(d.in_features, d.out_features, d.bias) for d in dense))
    pooling = layout.pooling if layout is not None and config.pooling == "auto" else ("mean",)
    return TextEncoder(backbone, pooling, projections=projections)


def _copy_reader(config: GeneratorConfig, vocabulary: int) -> GeneratorSize:
    source, layers = None, config.fresh.num_encoder_layers
    with torch.device("meta"):
        if config.name:
            folder = transformer_folder(config.name)
            shape = _configuration("generator", config.name, config.trust_remote_code, folder)
            vocabulary, layers = shape.vocab_size, shape.num_hidden_layers
            source = PretrainedSource(
                encoder_only(AutoModel.from_config(shape, trust_remote_code=config.trust_remote_code))
            )
        reader = CopyReader(config, vocabulary, start_id=0, end_id=1, pad_id=2, source=source)
    layers += config.fresh.num_decoder_layers
    heads = config.fresh.num_heads
    return GeneratorSize(
        parameters=_count(reader),
        layers=layers,
        hidden=reader.tokens.embedding_dim,
        heads=heads,
        vocabulary=vocabulary,
        shape=shape_of(reader),
    )


def _named_generator(config: GeneratorConfig) -> GeneratorSize:
    shape = _configuration("generator", config.name, config.trust_remote_code, "")
    auto: Any = AutoModelForSeq2SeqLM if config.traits.encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(shape, trust_remote_code=config.trust_remote_code)
    text: Any = shape.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 0) or text.num_layers)
    if config.traits.encoder_decoder:
        layers += int(getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None) or layers)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    found = fusion_shape(model) if config.traits.encoder_decoder else causal_shape(model)
    return GeneratorSize(
        parameters=_count(model),
        layers=layers,
        hidden=text.hidden_size,
        heads=heads,
        vocabulary=text.vocab_size,
        shape=found,
    )


def _configuration(section: str, name: str, trust: bool, folder: str) -> Any:
    """Return the transformers configuration of a checkpoint on this machine; only the hub's cache may fetch it."""
    unknown = (
        f"{section}.name={name}: its config.json is not on this machine; say how large it is: "
        f"plan.{section}=LAYERSxHIDDENxVOCABULARY, for instance 12x768x30522"
    )
    if find_config(name, folder) is None:
        raise ValueError(unknown)
    try:
        return AutoConfig.from_pretrained(name, subfolder=folder, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{unknown} ({str(error).splitlines()[0]})") from error


def _plain_generator(
    kind: GeneratorKind, layers: int, *, hidden: int, wide: int, vocabulary: int, heads: int
) -> GeneratorSize:
    """Return a generator with attention of 4 h^2 and a feed-forward of 2 h w. Half of the layers of an encoder-decoder
    decode, with one more attention each, whose keys and values are those of the memory."""
    layer, square = 4 * hidden * hidden + 2 * hidden * wide, hidden * hidden
    output = vocabulary * hidden
    if kind.one_sequence:
        stack = Stack(weights=layers * layer, attention_layers=layers, attention_dim=hidden, kv_dim=hidden)
        return GeneratorSize(
            parameters=stack.weights + output,
            layers=layers,
            hidden=hidden,
            heads=heads,
            vocabulary=vocabulary,
            shape=Shape(decoder=stack, output=output),
        )
    below = layers // 2
    above = layers - below
    shape = Shape(
        decoder=Stack(
            weights=above * (layer + 2 * square), attention_layers=above, attention_dim=hidden, kv_dim=hidden
        ),
        output=output,
        encoder=Stack(weights=below * layer, attention_layers=below, attention_dim=hidden, kv_dim=hidden),
        memory_weights=2 * above * square,
        memory_kept=2 * above * hidden,
        cross_products=2 * above * hidden,
    )
    parameters = layers * layer + 4 * above * square + output
    return GeneratorSize(
        parameters=parameters, layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary, shape=shape
    )


def _count(module: torch.nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
