"""Any causal language model as a generator: passages, question and answer in one prompt, left to right.

The prompt is put together from segments that were tokenised once (`training/models/sides.py`). One passage at a time
means batch * k prompts of one passage each; fused means one prompt with all passages in the order given. Only answer
tokens and end-of-sequence are scored. Padding is on the right for scoring, where nothing after a token can change it
(which also holds for state-space models), and on the left for writing.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from training.models import likelihood
from training.models.generator import Decoded, Generator, ReaderBatch
from training.models.packing import length_groups, pad_rows, restore_order, row_lengths
from training.models.pretrained import check_vocabulary, choose_attention, is_sharded, load_pretrained
from training.models.sides import passage_template, plain_ids, prompt_template, surrounding_tokens
from training.models.tokenizers import end_id, pad_id, start_id
from training.settings import GeneratorConfig

FRESH_CONTEXT = 8192  # tokens; rotary positions cost nothing


@dataclass
class CausalBatch(ReaderBatch):
    """Prompts without answers, padded on the right."""

    single_ids: Tensor  # int64 [batch * k, prompt]: one passage each
    single_mask: Tensor  # bool [batch * k, prompt]
    joint_ids: Tensor  # int64 [batch, prompt]: all passages
    joint_mask: Tensor  # bool [batch, prompt]


class CausalGenerator(Generator):
    """A causal language model of transformers, or a fresh Llama of `generator.fresh`'s size (its decoder layers)."""

    def __init__(self, config: GeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.config = config
        self.attention = choose_attention(config.attention, "generator.attention")
        self.model = self._checkpoint() if config.name else self._fresh(tokenizer)
        check_vocabulary(self.model, len(tokenizer))
        self.end_id, self.pad_id = end_id(tokenizer), pad_id(tokenizer)
        literals, self.fields = prompt_template(config)
        # Spaces before a question or an answer belong to its first token: see sides.InContext.
        following = [*self.fields, "answer"]
        texts = [
            text if name == "passages" else text.rstrip(" ") for text, name in zip(literals, following, strict=True)
        ]
        self.literals = [np.array(ids, dtype=np.int64) for ids in plain_ids(tokenizer, texts)]
        self.start = np.array(surrounding_tokens(tokenizer)[0], dtype=np.int64)
        suffix = passage_template(config)[0][-1]
        self.after_passage = np.array(plain_ids(tokenizer, [suffix])[0], dtype=np.int64)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = int(limit) if limit else None
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.model.generation_config = likelihood.generation_settings(
            self.model, self.end_id, self.pad_id, start_id(tokenizer)
        )
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def collate(
        self,
        questions: Sequence[np.ndarray],
        passages: Sequence[Sequence[np.ndarray]],
        answers: Sequence[np.ndarray] | None,
    ) -> CausalBatch:
        filled, passage_mask = likelihood.collate_passages(passages)
        single = [self._prompt(q, [row]) for q, rows in zip(questions, filled, strict=True) for row in rows]
        joint = [self._prompt(question, rows) for question, rows in zip(questions, passages, strict=True)]
        answer_ids, answer_mask = likelihood.collate_answers(answers, len(questions), self.end_id)
        return CausalBatch(
            answer_ids, answer_mask, passage_mask, *pad_rows(single, self.pad_id), *pad_rows(joint, self.pad_id)
        )

    def read(self, batch: ReaderBatch) -> None:
        """Nothing: a prompt is read together with its answer."""

    def per_passage_log_probs(self, reading: object, batch: ReaderBatch) -> Tensor:
        assert isinstance(batch, CausalBatch)
        k = batch.passage_mask.shape[1]
        answers = (batch.answer_ids.repeat_interleave(k, dim=0), batch.answer_mask.repeat_interleave(k, dim=0))
        return self._score(batch.single_ids, batch.single_mask, *answers).unflatten(0, (-1, k))

    def fused_log_probs(self, reading: object, batch: ReaderBatch, passage_bias: Tensor | None = None) -> Tensor:
        assert isinstance(batch, CausalBatch)
        _refuse_bias(passage_bias)
        return self._score(batch.joint_ids, batch.joint_mask, batch.answer_ids, batch.answer_mask)

    @torch.no_grad()
    def write(
        self,
        reading: object,
        batch: ReaderBatch,
        fused: bool,
        max_tokens: int,
        num_beams: int,
        passage_bias: Tensor | None = None,
        temperature: float = 0.0,
    ) -> Decoded:
        assert isinstance(batch, CausalBatch)
        _refuse_bias(passage_bias)
        ids, mask = (batch.joint_ids, batch.joint_mask) if fused else (batch.single_ids, batch.single_mask)
        width = ids.shape[1]
        self._check_context(width + max_tokens + 1)
        columns = torch.arange(width, device=ids.device) + row_lengths(mask)[:, None]  # rotates padding to the left
        left = (columns % width).expand_as(ids)
        model: Any = self.model
        generated = model.generate(
            input_ids=ids.gather(1, left),
            attention_mask=mask.gather(1, left).long(),
            max_new_tokens=max_tokens + 1,
            num_beams=num_beams,
            synced_gpus=is_sharded(self.model),
            **likelihood.sampling(temperature),
        )
        tokens, targets, target_mask = likelihood.written_rows(generated[:, width:], self.end_id, max_tokens)
        return Decoded(tokens, self._score(ids, mask, targets, target_mask).sum(dim=1))

    def _prompt(self, question: np.ndarray, passages: Sequence[np.ndarray]) -> np.ndarray:
        """The template with its fields filled in; a passage without tokens (closed book, padding) leaves nothing."""
        parts = [self.start]
        for literal, name in zip(self.literals, [*self.fields, ""], strict=True):
            parts.append(literal)
            if name == "question":
                parts.append(question[: self.config.max_question_tokens])
            elif name == "passages":
                for row in passages:
                    parts += [row[: self.config.max_passage_tokens], self.after_passage] if len(row) else []
        return np.concatenate(parts).astype(np.int64)

    def _score(self, prompt_ids: Tensor, prompt_mask: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
        """float32 [rows, tokens]: log-probabilities of `targets` right after each row's prompt."""
        tokens = targets.shape[1]
        if tokens == 0:
            return torch.zeros(targets.shape, device=targets.device)
        self._check_context(prompt_ids.shape[1] + tokens)
        lengths = row_lengths(prompt_mask)
        places = lengths[:, None] + torch.arange(tokens, device=targets.device)
        room = (0, tokens)
        ids = torch.nn.functional.pad(prompt_ids, room, value=self.pad_id).scatter(1, places, targets)
        mask = torch.nn.functional.pad(prompt_mask, room).scatter(1, places, target_mask)
        groups = length_groups(mask, self.config.length_groups)
        outputs: list[Tensor] = []
        for rows, length in groups:
            first = int(lengths[rows].min()) - 1  # no logits are needed before it: the token at p is predicted at p - 1
            logits = self._logits(ids[rows, :length], mask[rows, :length], first)[:, :-1]
            follows = mask[rows, first + 1 : length]
            log_probs = likelihood.token_log_probs(logits, ids[rows, first + 1 : length], follows)
            at = (places[rows] - 1 - first).clamp(max=log_probs.shape[1] - 1)
            outputs.append(log_probs.gather(1, at).masked_fill(~target_mask[rows], 0.0))
        return restore_order(outputs, groups)

    def _logits(self, ids: Tensor, mask: Tensor, first: int) -> Tensor:
        """Logits [rows, tokens - first, vocabulary] from place `first` on."""
        model: Any = self.model
        options = {"logits_to_keep": ids.shape[1] - first} if self.keeps_logits else {}
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **options).logits
        return logits if self.keeps_logits else logits[:, first:]

    def _check_context(self, tokens: int) -> None:
        """Raises ValueError before the model would run past its positions."""
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"a prompt and its answer take {tokens} tokens, the generator's context is {self.context}: lower "
                f"generator.max_passage_tokens (now {self.config.max_passage_tokens}) or retrieval.k"
            )

    def _checkpoint(self) -> PreTrainedModel:
        return load_pretrained(
            AutoModelForCausalLM,
            self.config.name,
            "generator.name",
            attn_implementation=self.attention,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _fresh(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """A Llama with random weights and tied embeddings."""
        fresh = self.config.fresh
        if fresh.hidden % (2 * fresh.num_heads):
            raise ValueError(
                f"generator.fresh.hidden is {fresh.hidden}; allowed: a multiple of 2 * num_heads={2 * fresh.num_heads}"
            )
        options: dict[str, Any] = {"attn_implementation": self.attention}
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=fresh.hidden,
            intermediate_size=fresh.intermediate,
            num_hidden_layers=fresh.num_decoder_layers,
            num_attention_heads=fresh.num_heads,
            attention_dropout=fresh.dropout,
            max_position_embeddings=FRESH_CONTEXT,
            pad_token_id=pad_id(tokenizer),
            bos_token_id=start_id(tokenizer),
            eos_token_id=end_id(tokenizer),
            tie_word_embeddings=True,
            **options,
        )
        return cast(PreTrainedModel, LlamaForCausalLM(shape))


def _refuse_bias(passage_bias: Tensor | None) -> None:
    if passage_bias is not None:
        raise ValueError(
            "generator.kind=causal reads all passages in one prompt and cannot take a score bias; set "
            "objective.score_bias=false, or generator.kind to one of: copy, fusion"
        )
