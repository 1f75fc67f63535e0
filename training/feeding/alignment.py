"""The micro-batches of alignment: judged answers from a file, or answers that the system samples and a reward judges.

A stage of alignment differs from fine-tuning in its data, its objective and its reference. Its source is the ordinary
one (questions, hits searched ahead) with a collator that adds judged answers. If the objective needs them, samples
(`SampledBatches`) and the reference's scores (`ReferencedBatches`) are put around it. The loop knows none of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from training.data import Collator
from training.engine.engine import Engine
from training.feeding.reference import Reference
from training.feeding.rewards import load_reward, measure
from training.loop import Fetched, Source
from training.models.answer_candidates import answer_tensors
from training.models.generators.decode import restore_spelling
from training.models.generators.generator import Generator
from training.models.model_inputs import AskedBatch, CandidateBatch, RetrievalBatch, moved
from training.models.parts.modes import evaluating
from training.models.system import System
from training.objectives.check import samples_answers
from training.objectives.sampling import sample_log_probs
from training.training_settings import ObjectiveConfig

MISMATCH_TRIES = 20  # Number of draws until another question's answer is found


def make_collator(
    objective: ObjectiveConfig, store: Store, *, questions: QuestionStore, generator: Generator, pad_id: int, seed: int
) -> Collator:
    """Return the collator of the objective's data. Raises ValueError if the questions are not judged as it needs."""
    match objective.name:
        case "dpo":
            return PairCollator(store, questions, generator, pad_id)
        case "kto":
            return JudgedCollator(store, questions, generator=generator, pad_id=pad_id, seed=seed)
        case _ if samples_answers(objective):
            return AskedCollator(store, questions, generator, pad_id)
        case _:
            return Collator(store, questions, generator, pad_id)


class PairCollator(Collator):
    """Collates questions with two answers, the chosen one first."""

    def __call__(self, numbers: np.ndarray, passages: Sequence[np.ndarray], **options: Any) -> CandidateBatch:
        """Return a batch as `Collator` does; both answers get gradient."""
        options["with_answers"] = False
        base = super().__call__(numbers, passages, **options)
        groups = [self.questions.answer_tokens(int(number))[:2] for number in numbers]
        return with_candidates(base, self.generator, groups, num_trained=2)


class JudgedCollator(Collator):
    """Collates questions with one judged answer and, for KTO's z, the answer of another question. The other question
    depends on the question and the seed alone, not on the process that computes it."""

    def __init__(self, store: Store, questions: QuestionStore, *, generator: Generator, pad_id: int, seed: int) -> None:
        super().__init__(store, questions, generator, pad_id)
        if questions.labels is None:
            raise ValueError(f"{questions.path} holds no judged answers: objective.name=kto needs preferences")
        self.labels, self.seed = questions.labels, seed

    def __call__(self, numbers: np.ndarray, passages: Sequence[np.ndarray], **options: Any) -> CandidateBatch:
        """Return a batch as `Collator` does; the judged answer gets gradient."""
        options["with_answers"] = False
        base = super().__call__(numbers, passages, **options)
        groups = [[self._answer(int(n)), self._answer(self._other(int(n)))] for n in numbers]
        batch = with_candidates(base, self.generator, groups, num_trained=1)
        return replace(batch, desirable=torch.from_numpy(self.labels[numbers] == 1))

    def _answer(self, number: int) -> np.ndarray:
        return self.questions.answer_tokens(number)[0]

    def _other(self, number: int) -> int:
        """Return an item with another prompt; the item itself if none is found."""
        prompts = self.questions.tokens("retriever")
        mine = prompts.rows([number])[0]
        random = np.random.default_rng([self.seed, 3, number])
        for other in random.integers(0, len(self.stored), MISMATCH_TRIES):
            if not np.array_equal(prompts.rows([int(other)])[0], mine):
                return int(other)
        return number


class AskedCollator(Collator):
    """Collates questions to be answered by samples, with the numbers of the questions and of their passages."""

    def __call__(self, numbers: np.ndarray, passages: Sequence[np.ndarray], **options: Any) -> AskedBatch:
        """Return a batch as `Collator` does, without answers."""
        options["with_answers"] = False
        base = super().__call__(numbers, passages, **options)
        return AskedBatch(**_fields(base), questions=np.asarray(numbers), passages=[*passages])


class SampledBatches:
    """Batches of an `AskedCollator`, answered by the system as it is now and judged by a reward.

    For each question, `group_size` passages are drawn from p(z|q), with replacement, and an answer from P(y|q, z) for
    each. One batch of samples serves `updates_per_sample` micro-batches. Sampling is collective under ZeRO 3.
    """

    def __init__(
        self,
        source: Source,
        engine: Engine,
        *,
        collator: Collator,
        store: Store,
        to_text: Callable[[Sequence[int]], str],
        max_tokens: int,
        objective: ObjectiveConfig,
        updates_per_sample: int,
    ) -> None:
        """Raises ValueError for a reward that cannot be loaded."""
        self.source, self.engine, self.collator, self.store = source, engine, collator, store
        self.to_text, self.max_tokens, self.objective = to_text, max_tokens, objective
        self.updates_per_sample = updates_per_sample
        self.reward = load_reward(objective.reward)
        self._kept: Fetched | None = None
        self._uses = 0

    def next(self) -> Fetched:
        """Return the next micro-batch on the device: new samples, or those of the last one again."""
        if self._kept is not None and self._uses < self.updates_per_sample:
            self._uses += 1
            return replace(self._kept, search_wait_s=0.0, rescore_s=0.0, passages=None)
        fetched = self.source.next()
        assert isinstance(fetched.batch, AskedBatch)
        with torch.no_grad(), evaluating(self.engine.module):
            batch = self._sample(fetched.batch).to(self.engine.device)
            if self.updates_per_sample > 1:
                outputs = self.engine(System.candidates, batch)
                batch = replace(batch, old_log_probs=sample_log_probs(outputs, self.objective.temperature)[0])
        fetched = replace(fetched, batch=batch)
        self._kept, self._uses = fetched, 1
        return fetched

    def state(self) -> dict[str, Any]:
        """Return the state of the source, and the samples that will be used again."""
        state = self.source.state()
        if self._kept is not None and self._uses < self.updates_per_sample:
            state["samples"] = (replace(self._kept, batch=moved(self._kept.batch, "cpu")), self._uses)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over samples that `state()` of another object kept; the source below is restored by itself."""
        if "samples" in state:
            kept, self._uses = state["samples"]
            if "reader" in vars(kept.batch):  # as earlier versions called it
                kept.batch.generator_batch = vars(kept.batch).pop("reader")
            self._kept = replace(kept, batch=moved(kept.batch, self.engine.device))

    def _sample(self, asked: AskedBatch) -> CandidateBatch:
        group, config = self.objective.group_size, self.objective
        prior: Tensor = self.engine(System.prior, asked, config.temperature)
        drawn = torch.multinomial(prior.exp(), group, replacement=True).cpu()  # [batch, group]
        read = [self._passage(asked, b, int(z)) for b, row in enumerate(drawn) for z in row]
        questions = np.repeat(asked.questions, group)
        question_rows = self.collator.questions_for_generator.rows(questions)
        rows = [[self._tokens(passage)] for passage in read]
        inputs = self.collator.generator.collate(question_rows, rows, None).to(self.engine.device)
        written = self.engine(System.sample, inputs, self.max_tokens, config.sampling_temperature)
        answers = [np.array(tokens, dtype=np.int64) for tokens in written.tokens]
        rewards = [self._judge(*sample) for sample in zip(questions, read, written.tokens, strict=True)]
        inputs = self.collator.generator.collate(question_rows, rows, answers)
        # The end token of an answer that was cut for length was not drawn, so it is no part of the sample.
        cut = torch.tensor([len(answer) >= self.max_tokens for answer in answers])
        last = inputs.answer_mask & (inputs.answer_mask.cumsum(1) == inputs.answer_mask.sum(1, keepdim=True))
        inputs = replace(inputs, answer_mask=inputs.answer_mask & ~(last & cut[:, None]))
        values: dict[str, Any] = _fields(asked) | {"generator_batch": inputs}
        return CandidateBatch(
            **{entry.name: values[entry.name] for entry in fields(RetrievalBatch)},
            passage_mask=asked.generator_batch.passage_mask,
            answer_ids=inputs.answer_ids.unflatten(0, (-1, group)),
            answer_mask=inputs.answer_mask.unflatten(0, (-1, group)),
            num_trained=group,
            drawn=drawn,
            rewards=torch.tensor(rewards, dtype=torch.float32).unflatten(0, (-1, group)),
        )

    def _passage(self, asked: AskedBatch, question: int, place: int) -> int:
        """Return the number of a passage; -1 for the empty one of a closed book."""
        passages = asked.passages[question]
        return int(passages[place]) if place < len(passages) else -1

    def _tokens(self, passage: int) -> np.ndarray:
        if passage < 0:
            return np.empty(0, dtype=np.int32)
        return self.collator.passages_for_generator.rows([passage])[0]

    def _judge(self, number: int, passage: int, tokens: Sequence[int]) -> float:
        question = self.collator.stored.question(int(number))
        read = [] if passage < 0 else [self.store.passage(passage)]
        passages = [f"{passage.title} {passage.text}" for passage in read]
        answer = restore_spelling(self.to_text(tokens), passages)
        return measure(
            self.objective.reward,
            self.reward,
            question=question.text,
            answer=answer,
            golds=question.answers,
            passages=passages,
        )


@dataclass
class ReferencedBatches:
    """Batches with the scores and log-probabilities of the reference."""

    source: Source
    reference: Reference

    def next(self) -> Fetched:
        """Return the next micro-batch on the device."""
        fetched = self.source.next()
        assert isinstance(fetched.batch, CandidateBatch)
        return replace(fetched, batch=self.reference(fetched.batch))

    def state(self) -> dict[str, Any]:
        """Return the state of the source."""
        return self.source.state()


def with_candidates(
    batch: RetrievalBatch, generator: Generator, groups: Sequence[Sequence[np.ndarray]], num_trained: int
) -> CandidateBatch:
    """Return a batch without answers together with the token rows of its answers [batch][group]."""
    ids, mask = answer_tensors(generator, groups)
    return CandidateBatch(
        **_fields(batch),
        passage_mask=batch.generator_batch.passage_mask,
        answer_ids=ids,
        answer_mask=mask,
        num_trained=num_trained,
    )


def _fields(batch: RetrievalBatch) -> dict[str, Any]:
    return {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
