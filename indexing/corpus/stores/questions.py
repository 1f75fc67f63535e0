"""Stores questions as a write-once directory: text, token rows, answers and the passages that state them.

`questions.*` holds one JSON object per question, `tokens-SIDE.*` the token rows of its text, `answers.*` the token rows
of all answers, `answer_starts` the place of each question's first one; `options.*` and `option_starts` hold the options
likewise, `gold.*` passage numbers, `targets` the answer to train on; `labels`, of judged answers only, 1 for a
desirable answer and 0 for an undesirable one.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.files.corpus import Question
from indexing.corpus.snapshot import write_file, write_once
from indexing.corpus.stores.passages import BATCH_PASSAGES, Store, TokenSide, batched, open_extra, tokenize
from indexing.corpus.stores.table import Ragged, RaggedWriter, TokenTable, check_rows, map_array

KIND = "question store"

# Returns (context, text) of a question for the side of this name; the context is the part of a prompt before the text.
Render = Callable[[str, Question], tuple[str, str]]


class QuestionStore:
    """The questions by number 0..n-1, in the order in which they were written."""

    def __init__(self, path: Path, extra: dict[str, Any], corpus: Store | None = None) -> None:
        self.path, self.corpus = path, corpus
        # fingerprint of the store that the passage numbers belong to
        self.corpus_fingerprint: str = extra["corpus_fingerprint"]
        self.num_without_gold: int = extra["num_without_gold"]  # Number of questions without a passage in the store
        # Number of questions without an answer and without a refusal to train on
        self.num_without_answer: int = extra["num_without_answer"]
        self.num_with_options: int = extra["num_with_options"]
        self.max_options: int = extra["max_options"]
        self.side_fingerprints: dict[str, str] = extra["sides"]
        self.answer_fingerprint: str = extra["answer_side"]
        self._questions = Ragged(path, "questions", "uint8")
        self._tokens = {name: TokenTable(path, f"tokens-{name}") for name in self.side_fingerprints}
        self._answers = TokenTable(path, "answers")
        self._answer_starts = map_array(path / "answer_starts", "int64")
        self._options = TokenTable(path, "options")
        self._option_starts = map_array(path / "option_starts", "int64")
        self._gold = Ragged(path, "gold", "int64")
        self._targets = map_array(path / "targets", "int64")
        labelled = extra.get("labelled", False)
        self.labels: np.ndarray | None = map_array(path / "labels", "int64") if labelled else None  # int64 [questions]

    @staticmethod
    def open(path: str | Path, verify: bool = True, corpus: Store | None = None) -> "QuestionStore":
        """Open a question store; see `Store.open`. `corpus` maps passages to their present numbers if the corpus
        changes."""
        return QuestionStore(Path(path), open_extra(path, KIND, verify), corpus)

    def __len__(self) -> int:
        return len(self._questions)

    def question(self, number: int) -> Question:
        """Return the question as it was read. Raises IndexError."""
        return Question(**json.loads(self._questions.text(number)))

    def text(self, number: int) -> str:
        """Return the text of the question. Raises IndexError."""
        return self.question(number).text

    def tokens(self, side: str) -> TokenTable:
        """Return the token rows of the question text by question number. Raises ValueError that names the sides."""
        if side not in self._tokens:
            raise ValueError(f"questions {self.path} have no side {side!r}, only {sorted(self._tokens)}")
        return self._tokens[side]

    def answer_tokens(self, number: int) -> list[np.ndarray]:
        """Return int32 token rows of the answers, in the order of `Question.answers`; for a question without answers
        those of the refusal, if refusals are trained."""
        check_rows(number, number, len(self))
        return self._answers.rows(np.arange(self._answer_starts[number], self._answer_starts[number + 1]))

    def option_tokens(self, number: int) -> list[np.ndarray]:
        """Return int32 token rows of the options, in the order of `Question.options`."""
        check_rows(number, number, len(self))
        return self._options.rows(np.arange(self._option_starts[number], self._option_starts[number + 1]))

    def gold_rows(self, number: int) -> np.ndarray:
        """Return int64 [any]: the present numbers of the relevant passages that are in the store."""
        rows = np.array(self._gold.row(number))
        return rows if self.corpus is None else self.corpus.current(rows)

    def target(self, number: int) -> int:
        """Return the answer to train on: the first whose text is in a relevant passage, otherwise 0."""
        check_rows(number, number, len(self))
        return int(self._targets[number])


def write_questions(
    path: str | Path,
    questions: Sequence[Question],
    *,
    sides: Sequence[TokenSide],
    answer_side: TokenSide,
    store: Store,
    render: Render = lambda _, question: ("", question.text),
    refusal: str = "",
    labels: Sequence[int] | None = None,
) -> QuestionStore:
    """Write `questions` for the passages of `store` as a new question store, and open it.

    `sides` tokenise the text that `render` makes of a question, `answer_side` each answer and option. `refusal` is the
    answer of questions without answers; `labels` holds one label per question if answers were judged. Raises
    FileExistsError, and ValueError for no questions.
    """
    if not questions:
        raise ValueError(f"there are no questions to write to {path}")
    gold = [[row for row in map(store.row_of, question.relevant) if row is not None] for question in questions]
    stated = [question.answers or ([refusal] if refusal else []) for question in questions]
    seal = {
        "kind": KIND,
        "corpus_fingerprint": store.fingerprint,
        "num_without_gold": sum(not rows for rows in gold),
        "num_without_answer": sum(not answers for answers in stated),
        "num_with_options": sum(bool(question.options) for question in questions),
        "max_options": max(len(question.options) for question in questions),
        "sides": {side.name: side.fingerprint for side in sides},
        "answer_side": answer_side.fingerprint,
        "labelled": labels is not None,
    }
    with write_once(path, seal) as directory:
        with RaggedWriter(directory, "questions", "uint8") as writer:
            for batch in batched(questions, BATCH_PASSAGES):
                writer.append([json.dumps(vars(question)).encode() for question in batch])
        with ExitStack() as stack:
            tables = [stack.enter_context(RaggedWriter(directory, f"tokens-{side.name}", "int32")) for side in sides]
            for batch in batched(questions, BATCH_PASSAGES):
                for side, table in zip(sides, tables, strict=True):
                    table.append(tokenize(side, [render(side.name, question) for question in batch]))
        for name, texts in (("answer", stated), ("option", [question.options for question in questions])):
            with RaggedWriter(directory, f"{name}s", "int32") as writer:
                for batch in batched((text for some in texts for text in some), BATCH_PASSAGES):
                    writer.append(tokenize(answer_side, [("", text) for text in batch]))
            starts = np.cumsum([0, *(len(some) for some in texts)], dtype=np.int64)
            write_file(directory / f"{name}_starts", [starts])
        with RaggedWriter(directory, "gold", "int64") as writer:
            writer.append([np.array(rows, np.int64) for rows in gold])
        targets = [_target(question, rows, store) for question, rows in zip(questions, gold, strict=True)]
        write_file(directory / "targets", [np.array(targets, np.int64)])
        if labels is not None:
            write_file(directory / "labels", [np.array(labels, np.int64)])
    return QuestionStore.open(path, verify=False)


def _target(question: Question, gold: Sequence[int], store: Store) -> int:
    """Return the first answer that is in a relevant passage, as whole words in any case; 0 if none is."""
    passages = [store.passage(row) for row in gold]
    text = "\n".join(f"{passage.title}\n{passage.text}" for passage in passages).casefold()
    for number, answer in enumerate(question.answers):
        wanted = answer.strip().casefold()
        if wanted and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text):
            return number
    return 0
