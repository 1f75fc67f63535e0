"""Encode a question with one passage for the copy reader, by random weights or by a pretrained encoder."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from indexing.declare import refuse
from training.models.generators.copy_layers import Layer, mask_bias
from training.models.parts.checkpoint_layout import transformer_folder
from training.models.parts.pretrained import (
    check_vocabulary,
    choose_attention,
    encoder_only,
    load_pretrained,
    num_positions,
)
from training.training_settings import FreshGeneratorConfig, GeneratorConfig


class FreshSource(nn.Module):
    """Encodes by positions, segments and pre-norm layers over the token embeddings of the generator."""

    def __init__(self, size: FreshGeneratorConfig, max_source: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_source, size.hidden)
        self.segments = nn.Embedding(2, size.hidden)
        layer = (size.hidden, size.num_heads, size.intermediate, size.dropout)
        self.layers = nn.ModuleList(Layer(*layer, cross=False) for _ in range(size.num_encoder_layers))
        self.norm = nn.LayerNorm(size.hidden)

    def forward(self, embedded: Tensor, mask: Tensor, in_passage: Tensor) -> Tensor:
        """Return states [rows, source, hidden] of embedded tokens; mask and in_passage (0, 1) are [rows, source]."""
        positions = torch.arange(embedded.shape[1], device=embedded.device)
        x = embedded + self.segments(in_passage) + self.positions(positions)
        bias = mask_bias(mask)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class PretrainedSource(nn.Module):
    """Encodes by a checkpoint (BERT, RoBERTa, a sentence-transformers folder). A model of pairs gets the segment of
    each token."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden = int(backbone.config.hidden_size)
        self.pairs = getattr(backbone.config, "type_vocab_size", 0) > 1

    def forward(self, ids: Tensor, mask: Tensor, in_passage: Tensor) -> Tensor:
        """Return states [rows, source, hidden] of ids, mask and in_passage (0, 1), each [rows, source]."""
        segments = {"token_type_ids": in_passage} if self.pairs else {}
        return self.backbone(input_ids=ids, attention_mask=mask.long(), **segments).last_hidden_state

    @torch.no_grad()
    def lend_embeddings(self, tokens: nn.Embedding) -> None:
        """Start `tokens` as the checkpoint's word embeddings. Raises ValueError if the tokeniser has more."""
        check_vocabulary(self.backbone, tokens.num_embeddings)
        words: Any = self.backbone.get_input_embeddings()
        tokens.weight.copy_(words.weight[: tokens.num_embeddings])


def check_encoder(generator: GeneratorConfig, config: PreTrainedConfig) -> None:
    """Raise ValueError for a model of transformers that does not read in both directions, that has a decoder, or whose
    width the fresh decoder cannot have."""
    kind = config.model_type
    known = kind in CONFIG_MAPPING and type(config) is CONFIG_MAPPING[kind]  # .values() would import every model
    if known and (config.is_encoder_decoder or type(config) not in MODEL_FOR_MASKED_LM_MAPPING):
        other = "fusion" if config.is_encoder_decoder else "causal"
        allowed = f"must be an encoder like BERT with generator.kind=copy; a {kind} model takes generator.kind={other}"
        raise refuse("generator.name", generator.name, allowed)
    width, heads = int(config.hidden_size), generator.fresh.num_heads
    if width % heads:
        raise refuse("generator.fresh.num_heads", heads, f"must divide {width}, the width of {generator.name}")


def load_source(config: GeneratorConfig, max_source: int) -> PretrainedSource:
    """Return the encoder of `generator.name`, with the dropout of `generator.fresh`. Raises ValueError for another kind
    of model, one that cannot be read, and one that takes fewer than `max_source` tokens."""
    backbone = load_pretrained(
        AutoModel,
        config.name,
        "generator.name",
        subfolder=transformer_folder(config.name),
        attn_implementation=choose_attention(config.attention, "generator.attention"),
        trust_remote_code=config.trust_remote_code,
    )
    check_encoder(config, backbone.config)
    backbone = encoder_only(backbone)
    limit = num_positions(backbone)
    if limit is not None and max_source > limit:
        allowed = f"must be lower: with the question it makes {max_source} tokens, and {config.name} takes {limit}"
        raise refuse("generator.max_passage_tokens", config.max_passage_tokens, allowed)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.fresh.dropout
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PretrainedSource(backbone)
