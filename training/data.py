"""Makes batches as pure functions of (seed, number of the batch): one number is a loader's position, so a resume is
exact.

Questions come in an endless stream of shuffled passes. The global batch `n` is the stream's slice `[n * batch_size *
world_size, (n + 1) * batch_size * world_size)`. Each trainer takes its part of the slice, so that the number of
trainers changes who computes, never the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from training.engine.engine import Engine
from training.models.generators.generator import Generator
from training.models.model_inputs import ContrastBatch, RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.system import System
from training.models.text.packing import pad_rows
from training.models.text.pairs import PairBatch, Pairing
from training.training_settings import ObjectiveConfig


def stream_slice(num_items: int, start: int, stop: int, seed: int) -> np.ndarray:
    """Return items `[start, stop)` of the endless stream of seeded permutations of `range(num_items)`; int64."""
    parts = []
    while start < stop:
        number, offset = divmod(start, num_items)
        taken = min(stop - start, num_items - offset)
        parts.append(np.random.default_rng([seed, number]).permutation(num_items)[offset : offset + taken])
        start += taken
    return np.concatenate(parts)


def sampled_numbers(total: int, limit: int, seed: int) -> np.ndarray:
    """Return the numbers of a fixed sample of `limit` out of `total` items, rising; all of them for a limit of 0."""
    if not 0 < limit < total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit])


class Stream:
    """This trainer's part of the endless stream."""

    def __init__(self, num_items: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if num_items < 1:
            raise ValueError("questions.train: the split has no question left to train on")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def batch(self, number: int) -> np.ndarray:
        """Return the items of batch `number` [batch_size]."""
        start = self.start(number)
        return stream_slice(self.num_items, start, start + self.batch_size, self.seed)

    def places(self, number: int) -> np.ndarray:
        """Return the places in the endless stream of the items of batch `number`; int64 [batch_size]."""
        return np.arange(self.start(number), self.start(number) + self.batch_size, dtype=np.int64)

    def start(self, number: int) -> int:
        """Return the place in the endless stream of the first item of batch `number`."""
        return (number * self.world_size + self.rank) * self.batch_size

    def random(self, number: int, purpose: int) -> Iterator[np.random.Generator]:
        """Return one generator for each item of batch `number`, the same whoever computes it."""
        start = self.start(number)
        return (np.random.default_rng([self.seed, purpose, start + i]) for i in range(self.batch_size))


class TokenRows(Protocol):
    """Token rows by number."""

    def rows(self, row_numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the int32 token rows of `row_numbers`, in that order."""
        ...


class Questions(Protocol):
    """The questions that batches are made of: a question store, or examples cut from the corpus."""

    def tokens(self, side: str) -> TokenRows:
        """Return the token rows of the question text, by question number."""
        ...

    def answer_tokens(self, number: int) -> list[np.ndarray]:
        """Return the int32 token rows of a question's answers."""
        ...

    def text(self, number: int) -> str:
        """Return the text of the question, for a lexical search."""
        ...

    def target(self, number: int) -> int:
        """Return the number of the answer whose likelihood is measured."""
        ...

    def gold_rows(self, number: int) -> np.ndarray:
        """Return the numbers of the passages that state the answer; int64 [any]."""
        ...


class Collator:
    """Makes the tensors of a batch from stored token rows of questions and passages."""

    def __init__(self, store: Store, questions: Questions, generator: Generator, pad_id: int) -> None:
        self.store, self.questions, self.generator, self.pad_id = store, questions, generator, pad_id
        self.pairing: Pairing | None = None  # set if a re-ranker reads question and passage together
        self.passages_for_retriever = store.tokens("retriever")
        self.passages_for_generator = store.tokens("generator")
        self.questions_for_retriever = questions.tokens("retriever")
        self.questions_for_generator = questions.tokens("generator")

    def question_tensors(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the retriever's ids and mask of questions."""
        return pad_rows(self.questions_for_retriever.rows(numbers), self.pad_id)

    def __call__(
        self,
        numbers: np.ndarray,
        passages: Sequence[np.ndarray],
        *,
        with_answers: bool = True,
        for_retriever: bool = True,
        vectors: np.ndarray | None = None,
        answers: Sequence[np.ndarray] | None = None,
        lexical: np.ndarray | None = None,
    ) -> RetrievalBatch:
        """Return the batch of questions `numbers` with `passages[i]` for question `numbers[i]`. Shorter lists are
        padded; an empty one is closed book (the generator sees one empty passage).

        `for_retriever` is False for long prompts, whose many passages nobody scores; the retriever gets one blank token
        for each. `vectors` [batch, k, dim] are those of the passages, k for each question, which then are not encoded
        again. `answers` are token rows, None for each question's target. `lexical` [batch, k or more] are normalised
        lexical scores of the passages; None: 0.
        """
        k = max(1, max(len(row) for row in passages))
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in passages])
        rows = iter(self.passages_for_retriever.rows(flat) if for_retriever and vectors is None else ())
        for_generator = iter(self.passages_for_generator.rows(flat))
        blank = np.array([self.pad_id], dtype=np.int32)
        retriever_rows: list[np.ndarray] = []
        generator_rows: list[list[np.ndarray]] = []
        for row in passages:
            if vectors is None:
                retriever_rows += [next(rows) for _ in row] if for_retriever else [blank] * len(row)
                retriever_rows += [blank] * (k - len(row))
            generator_rows.append([next(for_generator) for _ in row] or [np.empty(0, dtype=np.int32)])
        if answers is None and with_answers:
            answers = [self.target(int(number)) for number in numbers]
        generator_batch = self.generator.collate(self.questions_for_generator.rows(numbers), generator_rows, answers)
        known = None if vectors is None else torch.from_numpy(vectors[:, :k])
        shares = np.zeros((len(numbers), k), np.float32) if lexical is None else lexical[:, :k]
        return RetrievalBatch(
            *self.question_tensors(numbers),
            *pad_rows(retriever_rows, self.pad_id),
            generator_batch,
            passage_vectors=known,
            lexical=torch.from_numpy(np.ascontiguousarray(shares)),
            pairs=self._pairs(numbers, passages if for_retriever else [()] * len(numbers), k),
        )

    def _pairs(self, numbers: np.ndarray, passages: Sequence[Sequence[int] | np.ndarray], k: int) -> PairBatch | None:
        """Return the pairs that a re-ranker reads."""
        if self.pairing is None:
            return None
        table = self.store.tokens(self.pairing.side)
        rows = self.questions.tokens(self.pairing.side).rows(numbers)
        return self.pairing(rows, [table.rows(some) for some in passages], k)

    @property
    def stored(self) -> QuestionStore:
        """The questions as a store, which they are unless they are cut from the corpus."""
        assert isinstance(self.questions, QuestionStore)
        return self.questions

    def target(self, number: int) -> np.ndarray:
        """Return the tokens of the gold answer whose likelihood is measured; none without an answer."""
        answers = self.questions.answer_tokens(number)
        return answers[self.questions.target(number)] if answers else np.empty(0, dtype=np.int32)


def gold_first(hits: np.ndarray, gold: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return one labelled passage and the k - 1 best retrieved others, in random order: a warm-up of the generator with
    hard negatives."""
    if not len(gold):
        return hits[:k]
    others = hits[~np.isin(hits, gold)][: k - 1]
    return rng.permutation(np.append(others, rng.choice(gold)))


class ClozeSource:
    """Batches of the retriever's warm start, cut from the corpus itself; nothing is materialised.

    inverse_cloze: a span of a passage (or its title) is the query, the passage without the span the positive (Lee et
    al. 2019). independent_cropping: two spans of one passage (Izacard et al. 2022).
    """

    def __init__(
        self,
        store: Store,
        stream: Stream,
        *,
        config: ObjectiveConfig,
        separator_id: int,
        pad_id: int,
        passages: np.ndarray | None = None,
    ) -> None:
        """`passages` are the numbers of those that `stream` counts; None: all."""
        self.store, self.tokens, self.passages = store, store.tokens("retriever"), passages
        self.stream, self.config = stream, config
        self.separator_id, self.pad_id = separator_id, pad_id

    def batch(self, number: int) -> ContrastBatch:
        """Return batch `number` of this trainer."""
        numbers = self.stream.batch(number)
        if self.passages is not None:
            numbers = self.passages[numbers]
        numbers = self._living(numbers)
        cut = self._crop if self.config.name == "independent_cropping" else self._cloze
        random = self.stream.random(number, purpose=1)
        pairs = [cut(row, rng) for row, rng in zip(self.tokens.rows(numbers), random, strict=True)]
        queries, passages = [query for query, _ in pairs], [passage for _, passage in pairs]
        return ContrastBatch(
            *pad_rows(queries, self.pad_id),
            *pad_rows(passages, self.pad_id),
            torch.from_numpy(numbers.astype(np.int64)),
        )

    def _living(self, numbers: np.ndarray) -> np.ndarray:
        """Return `numbers`, with another passage in place of each that was deleted from the corpus."""
        gone = ~self.store.is_living(numbers)
        if not gone.any():
            return numbers
        every = np.arange(len(self.tokens)) if self.passages is None else self.passages
        living = every[self.store.is_living(every)]
        return np.where(gone, living[numbers % len(living)], numbers)

    def _body(self, row: np.ndarray) -> tuple[int, int]:
        """Return the place of the text in `[CLS] title [SEP] text [SEP]`, or in `[CLS] title text [SEP]`."""
        separators = np.flatnonzero(row[:-1] == self.separator_id)
        return (int(separators[0]) + 1 if len(separators) else 1), len(row) - 1

    def _span(self, start: int, stop: int, rng: np.random.Generator) -> tuple[int, int]:
        length = min(int(rng.integers(self.config.min_span, self.config.max_span + 1)), max(1, stop - start))
        first = int(rng.integers(start, max(start, stop - length) + 1))
        return first, min(stop, first + length)

    def _query(self, row: np.ndarray, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
        inner = row[first:last]
        kept = inner[rng.random(len(inner)) >= self.config.drop_probability]
        return np.concatenate([row[:1], kept if len(kept) else inner, row[-1:]])

    def _cloze(self, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self._body(row)
        if start > 2 and rng.random() < self.config.title_probability:
            return self._query(row, 1, start - 1, rng), row
        first, last = self._span(start, stop, rng)
        keep = rng.random() < self.config.keep_probability or last - first >= stop - start
        return self._query(row, first, last, rng), row if keep else np.concatenate([row[:first], row[last:]])

    def _crop(self, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self._body(row)
        query = self._query(row, *self._span(start, stop, rng), rng)
        return query, self._query(row, *self._span(start, stop, rng), rng)


def encode_questions(engine: Engine, collator: Collator, numbers: np.ndarray) -> np.ndarray:
    """Return float32 vectors [batch, dim] of questions, by the query encoder as it is now, without dropout."""
    ids, mask = collator.question_tensors(numbers)
    with torch.no_grad(), evaluating(engine.module):
        vectors = engine(System.encode_questions, ids.to(engine.device), mask.to(engine.device))
    return vectors.float().cpu().numpy()
