"""Train a small encoder-decoder with a copy head from random weights, or from a pretrained encoder.

Each passage is encoded together with the question; the decoder attends to one passage or to all of them. The next
token is a mixture of the vocabulary and of a pointer over the passages' tokens: `gate * vocabulary + (1 - gate) *
pointer` (See et al. 2017, "Get To The Point", equations 8 and 9), which lets a model of a few hundred steps write
names it has never seen. The pointer may follow itself: where the last token was copied from, the next one often
stands one further (selective read, Gu et al. 2016, "Incorporating Copying Mechanism", equation 9). A bias per
passage, usually log p(z|q), may be added to the attention and pointer logits of that passage's tokens (Lewis et al.
2020, "Pre-training via Paraphrasing", equation 4), with gradient.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from training.models.generators.copy_encoder import FreshSource, PretrainedSource, load_source
from training.models.generators.copy_layers import MASKED, Layer, Seen, TiedEmbedding, initialise, mask_bias
from training.models.generators.decode import beam_search, sample
from training.models.generators.generator import Decoded, Generator, GeneratorBatch
from training.models.generators.token_scores import collate_passages
from training.models.text.packing import by_length, pad_rows
from training.training_settings import GeneratorConfig


@dataclass
class CopyBatch(GeneratorBatch):
    """Holds `[CLS] question [SEP] passage [SEP]` for each passage."""

    source_ids: Tensor  # int64 [batch * k, source]
    source_mask: Tensor  # bool [batch * k, source]
    copy_mask: Tensor  # bool [batch * k, source]: True for the passage's tokens and the last [SEP]
    null_ids: Tensor  # int64 [batch, source]: the question with an empty passage
    null_mask: Tensor  # bool [batch, source]
    null_copy_mask: Tensor  # bool [batch, source]


@dataclass(kw_only=True)
class Memory:
    """Holds the projections of the states that the decoder attends to, computed once."""

    keys: list[Tensor]  # per decoder layer, [rows, heads, source, head_dim]
    values: list[Tensor]
    copy_keys: Tensor  # [rows, source, hidden]
    source_ids: Tensor  # [rows, source]
    attention_bias: Tensor  # float [rows, source]: 0, -inf at padding, plus the passage's bias
    copy_bias: Tensor  # float [rows, source]
    passage: Tensor | None = None  # int64 [rows, source]: passage of each token of a fused memory

    def each(self, change: Callable[[Tensor], Tensor]) -> "Memory":
        """Return the memory with every tensor changed by `change`."""
        return Memory(
            keys=[change(t) for t in self.keys],
            values=[change(t) for t in self.values],
            copy_keys=change(self.copy_keys),
            source_ids=change(self.source_ids),
            attention_bias=change(self.attention_bias),
            copy_bias=change(self.copy_bias),
            passage=None if self.passage is None else change(self.passage),
        )

    def repeat(self, times: int) -> "Memory":
        """Return the memory with every row `times` times in a row, for beams."""
        return self.each(lambda tensor: tensor.repeat_interleave(times, dim=0))


@dataclass
class Reading:
    """Holds the encoder states of a batch, every passage encoded once."""

    states: Tensor  # [batch * k, source, hidden]
    fused: Memory | None = None  # memory of a fused pass without bias, for passes that leave a passage out


class CopyReader(Generator[CopyBatch, Reading]):
    """Reads and writes with a copy head. `start_id`, `end_id`, `pad_id` are token ids of its tokeniser ([CLS], [SEP],
    [PAD]). `source` replaces the encoder of `config.name`. Raises ValueError for a checkpoint that does not fit."""

    encoder: FreshSource | PretrainedSource

    def __init__(
        self,
        config: GeneratorConfig,
        vocabulary: int,
        *,
        start_id: int,
        end_id: int,
        pad_id: int,
        source: PretrainedSource | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.max_source = config.max_question_tokens + config.max_passage_tokens + 3
        if config.name and source is None:
            source = load_source(config, self.max_source)
        size = config.fresh if source is None else replace(config.fresh, hidden=source.hidden)
        self.tokens = TiedEmbedding(vocabulary, size.hidden)
        self.target_positions = nn.Embedding(config.max_answer_tokens + 1, size.hidden)
        layer = (size.hidden, size.num_heads, size.intermediate, size.dropout)
        self.decoder = nn.ModuleList(Layer(*layer, cross=True) for _ in range(size.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(size.hidden)
        self.copy_query = nn.Linear(size.hidden, size.hidden)
        self.copy_key = nn.Linear(size.hidden, size.hidden, bias=False)
        self.gates = nn.Linear(size.hidden, 2)  # vocabulary or pointer; follow the last copy or not
        if source is None:
            self.encoder = FreshSource(size, self.max_source)
        self.apply(initialise)
        if source is not None:  # it has weights already
            self.encoder = source
            source.lend_embeddings(self.tokens)

    def collate(
        self,
        questions: Sequence[np.ndarray],
        passages: Sequence[Sequence[np.ndarray]],
        answers: Sequence[np.ndarray] | None,
    ) -> CopyBatch:
        filled, passage_mask = collate_passages(passages)
        k = passage_mask.shape[1]
        sources: list[np.ndarray] = []
        starts: list[int] = []
        for question, rows in zip(questions, filled, strict=True):
            head = np.concatenate([[self.start_id], question[: self.config.max_question_tokens], [self.end_id]])
            for row in rows:
                tail = row[: self.config.max_passage_tokens]
                sources.append(np.concatenate([head, tail, [self.end_id]]).astype(np.int64))
                starts.append(len(head))
        nulls = [np.append(row[:start], self.end_id) for row, start in zip(sources[::k], starts[::k], strict=True)]
        answer_ids, answer_mask = self._answers(answers, len(questions))
        with_passages = self._sources(sources, starts)
        return CopyBatch(answer_ids, answer_mask, passage_mask, *with_passages, *self._sources(nulls, starts[::k]))

    def _sources(self, rows: list[np.ndarray], starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask, and the mask of tokens that may be copied, from `starts` on."""
        ids, mask = pad_rows(rows, self.pad_id)
        return ids, mask, (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]) & mask

    def _answers(self, answers: Sequence[np.ndarray] | None, batch: int) -> tuple[Tensor, Tensor]:
        if answers is None:
            return torch.zeros(batch, 0, dtype=torch.int64), torch.zeros(batch, 0, dtype=torch.bool)
        limit = self.config.max_answer_tokens
        return pad_rows([np.append(row[:limit], self.end_id) for row in answers], self.pad_id)

    def read(self, batch: CopyBatch) -> Reading:
        """Encode each passage once, in groups of like length."""
        return Reading(by_length(self._encode, batch.source_ids, batch.source_mask, self.config.length_groups))

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        ends = (ids == self.end_id).long()
        in_passage = (ends.cumsum(dim=1) - ends).clamp(max=1)  # 1 after the question's [SEP]
        fresh = isinstance(self.encoder, FreshSource)
        return self.encoder(self.tokens(ids) if fresh else ids, mask, in_passage)

    def per_passage_log_probs(self, reading: Reading, batch: CopyBatch) -> Float[Tensor, "batch k tokens"]:
        k = batch.passage_mask.shape[1]
        memory = self._memory_of_each(reading, batch)
        targets = batch.answer_ids.repeat_interleave(k, dim=0)
        log_probs = self._target_log_probs(memory, targets)
        return log_probs.unflatten(0, (-1, k)).masked_fill(~batch.answer_mask[:, None], 0.0)

    def fused_log_probs(
        self, reading: Reading, batch: CopyBatch, passage_bias: Float[Tensor, "batch k"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        memory = self._memory_of_all(reading, batch, passage_bias)
        if passage_bias is None:
            reading.fused = memory.each(Tensor.detach)
        return self._target_log_probs(memory, batch.answer_ids).masked_fill(~batch.answer_mask, 0.0)

    def null_log_probs(self, reading: Reading, batch: CopyBatch) -> Float[Tensor, "batch tokens"]:
        states = self._encode(batch.null_ids, batch.null_mask)
        memory = self._project(states, batch.null_ids, mask_bias(batch.null_mask), mask_bias(batch.null_copy_mask))
        return self._target_log_probs(memory, batch.answer_ids).masked_fill(~batch.answer_mask, 0.0)

    def left_out_log_probs(self, reading: Reading, batch: CopyBatch) -> Float[Tensor, "batch k tokens"]:
        k = batch.passage_mask.shape[1]
        kept = reading.fused if reading.fused is not None and not torch.is_grad_enabled() else None
        memory = (kept if kept is not None else self._memory_of_all(reading, batch, None)).repeat(k)
        assert memory.passage is not None
        passages = torch.arange(k, device=memory.passage.device).repeat(len(batch.answer_ids))
        left_out = memory.passage == passages[:, None]
        memory.attention_bias = memory.attention_bias.masked_fill(left_out, MASKED)
        memory.copy_bias = memory.copy_bias.masked_fill(left_out, MASKED)
        log_probs = self._target_log_probs(memory, batch.answer_ids.repeat_interleave(k, dim=0))
        log_probs = log_probs.unflatten(0, (-1, k)).masked_fill(~batch.answer_mask[:, None], 0.0)
        alone = (batch.passage_mask.sum(dim=1) <= 1)[:, None, None]
        return torch.where(alone, self.null_log_probs(reading, batch)[:, None], log_probs)

    def fused_with_attention(
        self, reading: Reading, batch: CopyBatch
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch k"]]:
        num_questions, k = batch.passage_mask.shape
        memory = self._memory_of_all(reading, batch, None)
        assert memory.passage is not None
        seen = Seen()
        log_probs = self._target_log_probs(memory, batch.answer_ids, seen).masked_fill(~batch.answer_mask, 0.0)
        taken = (torch.stack(seen.parts).sum(dim=0) * batch.answer_mask[..., None]).sum(dim=1)  # [batch, source]
        taken = taken.new_zeros(num_questions, k).scatter_add(1, memory.passage, taken)
        return log_probs, taken.masked_fill(~batch.passage_mask, 0.0)

    def _memory_of_each(self, reading: Reading, batch: CopyBatch) -> Memory:
        """Return one row of memory per passage."""
        attention_bias, copy_bias = mask_bias(batch.source_mask), mask_bias(batch.copy_mask)
        return self._project(reading.states, batch.source_ids, attention_bias, copy_bias)

    def _memory_of_all(self, reading: Reading, batch: CopyBatch, passage_bias: Tensor | None) -> Memory:
        """Return one row of memory per question: the real tokens of its passages, side by side."""
        states = reading.states
        num_questions, k = batch.passage_mask.shape
        used = batch.source_mask.unflatten(0, (num_questions, k)) & batch.passage_mask[..., None]
        used = used.flatten(1)  # [batch, k * source]
        width = int(used.sum(dim=1).max())
        order = (~used).long().argsort(dim=1, stable=True)[:, :width]  # real tokens first, in order
        kept = used.gather(1, order)
        memory_states = states.unflatten(0, (num_questions, k)).flatten(1, 2)
        memory_states = memory_states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
        source_ids = batch.source_ids.view(num_questions, -1).gather(1, order)
        copyable = batch.copy_mask.view(num_questions, -1).gather(1, order) & kept
        passage = order // batch.source_ids.shape[1]
        bias = torch.zeros(order.shape, device=states.device)
        if passage_bias is not None:
            # A padded passage has bias -inf and no token here; zero keeps its gradient finite.
            per_passage = passage_bias.float().masked_fill(~batch.passage_mask, 0.0)
            bias = per_passage.gather(1, passage)
        memory = self._project(memory_states, source_ids, bias + mask_bias(kept), bias + mask_bias(copyable))
        memory.passage = passage
        return memory

    def _project(self, states: Tensor, source_ids: Tensor, attention_bias: Tensor, copy_bias: Tensor) -> Memory:
        projected = [layer.project(states) for layer in self._decoder_layers()]
        return Memory(
            keys=[key for key, _ in projected],
            values=[value for _, value in projected],
            copy_keys=self.copy_key(states),
            source_ids=source_ids,
            attention_bias=attention_bias,
            copy_bias=copy_bias,
        )

    def _decoder_layers(self) -> Iterator[Layer]:
        for layer in self.decoder:
            assert isinstance(layer, Layer)
            yield layer

    def _decode(self, memory: Memory, inputs: Tensor, seen: Seen | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return states [rows, tokens, hidden], pointer weights [rows, tokens, source] and gates [rows, tokens]. `seen`
        records what each layer takes from the memory, [rows, tokens, source]."""
        length = inputs.shape[1]
        x = self.tokens(inputs) + self.target_positions(torch.arange(length, device=inputs.device))
        causal = mask_bias(torch.ones(length, length, dtype=torch.bool, device=inputs.device).tril())
        bias = memory.attention_bias[:, None, None, :]
        for layer, keys, values in zip(self.decoder, memory.keys, memory.values, strict=True):
            x = layer(x, causal, (keys, values, bias), seen)
        x = self.decoder_norm(x)
        pointer = (self.copy_query(x) @ memory.copy_keys.transpose(1, 2)).float() / math.sqrt(x.shape[-1])
        pointer = (pointer + memory.copy_bias[:, None]).softmax(dim=-1)
        gate, follow = torch.sigmoid(self.gates(x).float()).unbind(dim=-1)
        return x, _follow_copies(pointer, follow, memory, inputs), gate

    def _target_log_probs(self, memory: Memory, targets: Tensor, seen: Seen | None = None) -> Tensor:
        """Return the log-probabilities float32 of `targets` [rows, tokens], without a mixture of vocabulary size."""
        inputs = F.pad(targets, (1, 0), value=self.start_id)[:, :-1]
        states, pointer, gate = self._decode(memory, inputs, seen)
        logits = self.tokens(states, as_output=True)
        written = (logits.gather(-1, targets[..., None]).squeeze(-1).float() - logits.float().logsumexp(dim=-1)).exp()
        same = memory.source_ids[:, None, :] == targets[..., None]
        copied = (pointer * same).sum(dim=-1)
        return (gate * written + (1 - gate) * copied).clamp_min(1e-30).log()

    def write(
        self,
        reading: Reading,
        batch: CopyBatch,
        *,
        fused: bool,
        max_tokens: int,
        num_beams: int,
        passage_bias: Tensor | None = None,
        temperature: float = 0.0,
    ) -> Decoded:
        memory = self._memory_of_all(reading, batch, passage_bias) if fused else self._memory_of_each(reading, batch)
        rows = memory.source_ids.shape[0]
        memory = memory.repeat(num_beams) if num_beams > 1 else memory
        sources = memory.source_ids

        def next_log_probs(prefix: Tensor) -> Tensor:
            states, pointer, gate = self._decode(memory, prefix)
            logits = self.tokens(states[:, -1:], as_output=True)
            gate, pointer = gate[:, -1:], pointer[:, -1]
            mixed = gate * logits[:, -1].float().softmax(dim=-1)
            mixed = mixed.scatter_add(1, sources, (1 - gate) * pointer)
            mixed[:, self.pad_id] = 0.0
            return mixed.clamp_min(1e-30).log()

        max_tokens = min(max_tokens, self.config.max_answer_tokens)
        sharded = hasattr(self.gates.weight, "ds_id")  # ZeRO 3: each step is a collective
        draw = partial(sample, temperature=temperature)
        search = draw if temperature > 0 else partial(beam_search, num_beams=num_beams)
        return search(
            next_log_probs,
            rows,
            start_id=self.start_id,
            end_id=self.end_id,
            max_tokens=max_tokens,
            device=sources.device,
            run_to_end=sharded,
        )


def _follow_copies(pointer: Tensor, follow: Tensor, memory: Memory, inputs: Tensor) -> Tensor:
    """Mix each pointer distribution with the last one, moved by one token.

    pointer [rows, tokens, source], follow [rows, tokens] in (0, 1), inputs [rows, tokens] the tokens written so far.
    The origin of the last token is its pointer restricted to equal source tokens. Mass that finds no place stays with
    the new pointer.
    """
    allowed = memory.copy_bias > -1e8
    mixed = [pointer[:, 0]]
    for t in range(1, pointer.shape[1]):
        origin = mixed[-1] * (memory.source_ids == inputs[:, t, None])
        origin = origin / origin.sum(dim=-1, keepdim=True).clamp_min(1e-6)
        moved = F.pad(origin[:, :-1], (1, 0)) * allowed * follow[:, t, None]
        mixed.append(pointer[:, t] * (1 - moved.sum(dim=-1, keepdim=True)) + moved)
    return torch.stack(mixed, dim=1)
