"""Read the numbers that decide a model's arithmetic and memory from its modules.

Every matrix of a stack counts except embeddings and the output layer; of several experts, those that a token visits
count. Biases and norms are left out, as in Kaplan et al. 2020.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.generators.causal import CausalGenerator
from training.models.generators.copy_encoder import PretrainedSource
from training.models.generators.copy_reader import CopyReader
from training.models.generators.fusion_in_decoder import FusionGenerator
from training.models.generators.generator import Generator
from training.models.retriever.encoder import TextEncoder

STATE_SPACE_LAYERS = ("linear_attention", "mamba", "mamba2")  # names in transformers' `layer_types`
CROSS_KEYS = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that tokens pass one after another: an encoder, a decoder, a causal model."""

    weights: int  # number in the matrices that each token is multiplied with
    attention_layers: int = 0
    attention_dim: int = 0  # number of query heads times their size
    kv_dim: int = 0  # number of key heads times their size
    state_layers: int = 0  # number of state-space layers
    state_scanned: int = 0  # number of values of one such layer's state that each token updates
    state_kept: int = 0  # number of values that one such layer keeps, with its convolution's window


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a generator. Without `encoder` it is causal, and the prompt runs through `decoder`; otherwise the
    decoder attends to a memory of encoded tokens."""

    decoder: Stack
    output: int  # number of weights of the output layer
    encoder: Stack | None = None
    memory_weights: int = 0  # number of weights that a token of the memory is multiplied with, once
    memory_kept: int = 0  # number of values that the decoder keeps of each token of the memory
    cross_products: int = 0  # number of multiplications of one written token with one token of the memory


def shape_of(generator: Generator) -> Shape:
    """Return the shape of a generator of any kind."""
    match generator:
        case CopyReader():
            return _copy_shape(generator)
        case FusionGenerator():
            return fusion_shape(generator.model)
        case CausalGenerator():
            return causal_shape(generator.model)
    raise AssertionError(f"no shape of a {type(generator).__name__}")


def encoder_stack(encoder: TextEncoder) -> Stack:
    """Return the stack of one tower; its projections see one vector a text and are left out."""
    return _stack(encoder.backbone, encoder.backbone.config, encoder.backbone)


def classifier_stack(model: PreTrainedModel) -> Stack:
    """Return the stack of a cross-encoder; its head sees one vector a pair and is left out."""
    return _stack(model.base_model, model.config, model)


def count_weights(module: nn.Module, left_out: tuple[nn.Parameter, ...] = (), active_experts: float = 1.0) -> int:
    """Count the numbers in the matrices of `module`, embeddings and `left_out` excepted; shared matrices count once. Of
    a matrix of several experts (three axes), a token visits the share `active_experts`. Sharded weights count whole."""
    skipped = {id(parameter) for parameter in left_out}
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            skipped |= {id(parameter) for parameter in part.parameters(recurse=False)}
    total = 0.0
    for name, parameter in module.named_parameters():
        size = _size(parameter)
        if id(parameter) in skipped or len(size) < 2 or name.endswith("A_log"):
            continue
        total += math.prod(size) * (active_experts if "experts" in name and len(size) == 3 else 1.0)
    return round(total)


def _stack(module: nn.Module, config: Any, model: PreTrainedModel, is_decoder: bool = True) -> Stack:
    """Return the stack of a module of transformers, without the output layer of `model`."""
    output = model.get_output_embeddings()
    left_out = (output.weight,) if output is not None and isinstance(output.weight, nn.Parameter) else ()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = getattr(config, "num_experts_per_tok", None)
    weights = count_weights(module, left_out, visited / experts if experts and visited else 1.0)
    heads, layers = _heads_and_layers(config, is_decoder)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        layers = sum(kind not in STATE_SPACE_LAYERS for kind in kinds)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if layers and not size:
        size = config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    stack = Stack(
        weights=weights,
        attention_layers=layers,
        attention_dim=heads * (size or 0) if layers else 0,
        kv_dim=key_heads * (size or 0) if layers else 0,
    )
    return _with_states(stack, module)


def _heads_and_layers(config: Any, is_decoder: bool) -> tuple[int, int]:
    side = "decoder" if is_decoder else "encoder"
    heads = getattr(config, f"{side}_attention_heads", None) or getattr(config, "num_attention_heads", None)
    layers = getattr(config, f"{side}_layers", None) or config.num_hidden_layers
    if is_decoder:
        layers = getattr(config, "num_decoder_layers", None) or layers
    return int(heads or 0), int(layers)


def _with_states(stack: Stack, module: nn.Module) -> Stack:
    """Add the sizes of state-space layers (Mamba, Mamba-2) to `stack`; all have the same size."""
    mixers: list[Any] = [part for part in module.modules() if hasattr(part, "A_log") and hasattr(part, "conv1d")]
    if not mixers:
        return stack
    mixer = mixers[0]
    decay = _size(mixer.A_log)
    # Mamba has a decay for each number of the state, Mamba-2 one a head, whose state is head size times state size.
    scanned = decay[0] * decay[1] if len(decay) == 2 else mixer.num_heads * mixer.head_dim * mixer.ssm_state_size
    channels, _, window = _size(mixer.conv1d.weight)
    return replace(stack, state_layers=len(mixers), state_scanned=scanned, state_kept=scanned + channels * window)


def causal_shape(model: PreTrainedModel) -> Shape:
    """Return the shape of a causal model: attention, state-space or hybrid."""
    return Shape(decoder=_stack(model, model.config.get_text_config(), model), output=_output_weights(model))


def fusion_shape(model: PreTrainedModel) -> Shape:
    """Return the shape of an encoder-decoder of transformers."""
    config: Any = model.config
    encoder = _stack(model.get_encoder(), config, model, is_decoder=False)
    decoder = _stack(model.get_decoder(), config, model)
    memory = sum(
        math.prod(_size(parameter))
        for name, parameter in model.get_decoder().named_parameters()
        if name.endswith("weight") and any(key in name for key in CROSS_KEYS)
    )
    return Shape(
        decoder=replace(decoder, weights=decoder.weights - memory),
        output=_output_weights(model),
        encoder=encoder,
        memory_weights=memory,
        memory_kept=2 * decoder.attention_layers * decoder.kv_dim,
        cross_products=2 * decoder.attention_layers * decoder.attention_dim,
    )


def _copy_shape(generator: CopyReader) -> Shape:
    """Count the pointer as one more attention over the memory: its keys are kept, and each written token is multiplied
    with each of them."""
    hidden, size = generator.tokens.embedding_dim, generator.config.fresh
    writing = sum(count_weights(part) for part in (generator.decoder, generator.copy_query, generator.gates))
    crossing = 2 * size.num_decoder_layers * hidden  # keys and values of one token of the memory
    if isinstance(generator.encoder, PretrainedSource):
        backbone = generator.encoder.backbone
        encoder = _stack(backbone, backbone.config, backbone, is_decoder=False)
    else:
        encoder = _plain_stack(count_weights(generator.encoder), size.num_encoder_layers, hidden)
    return Shape(
        decoder=_plain_stack(writing - crossing * hidden, size.num_decoder_layers, hidden),
        output=generator.vocabulary * hidden,
        encoder=encoder,
        memory_weights=hidden * (crossing + hidden),
        memory_kept=crossing + hidden,
        cross_products=crossing + hidden,
    )


def _plain_stack(weights: int, layers: int, hidden: int) -> Stack:
    return Stack(weights=weights, attention_layers=layers, attention_dim=hidden, kv_dim=hidden)


def _output_weights(model: PreTrainedModel) -> int:
    output = model.get_output_embeddings()
    rows, columns = _size(output.weight)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
    return rows * columns


def _size(parameter: Tensor) -> tuple[int, ...]:
    """Return the size of the whole parameter, of which ZeRO 3 keeps only a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
