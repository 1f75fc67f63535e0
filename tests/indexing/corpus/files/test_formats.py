"""Formats of question rows: what is read from each, and file and line of every malformed one."""

import json
from pathlib import Path
from typing import Any

import pytest

from indexing.corpus.files.corpus import read_questions
from indexing.corpus.files.formats import Question
from indexing.indexing_settings import QuestionsConfig

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which town?"}
ASSISTANT = {"role": "assistant", "content": "Rome"}


def write(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> QuestionsConfig:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"queries-{split}.jsonl").write_text(lines, encoding="utf-8")
    return QuestionsConfig(path=str(folder))


def read(folder: Path, *rows: dict[str, Any]) -> list[Question]:
    return read_questions(write(folder, list(rows)), "test")


def test_multiple_choice(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"_id": "a", "text": "Which?", "options": ["red", "blue"], "answers": ["blue"]})
    assert (found.text, found.options, found.answers) == ("Which?", ["red", "blue"], ["blue"])


def test_fact_verification_with_the_default_and_with_own_labels(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"_id": "a", "claim": "Rome is a town.", "label": "SUPPORTS"})
    assert (found.text, found.answers) == ("Rome is a town.", ["SUPPORTS"])
    assert found.options == ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"]
    config = write(tmp_path, [{"_id": "a", "claim": "Rome is a town.", "label": "yes"}])
    config.labels = ["yes", "no"]
    assert read_questions(config, "test")[0].options == ["yes", "no"]


def test_chats(tmp_path: Path) -> None:
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    found = read(
        tmp_path,
        {"_id": "a", "messages": [USER, ASSISTANT], "answers": ["roma"]},
        {"_id": "b", "messages": [SYSTEM, *earlier, USER, ASSISTANT]},
        {"_id": "c", "messages": [SYSTEM, USER]},
    )
    assert [question.text for question in found] == ["Which town?"] * 3
    assert [question.answers for question in found] == [["Rome", "roma"], ["Rome"], []]
    assert [question.earlier for question in found] == [[], [SYSTEM, *earlier], [SYSTEM]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "w", "options": "red", "answers": ["red"]}, "options of 'x' are 'red': needed are texts in a list"),
        ({"text": "w", "options": ["red", 3]}, "options of 'x' are \"['red', 3]\": needed are texts"),
        ({"text": "w", "options": ["red", " "]}, "needed are texts in a list"),
        ({"text": "w", "options": ["red"], "answers": ["red"]}, "needed are two or more different ones"),
        ({"text": "w", "options": ["red", "red"], "answers": ["red"]}, "needed are two or more different ones"),
        ({"text": "w", "options": ["a", "b"], "answers": ["c"]}, "answer 'c' of 'x' is none of its options ['a', 'b']"),
        ({"claim": "w", "label": "MAYBE"}, "label of 'x' is 'MAYBE': questions.labels has SUPPORTS, REFUTES, NOT"),
        ({"claim": "w"}, "label is 'None': needed is a string"),
        ({"claim": " ", "label": "REFUTES"}, "empty_text: claim 'x' has no text"),
        ({"messages": "hello"}, "messages of 'x' are no list of objects"),
        ({"messages": ["hello"]}, "messages of 'x' are no list of objects"),
        ({"messages": []}, "messages of 'x' hold no message of the user"),
        ({"messages": [SYSTEM]}, "messages of 'x' hold no message of the user"),
        ({"messages": [USER, USER]}, "message 2 of 'x' is of the user: expected is the assistant"),
        ({"messages": [SYSTEM, ASSISTANT]}, "message 2 of 'x' is of the assistant: expected is the user"),
        ({"messages": [USER, SYSTEM]}, "message 2 of 'x' is of the system: expected is the assistant"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "message 1 of 'x' has role 'tool': allowed are",
        ),
        ({"messages": [{"role": "user"}]}, "content is 'None': needed is a string"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_text: message 1 of 'x' has no content"),
        ({"claim": "w", "label": "REFUTES", "metadata": 3}, "metadata is a int"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    good = {"_id": "good", "text": "Which?", "answers": ["x"]}
    with pytest.raises(ValueError) as caught:
        read(tmp_path, good, {"_id": "x", **row})
    assert f"queries-test.jsonl:2: {'' if expected.startswith('empty') else 'missing_field: '}" in str(caught.value)
    assert expected in str(caught.value)
    config = QuestionsConfig(path=str(tmp_path), on_bad="skip")
    assert [question.id for question in read_questions(config, "test")] == ["good"]
