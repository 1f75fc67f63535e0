"""Use any causal language model as a generator: passages, question and answer stand in one prompt, left to right.

The prompt is put together from segments that were tokenised once (`training/models/text/token_rows.py`). For one
passage at a time there are batch * k prompts of one passage each; fused, one prompt has all passages in the order
given. Only answer tokens and end-of-sequence are scored. Padding is on the right for scoring, where nothing after a
token can change it (which also holds for state-space models), and on the left for writing.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from indexing.declare import refuse
from training.models.generators import token_scores
from training.models.generators.attention import AttentionMass, check_attention, rerouted
from training.models.generators.fresh_causal import fresh_causal
from training.models.generators.generator import Decoded, Generator, GeneratorBatch
from training.models.generators.head import find_head
from training.models.generators.shape import context_of
from training.models.parts.pretrained import check_vocabulary, choose_attention, is_sharded, load_pretrained
from training.models.text.packing import length_groups, pad_rows, restore_order, row_lengths
from training.models.text.prompts import passage_template, prompt_segments, split_context
from training.models.text.token_rows import plain_ids, surrounding_tokens
from training.models.text.tokenizers import end_id, pad_id, start_id
from training.training_settings import GeneratorConfig


@dataclass
class CausalBatch(GeneratorBatch):
    """Holds prompts without answers, padded on the right."""

    single_ids: Tensor  # int64 [batch * k, prompt]: prompts of one passage
    single_mask: Tensor  # bool [batch * k, prompt]
    joint_ids: Tensor  # int64 [batch, prompt]: prompts of all passages
    joint_mask: Tensor  # bool [batch, prompt]
    joint_passage: Tensor  # int64 [batch, prompt]: number of the passage that a token renders; -1: none


class CausalGenerator(Generator[CausalBatch, None]):
    """A causal language model of transformers (attention, state-space or hybrid), or a fresh one of `generator.fresh`'s
    family and size (its decoder layers)."""

    def __init__(self, config: GeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.config = config
        self.attention = choose_attention(config.attention, "generator.attention")
        self.model = self._checkpoint() if config.name else fresh_causal(config.fresh, tokenizer, self.attention)
        check_vocabulary(self.model, len(tokenizer))
        self.end_id, self.pad_id = end_id(tokenizer), pad_id(tokenizer)
        literals, self.fields = prompt_segments(tokenizer, config)
        # Spaces before a question or an answer belong to its first token: see `token_rows.InContext`.
        following = [*self.fields, "answer"]
        texts = [
            text if name == "passages" else text.rstrip(" ") for text, name in zip(literals, following, strict=True)
        ]
        self.literals = [np.array(ids, dtype=np.int64) for ids in plain_ids(tokenizer, texts)]
        self.start = np.array(surrounding_tokens(tokenizer)[0], dtype=np.int64)
        if len(self.start) and self.literals[0][: len(self.start)].tolist() == self.start.tolist():
            self.start = self.start[:0]  # the chat template writes it
        suffix = passage_template(config)[0][-1]
        self.after_passage = np.array(plain_ids(tokenizer, [suffix])[0], dtype=np.int64)
        self.context = context_of(self.model.config)
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.head = find_head(self.model, config.loss_chunk_tokens)
        self.model.generation_config = token_scores.generation_settings(
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
        filled, passage_mask = token_scores.collate_passages(passages)
        single = [self._prompt(q, [row])[0] for q, rows in zip(questions, filled, strict=True) for row in rows]
        joint = [self._prompt(question, rows) for question, rows in zip(questions, passages, strict=True)]
        answer_ids, answer_mask = token_scores.collate_answers(answers, len(questions), self.end_id)
        prompts = (*pad_rows(single, self.pad_id), *pad_rows([ids for ids, _ in joint], self.pad_id))
        joint_passage = pad_rows([numbers for _, numbers in joint], -1)[0]
        return CausalBatch(answer_ids, answer_mask, passage_mask, *prompts, joint_passage)

    def read(self, batch: CausalBatch) -> None:
        """Return None: a prompt is read together with its answer."""

    def per_passage_log_probs(self, reading: None, batch: CausalBatch) -> Float[Tensor, "batch k tokens"]:
        k = batch.passage_mask.shape[1]
        answers = (batch.answer_ids.repeat_interleave(k, dim=0), batch.answer_mask.repeat_interleave(k, dim=0))
        return self._score(batch.single_ids, batch.single_mask, *answers).unflatten(0, (-1, k))

    def fused_log_probs(
        self, reading: None, batch: CausalBatch, passage_bias: Float[Tensor, "batch k"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        _refuse_bias(passage_bias)
        return self._score(batch.joint_ids, batch.joint_mask, targets=batch.answer_ids, target_mask=batch.answer_mask)

    def null_log_probs(self, reading: None, batch: CausalBatch) -> Float[Tensor, "batch tokens"]:
        prompts = without_tokens(batch.joint_ids, batch.joint_mask, batch.joint_passage >= 0)
        return self._score(*prompts, targets=batch.answer_ids, target_mask=batch.answer_mask)

    def left_out_log_probs(self, reading: None, batch: CausalBatch) -> Float[Tensor, "batch k tokens"]:
        """Do as the base class says, with one prompt for each passage that has all the others in it."""
        k = batch.passage_mask.shape[1]
        repeated = (batch.joint_ids, batch.joint_mask, batch.joint_passage, batch.answer_ids, batch.answer_mask)
        ids, mask, passage, targets, target_mask = (tensor.repeat_interleave(k, dim=0) for tensor in repeated)
        left_out = torch.arange(k, device=ids.device).repeat(len(batch.joint_ids))[:, None]
        prompts = without_tokens(ids, mask, passage == left_out)
        return self._score(*prompts, targets=targets, target_mask=target_mask).unflatten(0, (-1, k))

    def fused_with_attention(
        self, reading: None, batch: CausalBatch
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch k"]]:
        """Do as the base class says, by self-attention from the places that predict the answer to the passages'
        tokens."""
        self.check_attention("adist")
        mass = torch.zeros(batch.joint_ids.shape, device=batch.joint_ids.device)
        log_probs = self._score(
            batch.joint_ids, batch.joint_mask, targets=batch.answer_ids, target_mask=batch.answer_mask, mass=mass
        )
        k = batch.passage_mask.shape[1]
        passage = batch.joint_passage.masked_fill(batch.joint_passage < 0, k)
        return log_probs, mass.new_zeros(len(mass), k + 1).scatter_add(1, passage, mass)[:, :k]

    def check_attention(self, objective: str) -> None:
        check_attention(self.model, self.attention, objective)

    @torch.no_grad()
    def write(
        self,
        reading: None,
        batch: CausalBatch,
        *,
        fused: bool,
        max_tokens: int,
        num_beams: int,
        passage_bias: Tensor | None = None,
        temperature: float = 0.0,
    ) -> Decoded:
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
            **token_scores.sampling(temperature),
        )
        tokens, targets, target_mask = token_scores.written_rows(generated[:, width:], self.end_id, max_tokens)
        return Decoded(tokens, self._score(ids, mask, targets=targets, target_mask=target_mask).sum(dim=1))

    def _prompt(self, question: np.ndarray, passages: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Fill in the template; a passage without tokens (closed book, padding) leaves nothing. Returns ids, and for
        each of them the number of its passage, -1 around the passages."""
        begin, question = split_context(question)
        literals = self.literals if begin is None else [begin, *self.literals[1:]]
        parts = [(self.start, -1)]
        for literal, name in zip(literals, [*self.fields, ""], strict=True):
            parts.append((literal, -1))
            if name == "question":
                parts.append((question[: self.config.max_question_tokens], -1))
            elif name == "passages":
                for number, row in enumerate(passages):
                    if len(row):
                        parts += [(row[: self.config.max_passage_tokens], number), (self.after_passage, number)]
        ids = np.concatenate([part for part, _ in parts]).astype(np.int64)
        return ids, np.repeat([number for _, number in parts], [len(part) for part, _ in parts])

    def _score(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        targets: Tensor,
        target_mask: Tensor,
        mass: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probabilities float32 [rows, tokens] of `targets` right after each row's prompt. `mass` [rows,
        prompt], if given, is filled with what they take from each token of the prompt by attention."""
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
            inputs = {"input_ids": ids[rows, :length], "attention_mask": mask[rows, :length].long()}
            before = (places[rows] - 1).clamp(max=length - 1)  # the token at p is predicted at p - 1
            route = AttentionMass(before, target_mask[rows], cross=False)
            with rerouted(self.model, route) if mass is not None else nullcontext():
                outputs.append(self._target_log_probs(inputs, before, targets[rows], target_mask[rows]))
            if mass is not None:
                taken = route.per_key()[:, : mass.shape[1]]
                mass[rows, : taken.shape[1]] = taken
        return restore_order(outputs, groups)

    def _target_log_probs(
        self, inputs: dict[str, Tensor], before: Tensor, targets: Tensor, target_mask: Tensor
    ) -> Tensor:
        """Return the log-probabilities float32 [rows, tokens] of `targets`, each predicted at its place `before`."""
        if self.head is not None:
            states = self.head.states(**inputs)
            states = states.gather(1, before[..., None].expand(-1, -1, states.shape[-1]))
            return self.head.log_probs(states, targets, target_mask)
        first = int(before.min())  # no logits are needed before it
        logits = self._logits(inputs, first)
        logits = logits.gather(1, (before - first)[..., None].expand(-1, -1, logits.shape[-1]))
        return token_scores.token_log_probs(logits, targets, target_mask)

    def _logits(self, inputs: dict[str, Tensor], first: int) -> Tensor:
        """Return the logits [rows, tokens - first, vocabulary] from place `first` on."""
        model: Any = self.model
        options = {"logits_to_keep": inputs["input_ids"].shape[1] - first} if self.keeps_logits else {}
        logits = model(**inputs, use_cache=False, **options).logits
        return logits if self.keeps_logits else logits[:, first:]

    def _check_context(self, tokens: int) -> None:
        """Raise ValueError if the model would run past its positions."""
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
            # On a GPU, `auto` leaves the choice to transformers, which knows the models without sdpa.
            attn_implementation=None if (self.config.attention, self.attention) == ("auto", "sdpa") else self.attention,
            trust_remote_code=self.config.trust_remote_code,
        )


def without_tokens(ids: Tensor, mask: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the tokens of `dropped` from rows [rows, tokens], close up to the left, and return ids and mask."""
    kept = mask & ~dropped
    order = (~kept).long().argsort(dim=1, stable=True)[:, : max(1, int(kept.sum(dim=1).max()))]
    return ids.gather(1, order), kept.gather(1, order)


def _refuse_bias(passage_bias: Tensor | None) -> None:
    if passage_bias is not None:
        allowed = "must be copy or fusion with objective.score_bias=true: a prompt of all passages takes no bias"
        raise refuse("generator.kind", "causal", allowed)
