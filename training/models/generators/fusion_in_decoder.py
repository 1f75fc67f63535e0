"""Read passages by fusion-in-decoder with any encoder-decoder (Izacard and Grave 2021, arXiv:2007.01282).

Each passage is encoded alone with its question; the decoder reads one passage (`per_passage_log_probs`) or the valid
tokens of all of them as one memory (`fused_log_probs`), from the same encoder states. A bias per passage, usually
log p(z|q), enters the decoder's cross-attention through the four-dimensional float mask that transformers hands to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from indexing.declare import refuse
from training.models.generators import token_scores
from training.models.generators.attention import (
    NO_PROBABILITIES,
    AttentionMass,
    check_attention,
    fold_queries,
    rerouted,
)
from training.models.generators.generator import Decoded, Generator, GeneratorBatch
from training.models.generators.head import find_head
from training.models.parts.pretrained import (
    check_vocabulary,
    choose_attention,
    is_sharded,
    load_pretrained,
    num_positions,
)
from training.models.text.packing import length_groups, pad_rows, restore_order
from training.models.text.token_rows import surrounding_tokens
from training.models.text.tokenizers import end_id, pad_id, start_id
from training.training_settings import GeneratorConfig


@dataclass
class FusionBatch(GeneratorBatch):
    """Holds `question passage` for each passage, in the encoder's tokens."""

    source_ids: Tensor  # int64 [batch * k, source]
    source_mask: Tensor  # bool [batch * k, source]
    null_ids: Tensor  # int64 [batch, source]: the question with an empty passage
    null_mask: Tensor  # bool [batch, source]


@dataclass
class Group:
    """Holds the encoder states of passages of similar length."""

    rows: Tensor  # int64 [n]: row numbers in batch * k
    states: Tensor  # [n, source, dim]
    mask: Tensor  # bool [n, source]


@dataclass
class Projected:
    """Holds the decoder's keys and values of a fused memory, without gradient."""

    layers: list[tuple[Tensor, Tensor]]  # per decoder layer, each [batch, heads, memory, head_dim]
    starts: Tensor  # int64 [batch, k]: first token of each passage in its question's memory
    memory: "Memory"


@dataclass
class Reading:
    """Holds the encoder states of a batch, every passage encoded once, in groups of similar length."""

    groups: list[Group]
    projected: Projected | None = None  # projections of a fused pass, for a pass without gradient


@dataclass
class Memory:
    """Holds the states that the decoder attends to."""

    states: Tensor  # [rows, source, dim]
    mask: Tensor  # bool [rows, source]; float [rows, 1, 1, source] when biased
    passage: Tensor | None = None  # int64 [rows, source]: passage of each token; k for padding


class FusionGenerator(Generator[FusionBatch, Reading]):
    """Generates with any encoder-decoder of transformers, or a fresh T5."""

    def __init__(self, config: GeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.config = config
        self.attention = choose_attention(config.attention, "generator.attention")
        self.model = self._checkpoint() if config.name else self._fresh(tokenizer)
        check_vocabulary(self.model, len(tokenizer))
        self.end_id, self.pad_id = end_id(tokenizer), pad_id(tokenizer)
        self.decoder_start_id = int(self.model.config.decoder_start_token_id)
        start, end = surrounding_tokens(tokenizer)
        self.start = np.array(start, dtype=np.int64)
        self.between = np.array(() if config.name else end, dtype=np.int64)  # pretrained ones have "title:" for it
        self.end = np.array(end, dtype=np.int64)
        self._check_positions()
        self.model.generation_config = token_scores.generation_settings(
            self.model, self.end_id, self.pad_id, self.decoder_start_id
        )
        self.head = find_head(self.model, config.loss_chunk_tokens)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def collate(
        self,
        questions: Sequence[np.ndarray],
        passages: Sequence[Sequence[np.ndarray]],
        answers: Sequence[np.ndarray] | None,
    ) -> FusionBatch:
        filled, passage_mask = token_scores.collate_passages(passages)
        sources: list[np.ndarray] = []
        for question, rows in zip(questions, filled, strict=True):
            head = [self.start, question[: self.config.max_question_tokens], self.between]
            sources += [np.concatenate([*head, row[: self.config.max_passage_tokens], self.end]) for row in rows]
        limit = self.config.max_question_tokens
        nulls = [np.concatenate([self.start, row[:limit], self.between, self.end]) for row in questions]
        source_ids, source_mask = pad_rows(sources, self.pad_id)
        null_ids, null_mask = pad_rows(nulls, self.pad_id)
        answer_ids, answer_mask = token_scores.collate_answers(answers, len(questions), self.end_id)
        return FusionBatch(answer_ids, answer_mask, passage_mask, source_ids, source_mask, null_ids, null_mask)

    def read(self, batch: FusionBatch) -> Reading:
        """Encode every passage once, in groups of similar length."""
        groups: list[Group] = []
        for rows, length in length_groups(batch.source_mask, self.config.length_groups):
            mask = batch.source_mask[rows, :length]
            groups.append(Group(rows, self._encode(batch.source_ids[rows, :length], mask), mask))
        return Reading(groups)

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        encoder: Any = self.model.get_encoder()
        return encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def per_passage_log_probs(self, reading: Reading, batch: FusionBatch) -> Float[Tensor, "batch k tokens"]:
        k = batch.passage_mask.shape[1]
        projected = None if torch.is_grad_enabled() else reading.projected
        outputs: list[Tensor] = []
        for group in reading.groups:
            questions = group.rows // k
            targets, mask = batch.answer_ids[questions], batch.answer_mask[questions]
            cache = _cache_of_group(projected, group, k) if projected is not None else None
            outputs.append(self._score(Memory(group.states, group.mask), targets, mask, cache))
        ordered = restore_order(outputs, [(group.rows, 0) for group in reading.groups])
        return ordered.unflatten(0, (-1, k))

    def fused_log_probs(
        self, reading: Reading, batch: FusionBatch, passage_bias: Float[Tensor, "batch k"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """Do as the base class says. In training, `reading` keeps the projections of the passages, so that scoring
        single passages without gradient costs no more than the few answer tokens."""
        memory, starts = self._fuse(reading, batch, passage_bias)
        # Checkpointed layers take no cache, and would project again in the backward pass.
        keep = torch.is_grad_enabled() and not self.config.gradient_checkpointing
        cache = EncoderDecoderCache(DynamicCache(), CrossCache()) if keep else None
        log_probs = self._score(memory, batch.answer_ids, batch.answer_mask, cache)
        if cache is not None and len(cache.cross_attention_cache.layers):
            layers: Any = cache.cross_attention_cache.layers
            detached = Memory(memory.states.detach(), memory.mask.detach(), memory.passage)
            projections = [(layer.keys.detach(), layer.values.detach()) for layer in layers]
            reading.projected = Projected(projections, starts, detached)
        return log_probs

    def null_log_probs(self, reading: Reading, batch: FusionBatch) -> Float[Tensor, "batch tokens"]:
        memory = Memory(self._encode(batch.null_ids, batch.null_mask), batch.null_mask)
        return self._score(memory, batch.answer_ids, batch.answer_mask)

    def left_out_log_probs(self, reading: Reading, batch: FusionBatch) -> Float[Tensor, "batch k tokens"]:
        if self.attention in NO_PROBABILITIES:
            allowed = "must be auto, eager or sdpa with objective.name=loop, which leaves passages out"
            raise refuse("generator.attention", self.attention, allowed)
        projected = None if torch.is_grad_enabled() else reading.projected
        memory = projected.memory if projected is not None else self._fuse(reading, batch, None)[0]
        assert memory.passage is not None
        k = batch.passage_mask.shape[1]
        passages = torch.arange(k, device=memory.passage.device)[:, None]
        kept = (memory.passage[:, None] != passages) & (memory.passage[:, None] < k)  # [batch, k, source]
        hidden = torch.zeros(kept.shape, dtype=memory.states.dtype, device=kept.device)
        hidden = hidden.masked_fill(~kept, torch.finfo(hidden.dtype).min).flatten(0, 1)[:, None, None, :]
        targets, mask = (tensor.repeat_interleave(k, dim=0) for tensor in (batch.answer_ids, batch.answer_mask))
        with rerouted(self.model, fold_queries(k)):
            cache = _cache_of(projected.layers) if projected is not None else None
            log_probs = self._score(Memory(memory.states, hidden), targets, mask, cache).unflatten(0, (-1, k))
        alone = (batch.passage_mask.sum(dim=1) <= 1)[:, None, None]
        return torch.where(alone, self.null_log_probs(reading, batch)[:, None], log_probs)

    def fused_with_attention(
        self, reading: Reading, batch: FusionBatch
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch k"]]:
        self.check_attention("adist")
        num_questions, k = batch.passage_mask.shape
        places = torch.arange(batch.answer_mask.shape[1], device=batch.answer_mask.device).expand(num_questions, -1)
        mass = AttentionMass(places, batch.answer_mask, cross=True)
        memory = self._fuse(reading, batch, None)[0]
        assert memory.passage is not None
        with rerouted(self.model, mass):
            log_probs = self._score(memory, batch.answer_ids, batch.answer_mask)
        taken = mass.per_key().new_zeros(num_questions, k + 1).scatter_add(1, memory.passage, mass.per_key())
        return log_probs, taken[:, :k]

    def check_attention(self, objective: str) -> None:
        check_attention(self.model, self.attention, objective)

    @torch.no_grad()
    def write(
        self,
        reading: Reading,
        batch: FusionBatch,
        *,
        fused: bool,
        max_tokens: int,
        num_beams: int,
        passage_bias: Tensor | None = None,
        temperature: float = 0.0,
    ) -> Decoded:
        memory = self._fuse(reading, batch, passage_bias)[0] if fused else self._unpack(reading.groups)
        model: Any = self.model
        with self._cross_attention(memory.mask.repeat_interleave(num_beams, dim=0)):
            generated = model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, memory.states)),
                attention_mask=torch.ones(memory.states.shape[:2], dtype=torch.int64, device=memory.states.device),
                max_new_tokens=max_tokens + 1,
                num_beams=num_beams,
                past_key_values=EncoderDecoderCache(
                    DynamicCache(), DynamicCache()
                ),  # the default counts encoder layers
                synced_gpus=is_sharded(self.model),
                **token_scores.sampling(temperature),
            )
        tokens, targets, mask = token_scores.written_rows(generated[:, 1:], self.end_id, max_tokens)
        return Decoded(tokens, self._score(memory, targets, mask).sum(dim=1))

    @contextmanager
    def _cross_attention(self, mask: Tensor) -> Iterator[None]:
        """Make the decoder attend through `mask` inside the block; `generate` would refuse a biased one."""

        def replace_mask(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            assert "encoder_attention_mask" in kwargs
            return args, {**kwargs, "encoder_attention_mask": _for_attention(mask)}

        decoder: Any = self.model.get_decoder()
        hook = decoder.register_forward_pre_hook(replace_mask, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _score(self, memory: Memory, targets: Tensor, mask: Tensor, cache: EncoderDecoderCache | None = None) -> Tensor:
        """Return the log-probabilities float32 [rows, tokens] of `targets`, teacher-forced. `cache` holds the decoder's
        keys and values of `memory`; an empty one is filled with them."""
        if targets.shape[1] == 0:
            return torch.zeros(targets.shape, device=targets.device)
        start = targets.new_full((len(targets), 1), self.decoder_start_id)
        inputs = torch.cat([start, targets[:, :-1]], dim=1)
        if self.head is not None:
            states = self.head.states(
                input_ids=inputs,
                encoder_hidden_states=memory.states,
                encoder_attention_mask=_for_attention(memory.mask),
                past_key_values=cache,
            )
            return self.head.log_probs(states, targets, mask)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, memory.states)),
            attention_mask=_for_attention(memory.mask),
            decoder_input_ids=inputs,
            past_key_values=cache,
            use_cache=False,
        ).logits
        return token_scores.token_log_probs(logits, targets, mask)

    def _fuse(self, reading: Reading, batch: FusionBatch, passage_bias: Tensor | None) -> tuple[Memory, Tensor]:
        """Return one row of memory per question, the valid tokens of its passages side by side without padding between,
        and the place at which each passage begins in it, int64 [batch, k]."""
        groups = reading.groups
        lengths = torch.cat([group.mask.sum(dim=1) for group in groups])
        order = torch.argsort(torch.cat([group.rows for group in groups]))
        starts = (lengths.cumsum(0) - lengths)[order].view(batch.passage_mask.shape)  # of each passage among all tokens
        lengths = lengths[order].view(batch.passage_mask.shape) * batch.passage_mask
        ends = lengths.cumsum(dim=1)
        position = torch.arange(max(1, int(ends[:, -1].max())), device=ends.device).expand(len(ends), -1)
        passage = torch.searchsorted(ends, position.contiguous(), right=True).clamp(max=ends.shape[1] - 1)
        used = position < ends[:, -1:]
        valid = used | ((ends[:, -1:] == 0) & (position == 0))  # no passage: finite, and never used
        begins = ends - lengths
        source = starts.gather(1, passage) + position - begins.gather(1, passage)
        tokens = torch.cat([group.states[group.mask] for group in groups])
        states = tokens.index_select(0, torch.where(valid, source, 0).flatten()).unflatten(0, position.shape)
        passage_or_none = passage.masked_fill(~used, batch.passage_mask.shape[1])
        if passage_bias is None:
            return Memory(states, valid, passage_or_none), begins
        if self.attention == "flash_attention_2":
            raise refuse("generator.attention", self.attention, "must be eager or sdpa: it takes a score bias")
        # A padded passage has bias -inf and no token here; zero keeps its gradient finite.
        bias = passage_bias.masked_fill(~batch.passage_mask, 0.0).gather(1, passage).to(states.dtype)
        bias = bias.masked_fill(~valid, torch.finfo(states.dtype).min)
        return Memory(states, bias[:, None, None, :], passage_or_none), begins

    def _unpack(self, groups: list[Group]) -> Memory:
        """Return one padded row of memory per passage, for writing."""
        width = max(group.mask.shape[1] for group in groups)
        order = [(group.rows, 0) for group in groups]
        states, masks = [], []
        for group in groups:
            missing = width - group.mask.shape[1]
            states.append(torch.nn.functional.pad(group.states, (0, 0, 0, missing)))
            masks.append(torch.nn.functional.pad(group.mask, (0, missing)))
        return Memory(restore_order(states, order), restore_order(masks, order))

    def _checkpoint(self) -> PreTrainedModel:
        return load_pretrained(
            AutoModelForSeq2SeqLM,
            self.config.name,
            "generator.name",
            attn_implementation=self.attention,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _fresh(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """Return a T5 of `generator.fresh`'s size with random weights."""
        fresh = self.config.fresh
        if fresh.hidden % fresh.num_heads:
            allowed = f"must be a multiple of num_heads={fresh.num_heads}"
            raise refuse("generator.fresh.hidden", fresh.hidden, allowed)
        start = start_id(tokenizer)
        options: dict[str, Any] = {"attn_implementation": self.attention}
        options["decoder_start_token_id"] = pad_id(tokenizer) if start is None else start
        shape = T5Config(
            vocab_size=len(tokenizer),
            d_model=fresh.hidden,
            d_kv=fresh.hidden // fresh.num_heads,
            d_ff=fresh.intermediate,
            num_layers=fresh.num_encoder_layers,
            num_decoder_layers=fresh.num_decoder_layers,
            num_heads=fresh.num_heads,
            dropout_rate=fresh.dropout,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=end_id(tokenizer),
            **options,
        )
        return T5ForConditionalGeneration(shape)

    def _check_positions(self) -> None:
        """Raise ValueError if learned positions are fewer than question and passage may take."""
        special = len(self.start) + len(self.between) + len(self.end)
        longest = self.config.max_question_tokens + self.config.max_passage_tokens + special
        limit = num_positions(self.model)
        if limit is not None and longest > limit:
            allowed = (
                f"must be lower: with the question it makes {longest} tokens, and {self.config.name} takes {limit}"
            )
            raise refuse("generator.max_passage_tokens", self.config.max_passage_tokens, allowed)


class CrossCache(DynamicCache):
    """Keeps keys and values of a memory as they come: a memory does not grow, so it needs none of the copies that a
    cache of transformers makes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep those of decoder layer `layer_idx`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer: Any = self.layers[layer_idx]
        layer.lazy_initialization(key_states, value_states)
        layer.keys, layer.values = key_states, value_states
        return key_states, value_states


def _cache_of_group(projected: Projected, group: Group, k: int) -> EncoderDecoderCache:
    """Cut keys and values of single passages out of those of the fused memory. The values at a row's padding, and in
    the row of a padded passage, are arbitrary."""
    layers: list[tuple[Tensor, Tensor]] = []
    tokens = torch.arange(group.mask.shape[1], device=group.mask.device)
    questions = (group.rows // k)[:, None]
    for layer in projected.layers:
        places = (projected.starts.flatten()[group.rows][:, None] + tokens).clamp(max=layer[0].shape[2] - 1)
        keys, values = (tensor.transpose(1, 2)[questions, places].transpose(1, 2) for tensor in layer)
        layers.append((keys, values))
    return _cache_of(layers)


def _cache_of(layers: Sequence[tuple[Tensor, Tensor]]) -> EncoderDecoderCache:
    """Put keys and values of every decoder layer's cross-attention into a cache of transformers."""
    cross = CrossCache()
    for number, (keys, values) in enumerate(layers):
        cross.update(keys, values, number)
    return EncoderDecoderCache(DynamicCache(), cross)


def _for_attention(mask: Tensor) -> Tensor:
    return mask.long() if mask.dtype == torch.bool else mask
