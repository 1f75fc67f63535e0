"""The micro-batches of a stage: questions with their hits, or spans cut from the corpus for a warm start."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from indexing.hits import Hits
from training.data import ClozeSource, Collator, Stream, gold_first
from training.feeding.answers import TrainingAnswers
from training.loop import Fetched, Source
from training.models.model_inputs import RetrievalBatch
from training.retrieving.hybrid import HybridSearch
from training.retrieving.retrieve import Prefetcher, Searched
from training.training_settings import RetrievalConfig

PAIRS = 13  # purpose of the random generator that draws the task of pairs

HIT_FIELDS = [entry.name for entry in fields(Hits)]  # in the order in which a checkpoint keeps them


class RetrievedBatches:
    """Questions with the passages that the index returned, searched ahead by the prefetcher."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        collator: Collator,
        *,
        config: RetrievalConfig,
        device: torch.device,
        stream: Stream,
        answers: TrainingAnswers | None = None,
        hybrid: HybridSearch | None = None,
    ) -> None:
        """`answers` None takes each question's target. `hybrid` knows the lexical scores of passages that are read
        without being hits; None if these scores have no weight."""
        self.hybrid = hybrid
        self.prefetcher, self.collator, self.config = prefetcher, collator, config
        self.device, self.stream, self.answers = device, stream, answers
        self._trained = prefetcher.position

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        searched = self.prefetcher.next()
        gold = [self.collator.questions.gold_rows(int(number)) for number in searched.questions]
        hits = searched.hits.ids
        if self.config.source == "gold":
            random = self.stream.random(searched.number, purpose=2)
            each = zip(hits, gold, random, strict=True)
            passages = [gold_first(row, rows, self.config.k, rng) for row, rows, rng in each]
        else:
            passages = [row[row >= 0] for row in hits[:, : self.config.k]]
        answers = None
        if self.answers is not None:
            answers = self.answers.rows(searched.number, searched.questions)
            for i in np.flatnonzero(self.answers.refused(searched.number)):
                passages[i] = self.answers.without_answer(int(searched.questions[i]), hits[i], self.config.k)
        known = searched.hits.vectors  # asked for only if the passages are the hits as they came
        if known is not None:  # fewer if passages were deleted since a checkpoint
            known = known[:, : max(1, max(len(row) for row in passages))]
        lexical = self._lexical(searched, passages)
        batch = self.collator(searched.questions, passages, answers=answers, vectors=known, lexical=lexical)
        batch = batch.to(self.device)
        found = [bool(np.isin(row, rows).any()) for row, rows in zip(passages, gold, strict=True)]
        self._trained = searched.number + 1
        return Fetched(
            batch=batch,
            num_questions=len(searched.questions),
            search_wait_s=searched.wait_s,
            generation=searched.hits.generation,
            weights_version=searched.hits.weights_version,
            gold_in_k=float(np.mean(found)),
            rescore_s=searched.rescore_s,
            rescore_overlap=searched.rescore_overlap,
            passages=np.concatenate(passages),
            hit_versions=None if searched.hits.versions is None else searched.hits.versions[:, : self.config.k],
        )

    def _lexical(self, searched: Searched, passages: list[np.ndarray]) -> np.ndarray | None:
        """Return the normalised lexical scores of the passages that are read."""
        hits = searched.hits
        if hits.lexical is None:
            return None
        if all(np.array_equal(row, ids[: len(row)]) for row, ids in zip(passages, hits.ids, strict=True)):
            return hits.lexical
        if self.hybrid is None:
            return None
        return self.hybrid.scores(searched.questions, passages, hits.corpus)

    def state(self) -> dict[str, Any]:
        """Return the number of the next batch, and the hits of those already searched."""
        ahead = [tuple(vars(hits).values()) for hits in self.prefetcher.state()]
        return {"number": self._trained, "ahead": ahead}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; the prefetcher must start at `state["number"]`."""
        self._trained = state["number"]
        self.prefetcher.restore([Hits(**dict(zip(HIT_FIELDS, values, strict=True))) for values in state["ahead"]])


@dataclass(kw_only=True)
class WithPairs:
    """Micro-batches of another source, each with a batch of pairs for the contrastive tasks of a mixture beside it."""

    source: Source
    pairs: dict[str, ClozeSource]
    shares: dict[str, float]  # Share of each contrastive task in the whole mixture; weights the draw of a task
    seed: int
    number: int = 0  # number of the next micro-batch

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        fetched, share = self.source.next(), sum(self.shares.values())
        random = np.random.default_rng([self.seed, PAIRS, self.number])
        task = str(random.choice(list(self.shares), p=[one / share for one in self.shares.values()]))
        batch = fetched.batch
        assert isinstance(batch, RetrievalBatch)
        pairs = self.pairs[task].batch(self.number).to(batch.question_ids.device)
        self.number += 1
        return replace(fetched, batch=replace(batch, contrast=pairs, contrast_share=share))

    def state(self) -> dict[str, Any]:
        """Return the state of the other source; both count the same micro-batches."""
        return self.source.state()


@dataclass(kw_only=True)
class ClosedBookBatches:
    """Questions without passages: the control, and a stage that needs no index."""

    collator: Collator
    batch_of: Callable[[int], np.ndarray]  # numbers of the questions of a batch
    device: torch.device
    number: int = 0  # number of the next batch
    answers: TrainingAnswers | None = None  # None: each question's target

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        questions = self.batch_of(self.number)
        answers = self.answers.rows(self.number, questions) if self.answers is not None else None
        self.number += 1
        passages = [np.empty(0, dtype=np.int64)] * len(questions)
        batch = self.collator(questions, passages, answers=answers).to(self.device)
        return Fetched(batch=batch, num_questions=len(questions))

    def state(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"number": self.number}


@dataclass
class ClozeBatches:
    """Spans and the passages that they were cut from."""

    source: ClozeSource
    device: torch.device
    number: int = 0  # number of the next batch

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        batch = self.source.batch(self.number).to(self.device)
        self.number += 1
        return Fetched(batch=batch, num_questions=len(batch.passage_numbers))

    def state(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"number": self.number}
