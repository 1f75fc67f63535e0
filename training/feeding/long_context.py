"""Makes prompts without retrieval: as much of the corpus as fits, or a labelled passage at a known depth among others.

A long prompt is the beginning of a random order of the whole corpus, so that the labelled passage is in it with just
the probability that a prompt of that length gives it, at a place that is as likely as any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from indexing.corpus.stores.table import TokenTable
from training.data import Collator, Stream
from training.loop import Fetched
from training.models.generators.causal import CausalGenerator
from training.models.generators.copy_reader import CopyReader
from training.models.generators.fusion_in_decoder import FusionGenerator
from training.models.generators.generator import Generator


class LongContext:
    """Chooses the passages of prompts of at most `budget` tokens. Answers of `answer_tokens` count if they share the
    prompt's context."""

    def __init__(
        self, collator: Collator, budget: int, answer_tokens: int, setting: str = "retrieval.max_context_tokens"
    ) -> None:
        """`budget` 0 takes the generator's context. Raises ValueError, naming `setting`, if the generator has no
        context or a shorter one, or if no passage fits beside the longest question."""
        self.collator, self.answer_tokens = collator, answer_tokens
        self.passages: TokenTable = collator.passages_for_generator
        self.budget = budget or default_budget(collator.generator)
        check_budget(collator.generator, self.budget, setting)
        longest = int(collator.stored.tokens("generator").lengths.max(initial=0))
        room, each = self._room(longest)
        if room < each + int(self.passages.lengths.min()):
            raise ValueError(
                f"{setting}={self.budget}: a question of {longest} tokens and its answer leave room for "
                f"{max(room, 0)} tokens, in which no passage fits"
            )

    def choose(self, question: int, rng: np.random.Generator) -> np.ndarray:
        """Return the passage numbers of a question's prompt, int64: the longest beginning of a random order that
        fits."""
        room, each = self._room(self._tokens(question))
        shortest = each + int(self.passages.lengths.min())
        order = rng.choice(len(self.passages), size=min(len(self.passages), max(0, room) // shortest), replace=False)
        order = order[self.collator.store.is_living(order)]
        ends = np.cumsum(self.passages.lengths[order].astype(np.int64) + each)
        return order[: int(np.searchsorted(ends, room, side="right"))].astype(np.int64)

    def bury(
        self, question: int, gold: int, *, labelled: np.ndarray, depth: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Return a prompt, int64, with the passage `gold` at `depth` (0 first, 1 last) among random passages, none of
        them `labelled`. The passage `gold` is in it even if it does not fit."""
        room, each = self._room(self._tokens(question))
        others = self.choose(question, rng)
        others = others[~np.isin(others, labelled)]
        ends = np.cumsum(self.passages.lengths[others].astype(np.int64) + each)
        left = room - each - int(self.passages.lengths[gold])
        others = others[: int(np.searchsorted(ends, left, side="right"))]
        return np.insert(others, round(depth * len(others)), gold).astype(np.int64)

    def smallest(self, question: int, gold: int) -> int:
        """Return the tokens of the prompt that holds the question, the passage `gold` alone, and the answer."""
        room, each = self._room(self._tokens(question))
        return self.budget - room + each + int(self.passages.lengths[gold])

    def _tokens(self, question: int) -> int:
        return int(self.collator.stored.tokens("generator").lengths[question])

    def _room(self, question_tokens: int) -> tuple[int, int]:
        """Return the tokens left for passages, and the tokens that each passage takes beside its text."""
        match self.collator.generator:
            case CausalGenerator() as generator:
                around = len(generator.start) + sum(len(literal) for literal in generator.literals)
                used = around + question_tokens + self.answer_tokens + 1
                return self.budget - used, len(generator.after_passage)
            case FusionGenerator() as generator:  # every passage is read with the question
                special = len(generator.start) + len(generator.between) + len(generator.end)
                return self.budget, question_tokens + special
            case CopyReader():
                return self.budget, question_tokens + 3
        raise AssertionError(f"no long prompt for a {type(self.collator.generator).__name__}")


def default_budget(generator: Generator) -> int:
    """Return the context of a causal model. Raises ValueError for a generator that names none."""
    context = generator.context if isinstance(generator, CausalGenerator) else None
    if context is None:
        raise ValueError("retrieval.max_context_tokens=0: must be set, because this generator names no longest prompt")
    return context


def check_budget(generator: Generator, tokens: int, setting: str) -> None:
    """Raise ValueError if a causal model takes fewer than `tokens`."""
    context = generator.context if isinstance(generator, CausalGenerator) else None
    if context is not None and tokens > context:
        raise ValueError(f"{setting}={tokens}: must be at most {context}, the generator's context")


@dataclass(kw_only=True)
class LongContextBatches:
    """Questions with long prompts to train a generator on; the retriever sees nothing of them."""

    collator: Collator
    stream: Stream
    choose: Callable[[int, np.random.Generator], np.ndarray]  # passages of a question
    device: torch.device
    number: int = 0  # number of the next batch

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        questions, random = self.stream.batch(self.number), self.stream.random(self.number, purpose=3)
        passages = [self.choose(int(question), rng) for question, rng in zip(questions, random, strict=True)]
        self.number += 1
        batch = self.collator(questions, passages, for_retriever=False).to(self.device)
        return Fetched(batch=batch, num_questions=len(questions))

    def state(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"number": self.number}
