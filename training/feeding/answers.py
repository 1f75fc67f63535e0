"""Chooses the answers that questions train on, and the questions that are asked without the passages that answer
them."""

from collections.abc import Sequence

import numpy as np

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from training.data import Stream
from training.metrics import contains_answer

REFUSED, SAMPLED = 3, 4  # purposes of the random generators
MORE_FOR_REFUSALS = 8  # Number of hits searched beyond retrieval.k, in place of those that hold an answer


class TrainingAnswers:
    """The answers of a training batch. Every draw depends on the seed and the place in the stream alone."""

    def __init__(
        self,
        questions: QuestionStore,
        store: Store,
        *,
        stream: Stream,
        choice: str = "in_passage",
        refusal: np.ndarray | None = None,
        refusal_share: float = 0.0,
    ) -> None:
        """`choice` among several gold answers is first, sampled or in_passage. `refusal` is the token row of the answer
        to a share of the questions, which lose the passages that hold an answer."""
        self.questions, self.store, self.stream, self.choice = questions, store, stream, choice
        self.refusal, self.refusal_share = refusal, refusal_share

    def refused(self, number: int) -> np.ndarray:
        """Return which questions of batch `number` are asked without their answer; bool [batch]."""
        if self.refusal is None or not self.refusal_share:
            return np.zeros(self.stream.batch_size, dtype=bool)
        draws = [random.random() for random in self.stream.random(number, REFUSED)]
        return np.array(draws) < self.refusal_share

    def without_answer(self, question: int, passages: np.ndarray, k: int) -> np.ndarray:
        """Return the first k of `passages` that are neither labelled nor state an answer of the question."""
        gold, answers = set(self.questions.gold_rows(question).tolist()), self.questions.question(question).answers
        kept: list[int] = []
        for row in passages.tolist():
            if len(kept) < k and row not in gold:
                passage = self.store.passage(row)
                if not contains_answer(f"{passage.title} {passage.text}", answers):
                    kept.append(row)
        return np.array(kept, dtype=np.int64)

    def rows(self, number: int, questions: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the int32 token rows of the answers of batch `number`."""
        found: list[np.ndarray] = []
        draws = self.stream.random(number, SAMPLED)
        for question, refused, random in zip(questions, self.refused(number), draws, strict=True):
            if refused and self.refusal is not None:
                found.append(self.refusal)
                continue
            answers = self.questions.answer_tokens(int(question))
            match self.choice:
                case "first":
                    found.append(answers[0])
                case "sampled":
                    found.append(answers[int(random.integers(len(answers)))])
                case _:
                    found.append(answers[self.questions.target(int(question))])
        return found
