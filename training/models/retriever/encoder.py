"""Turn text into vectors: a tower comes from a Hugging Face or sentence-transformers checkpoint or from random weights;
two towers (shared, separate, or with a frozen passage side) make the retriever."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from indexing.declare import check_values, refuse
from training.models.parts.adapters import add_adapters, merged
from training.models.parts.checkpoint_layout import POOLINGS, DenseLayout, Layout, read_layout
from training.models.parts.pretrained import choose_attention, encoder_only, load_pretrained, num_positions
from training.models.parts.recompute import recomputed
from training.models.parts.weights import from_numpy
from training.models.text.packing import by_length, row_lengths
from training.training_settings import EncoderConfig, FreshEncoderConfig, TrainingConfig


class TextEncoder(nn.Module):
    """Encodes text by a transformer, pooling over valid tokens, projections and L2 normalisation. Padding never changes
    a vector."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooling: tuple[str, ...] = ("mean",),
        *,
        normalize: bool = True,
        projections: nn.Module | None = None,
        length_groups: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projections = projections if projections is not None else nn.Sequential()
        self.pooling = pooling
        self.normalize = normalize
        self.length_groups = length_groups
        linear = [module for module in self.projections.modules() if isinstance(module, nn.Linear)]
        self.dim: int = linear[-1].out_features if linear else int(backbone.config.hidden_size) * len(pooling)

    def forward(self, ids: Int[Tensor, "n t"], mask: Shaped[Tensor, "n t"]) -> Float[Tensor, "n {self.dim}"]:
        """Return vectors float32 [n, dim] of token ids [n, t] and mask [n, t] (bool or integer, padding on the right).

        A row without any valid token gets the vector of its first position, which is finite; the caller masks it.
        """
        return by_length(self._encode, ids, mask, self.length_groups)

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(torch.int64)
        first = torch.zeros_like(mask)
        first[:, :1] = 1
        mask = torch.where(mask.any(dim=1, keepdim=True), mask, first)
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = torch.cat([pool(states, mask, mode) for mode in self.pooling], dim=-1)
        vectors = self.projections(pooled).to(torch.float32)
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors


def pool(states: Float[Tensor, "n t dim"], mask: Shaped[Tensor, "n t"], mode: str) -> Float[Tensor, "n dim"]:
    """Pool `states` [n, t, dim] over the valid tokens of `mask` [n, t] to vectors [n, dim]; sums are float32."""
    match mode:
        case "mean":
            total = (states * mask.unsqueeze(-1).to(states.dtype)).sum(dim=1, dtype=torch.float32)
            return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(states.dtype)
        case "cls":
            chosen = mask.argmax(dim=1)
        case "last":
            chosen = (row_lengths(mask) - 1).clamp(min=0)
        case "max":
            return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
        case _:
            raise refuse("encoder.pooling", mode, f"must be one of {', '.join(POOLINGS)}")
    return states[torch.arange(len(states), device=states.device), chosen]


class NullScore(nn.Module):
    """Holds the learned score of reading no passage, in the units of an inner product. It is a module that is called,
    so that sharded weights are gathered; its shape is [1], since DeepSpeed takes no parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(1))

    def forward(self, scores: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
        """Return the score for each row of scores [batch, k], float32 [batch]."""
        return self.score.to(torch.float32).expand(len(scores))


LEXICAL_SPEED = 10.0  # Adam moves a parameter by the learning rate a step, whatever its gradient: slow for one number


class LexicalWeight(nn.Module):
    """Weighs a lexical score against an inner product by the softplus of a parameter, which is never negative. It is a
    module that is called, for the same reasons as `NullScore`."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.start = math.log(math.expm1(max(weight, 1e-6))) / LEXICAL_SPEED
        self.raw = nn.Parameter(torch.tensor([self.start]))

    def forward(self, lexical: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `lexical` scores of any shape times the weight, float32."""
        return lexical.to(torch.float32) * nn.functional.softplus(LEXICAL_SPEED * self.raw.to(torch.float32))


class Retriever(nn.Module):
    """Holds the query tower and the passage tower. Shared towers are one object; separate ones share nothing."""

    def __init__(
        self,
        query_encoder: TextEncoder,
        passage_encoder: TextEncoder,
        temperature: float,
        gradient_cache_passages: int = 0,
    ) -> None:
        super().__init__()
        if query_encoder.dim != passage_encoder.dim:
            raise ValueError(f"query vectors have {query_encoder.dim} numbers, passage vectors {passage_encoder.dim}")
        self.query_encoder = query_encoder
        self.passage_encoder = passage_encoder
        self.temperature = temperature
        self.null: NullScore | None = None  # only if an objective learns it
        self.lexical: LexicalWeight | None = None  # only with retrieval.hybrid=learned
        self.gradient_cache_passages = gradient_cache_passages

    @property
    def shared(self) -> bool:
        """Return true if both towers are one."""
        return self.query_encoder is self.passage_encoder

    @property
    def dim(self) -> int:
        return self.query_encoder.dim

    @property
    def passage_prefix(self) -> str:
        """Return the prefix of the names of the passage tower's weights in `named_parameters()`."""
        return "query_encoder." if self.shared else "passage_encoder."

    def encode_queries(
        self, ids: Int[Tensor, "batch t"], mask: Shaped[Tensor, "batch t"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the vectors float32 [n, dim] of question tokens [n, t]."""
        return self.query_encoder(ids, mask)

    def encode_passages(self, ids: Int[Tensor, "n t"], mask: Shaped[Tensor, "n t"]) -> Float[Tensor, "n dim"]:
        """Return the vectors float32 [n, dim] of passage tokens [n, t]. With `gradient_cache_passages`, all are encoded
        without a graph; when the gradient reaches their vectors, so many at a time are encoded again with a graph and
        the same dropout (gradient caching, Gao et al. 2021, arXiv:2101.06983). The gradients are the same, in the one
        backward pass that DeepSpeed needs."""
        chunk = self.gradient_cache_passages
        if not (chunk and torch.is_grad_enabled()):
            return self.passage_encoder(ids, mask)
        order = torch.argsort(row_lengths(mask), stable=True)  # like lengths together leave less padding
        weights = list(self.passage_encoder.parameters())
        parts = [recomputed(self.passage_encoder, (ids[rows], mask[rows]), weights) for rows in order.split(chunk)]
        return torch.cat(parts)[torch.argsort(order)]

    def scores(
        self, queries: Float[Tensor, "batch dim"], passages: Float[Tensor, "batch k dim"]
    ) -> Float[Tensor, "batch k"]:
        """Return the inner products of queries [batch, dim] and passages [batch, k, dim] over the temperature, float32
        [batch, k]. Products and sums are elementwise, which autocast leaves in float32."""
        products = queries.to(torch.float32).unsqueeze(1) * passages.to(torch.float32)
        return products.sum(dim=-1) / self.temperature

    def fused(
        self, scores: Float[Tensor, "batch k"], lexical: Float[Tensor, "batch k"] | None
    ) -> Float[Tensor, "batch k"]:
        """Add the weighted `lexical` scores [batch, k] to `scores` [batch, k], over the same temperature."""
        if self.lexical is None:
            return scores
        assert lexical is not None, "a batch without lexical scores for a retriever that weighs them"
        return scores + self.lexical(lexical) / self.temperature

    def null_scores(self, scores: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"] | None:
        """Return the learned score of reading no passage beside each row of `scores` [batch, k], over the temperature,
        float32 [batch]; None if it is 0."""
        return self.null(scores) / self.temperature if self.null is not None else None

    def train(self, mode: bool = True) -> "Retriever":
        """Set the mode, but a frozen tower stays in evaluation mode: its vectors are the index's, without dropout."""
        super().train(mode)
        for tower in (self.query_encoder, self.passage_encoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self


def build_encoder(config: EncoderConfig, vocab_size: int | None = None) -> TextEncoder:
    """Return the tower that `config` describes; a fresh one needs the tokeniser's `vocab_size`.

    Raises ValueError that names the setting if the checkpoint cannot be read, or is too short for the token limits.
    """
    check_values(config, "encoder.")
    limits = {
        "encoder.max_question_tokens": config.max_question_tokens,
        "encoder.max_passage_tokens": config.max_passage_tokens,
    }
    for setting, tokens in limits.items():
        if tokens < 3:
            raise refuse(setting, tokens, "must be at least 3")
    if config.name:
        encoder, limit = _checkpoint_encoder(config)
    else:
        encoder, limit = _fresh_encoder(config, vocab_size), None
    for setting, tokens in limits.items():
        if limit is not None and tokens > limit:
            raise refuse(setting, tokens, f"must be at most {limit}, which {config.name} takes")
    if config.gradient_checkpointing:
        encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return encoder


def build_retriever(config: EncoderConfig, train: str, vocab_size: int | None = None) -> Retriever:
    """Return both towers with `requires_grad` set for `train`. With query_only, shared towers become a trained one and
    its frozen copy for passages. With `encoder.lora`, a tower that trains has adapters, and only they train."""
    query_encoder = build_encoder(config, vocab_size)
    passage_encoder = copy.deepcopy(query_encoder) if config.num_towers(train) == 2 else query_encoder
    retriever = Retriever(query_encoder, passage_encoder, config.temperature, config.gradient_cache_passages)
    set_trainable(retriever, train)
    if config.lora.rank:
        for tower in {id(tower): tower for tower in (query_encoder, passage_encoder)}.values():
            if any(parameter.requires_grad for parameter in tower.parameters()):
                tower.requires_grad_(False)
                add_adapters(tower.backbone, config.lora, "encoder.lora")
    return retriever


def set_trainable(retriever: Retriever, train: str) -> None:
    """Set `requires_grad` of both towers: both and retriever_only train them, query_only the query side, the rest none.
    Raises ValueError for another value, and for query_only on towers that are one object."""
    check_values(TrainingConfig(train=train), "training.")
    if train == "query_only" and retriever.shared:
        allowed = "must be another one: without a passage tower of its own, build the retriever with query_only"
        raise refuse("training.train", train, allowed)
    retriever.passage_encoder.requires_grad_(train in ("both", "retriever_only"))
    for part in (retriever.query_encoder, retriever.null, retriever.lexical):
        if part is not None:
            part.requires_grad_(train in ("both", "retriever_only", "query_only"))
    retriever.train(retriever.training)


def passage_state(retriever: Retriever) -> dict[str, Tensor]:
    """Return the weights to publish: the passage tower's, under the names of a `TextEncoder`, adapters merged."""
    return merged(retriever.passage_encoder, retriever.passage_encoder.state_dict())


def load_passage_weights(encoder: TextEncoder, weights: Mapping[str, np.ndarray]) -> None:
    """Put published arrays (`weights.to_numpy`) into `encoder`. Raises ValueError naming weights that do not fit."""
    load_encoder_state(encoder, from_numpy(weights))


def load_encoder_state(encoder: TextEncoder, state: Mapping[str, Tensor]) -> None:
    """Load `state` into `encoder`. Raises ValueError naming weights that do not fit."""
    known = encoder.state_dict()
    missing, unknown = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
    shapes = [name for name in known.keys() & state.keys() if known[name].shape != state[name].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"these weights are not of this encoder: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {sorted(shapes)[:3]}"
        )
    encoder.load_state_dict(dict(state))


def with_towers_of(config: EncoderConfig, weights: Iterable[str]) -> EncoderConfig:
    """Return `config` for a system that goes on with the weights of these names: with two towers if they have two, as
    after a stage that trained the query tower alone."""
    known = any(name.startswith("retriever.passage_encoder.") for name in weights)
    return replace(config, towers="separate") if known else config


def bert_config(fresh: FreshEncoderConfig, vocab_size: int, num_positions: int, **options: Any) -> BertConfig:
    """Return the configuration of a BERT of this size for `num_positions` tokens; `options` go to transformers."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=fresh.hidden,
        num_hidden_layers=fresh.num_layers,
        num_attention_heads=fresh.num_heads,
        intermediate_size=fresh.intermediate,
        hidden_dropout_prob=fresh.dropout,
        attention_probs_dropout_prob=fresh.dropout,
        max_position_embeddings=num_positions,
        **options,
    )


def _fresh_encoder(config: EncoderConfig, vocab_size: int | None) -> TextEncoder:
    """Return a BERT of `encoder.fresh`'s size with random weights, without pooler."""
    if not vocab_size:
        raise refuse("encoder.name", "", "must be given without the tokeniser's vocabulary size")
    fresh = config.fresh
    if fresh.hidden % fresh.num_heads:
        raise refuse("encoder.fresh.hidden", fresh.hidden, f"must be a multiple of num_heads={fresh.num_heads}")
    attention = choose_attention(config.attention, "encoder.attention")
    longest = max(config.max_question_tokens, config.max_passage_tokens)
    shape = bert_config(fresh, vocab_size, longest, attn_implementation=attention)
    backbone = BertModel(shape, add_pooling_layer=False)
    pooling = ("mean",) if config.pooling == "auto" else (config.pooling,)
    return TextEncoder(backbone, pooling, normalize=_normalize(config, True), length_groups=config.length_groups)


def _checkpoint_encoder(config: EncoderConfig) -> tuple[TextEncoder, int | None]:
    """Return the encoder of `encoder.name` and the number of tokens that it takes. A plain Hugging Face checkpoint
    names no pooling and no normalisation: they are mean and true."""
    layout = read_layout(config.name) or Layout(pooling=("mean",), normalize=True)
    backbone = load_pretrained(
        AutoModel,
        config.name,
        "encoder.name",
        subfolder=layout.transformer_folder,
        attn_implementation=choose_attention(config.attention, "encoder.attention"),
        trust_remote_code=config.trust_remote_code,
    )
    backbone = encoder_only(backbone)
    pooling = layout.pooling if config.pooling == "auto" else (config.pooling,)
    limits = [limit for limit in (layout.max_tokens, num_positions(backbone)) if limit is not None]
    encoder = TextEncoder(
        backbone,
        pooling,
        normalize=_normalize(config, layout.normalize),
        projections=nn.Sequential(*(_dense(dense) for dense in layout.dense)),
        length_groups=config.length_groups,
    )
    return encoder, min(limits, default=None)


def _normalize(config: EncoderConfig, otherwise: bool) -> bool:
    setting = str(config.normalize).lower()
    return otherwise if setting == "auto" else setting == "true"


def _dense(layout: DenseLayout) -> nn.Module:
    """Build a projection and load its weights."""
    linear = nn.Linear(layout.in_features, layout.out_features, bias=layout.bias)
    if layout.weights.suffix == ".safetensors":
        state = load_file(str(layout.weights))
    else:
        state = torch.load(layout.weights, map_location="cpu", weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): tensor.to(torch.float32) for name, tensor in state.items()})
    activation = getattr(nn, layout.activation, None)
    if activation is None or not issubclass(activation, nn.Module):
        raise ValueError(f"activation {layout.activation!r} of a Dense module is no class of torch.nn")
    return nn.Sequential(linear, activation())
