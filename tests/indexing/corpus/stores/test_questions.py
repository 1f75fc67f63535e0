"""The question store: what was written comes back; targets; torn ones refused."""

from pathlib import Path

import pytest

from indexing.corpus.files.corpus import Passage, Question
from indexing.corpus.snapshot import TornSnapshot
from indexing.corpus.stores.passages import Store, write_store
from indexing.corpus.stores.questions import QuestionStore, write_questions
from tests.indexing.helpers import words_side

PASSAGES = [
    Passage("p0", "Ada", "Born in 2015 in Rome."),
    Passage("p1", "Version 1.0 (final)", "It was released on 6 March 2014."),
    Passage("p2", "", "Nothing."),
]
QUESTIONS = [
    Question(
        id="q0",
        text="when?",
        answers=["15", "2015"],
        relevant=["p0"],
        old_answers=["2014"],
        metadata={"timeline": [{"to": None}], "odd": "\ud83d"},
    ),
    Question(id="q1", text="released?", answers=["2014-03-06", "6 march 2014"], relevant=["p2", "p1"]),
    Question(id="q2", text="which?", answers=["nowhere", "to be found"], relevant=["p0", "gone"]),
    Question(id="q3", text="title?", answers=["x", "1.0 (Final)"], relevant=["p1"]),
    Question(id="q4", text="no answers", answers=[], relevant=["gone"]),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", PASSAGES, [])


def write(path: Path, store: Store) -> QuestionStore:
    return write_questions(
        path,
        QUESTIONS,
        sides=[words_side("retriever"), words_side("generator", 1)],
        answer_side=words_side("answer"),
        store=store,
    )


def test_round_trip(tmp_path: Path, store: Store) -> None:
    questions = write(tmp_path / "questions", store)
    questions = QuestionStore.open(questions.path)
    assert [questions.question(number) for number in range(len(questions))] == QUESTIONS
    assert [questions.gold_rows(number).tolist() for number in range(5)] == [[0], [2, 1], [0], [1], []]
    assert questions.num_without_gold == 1
    assert questions.corpus_fingerprint == store.fingerprint
    expected = words_side("retriever").tokenize([("", question.text) for question in QUESTIONS])
    assert [row.tolist() for row in questions.tokens("retriever").rows(range(5))] == expected
    assert questions.tokens("generator").lengths.tolist() == [1] * 5
    for number, question in enumerate(QUESTIONS):
        expected = words_side("answer").tokenize([("", answer) for answer in question.answers])
        assert [row.tolist() for row in questions.answer_tokens(number)] == expected


def test_target_is_the_first_answer_in_a_relevant_passage(tmp_path: Path, store: Store) -> None:
    """Whole words ("15" is not in "2015"), in whatever case, titles included; 0 when no answer is found."""
    questions = write(tmp_path / "questions", store)
    assert [questions.target(number) for number in range(5)] == [1, 1, 0, 1, 0]


def test_refusals(tmp_path: Path, store: Store) -> None:
    questions = write(tmp_path / "questions", store)
    with pytest.raises(ValueError, match=r"no side 'x', only \['generator', 'retriever'\]"):
        questions.tokens("x")
    for ask in (questions.question, questions.target, questions.gold_rows, questions.answer_tokens):
        for number in (-1, 5):
            with pytest.raises(IndexError, match="rows 0 to 4"):
                ask(number)
    with pytest.raises(ValueError, match="no questions"):
        write_questions(tmp_path / "none", [], sides=[], answer_side=words_side("answer"), store=store)
    with pytest.raises(ValueError, match="passage store, not a question store"):
        QuestionStore.open(store.path)
    with pytest.raises(ValueError, match="question store, not a passage store"):
        Store.open(questions.path)
    (questions.path / "targets").write_bytes(b"\0" * 40)
    with pytest.raises(TornSnapshot, match="targets"):
        QuestionStore.open(questions.path)
