"""Parses the rows of a question file. One field tells the format of a row; a bad row raises `BadLine`.

    {"_id", "text", "answers": [...]}                              question answering, several gold answers
    {"_id", "text", "options": [...], "answers": [...]}            multiple choice: the answers are among the options
    {"_id", "claim", "label"}                                      fact verification: one of `questions.labels`
    {"_id", "messages": [{"role", "content"}, ...]}                chat: system (optional), user, assistant, user...

A chat is asked with its last user message; the assistant's message after it is the answer. All rows may have
`metadata`, chats also further `answers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from indexing.corpus.files.lines import BadLine, id_field, strings, text_field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answers and the passages that state them."""

    id: str
    text: str
    answers: list[str]
    relevant: list[str] = field(default_factory=list)  # ids of the passages that state the answer
    old_answers: list[str] = field(default_factory=list)  # answers that were true just before `answers` became true
    metadata: dict[str, Any] = field(default_factory=dict)  # the object in the file
    options: list[str] = field(default_factory=list)  # all answers that are allowed; empty: any
    earlier: list[dict[str, str]] = field(default_factory=list)  # role and content of the earlier messages of a chat


def parse_question(fields: dict[str, Any], as_of: str, labels: Sequence[str]) -> Question:
    """Return the question of one row, without its relevant passages. Raises BadLine."""
    question_id, metadata = id_field(fields), fields.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadLine("missing_field", f"metadata is a {type(metadata).__name__}, not an object")
    if "messages" in fields:
        return _chat(question_id, fields, metadata)
    if "claim" in fields:
        return _claim(question_id, fields, metadata, labels)
    text = text_field(fields, "text")
    if not text.strip():
        raise BadLine("empty_text", f"question {question_id!r} has no text")
    if as_of:
        answers, old_answers = _answers_at(metadata.get("timeline"), as_of)
    else:
        answers, old_answers = strings(fields.get("answers", [])), []
    options = _options(question_id, fields["options"], answers) if fields.get("options") is not None else []
    return Question(
        id=question_id,
        text=text,
        answers=answers,
        relevant=[],
        old_answers=old_answers,
        metadata=metadata,
        options=options,
    )


def _options(question_id: str, value: Any, answers: list[str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(option, str) and option.strip() for option in value):
        raise BadLine(
            "missing_field", f"options of {question_id!r} are {str(value)[:40]!r}: needed are texts in a list"
        )
    options = strings(value)
    if len(options) < 2 or len(set(options)) < len(options):
        raise BadLine(
            "missing_field", f"options of {question_id!r} are {options}: needed are two or more different ones"
        )
    for answer in answers:
        if answer not in options:
            raise BadLine(
                "missing_field", f"answer {answer[:40]!r} of {question_id!r} is none of its options {options}"
            )
    return options


def _claim(question_id: str, fields: dict[str, Any], metadata: dict[str, Any], labels: Sequence[str]) -> Question:
    claim, label = text_field(fields, "claim"), text_field(fields, "label")
    if not claim.strip():
        raise BadLine("empty_text", f"claim {question_id!r} has no text")
    if label not in labels:
        allowed = ", ".join(labels)
        raise BadLine("missing_field", f"label of {question_id!r} is {label[:40]!r}: questions.labels has {allowed}")
    return Question(
        id=question_id,
        text=claim,
        answers=[label],
        relevant=[],
        old_answers=[],
        metadata=metadata,
        options=list(labels),
    )


def _chat(question_id: str, fields: dict[str, Any], metadata: dict[str, Any]) -> Question:
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadLine("missing_field", f"messages of {question_id!r} are no list of objects with role and content")
    turns: list[dict[str, str]] = []
    for place, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            raise BadLine(
                "missing_field", f"message {place} of {question_id!r} has role {role!r}: allowed are {allowed}"
            )
        content = text_field(message, "content")
        if not content.strip():
            raise BadLine("empty_text", f"message {place} of {question_id!r} has no content")
        turns.append({"role": role, "content": content})
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    expected = ["user", "assistant"] * len(spoken)
    for place, (turn, role) in enumerate(zip(spoken, expected, strict=False), 1 + len(turns) - len(spoken)):
        if turn["role"] != role:
            found = turn["role"]
            raise BadLine(
                "missing_field", f"message {place} of {question_id!r} is of the {found}: expected is the {role}"
            )
    if not spoken:
        raise BadLine("missing_field", f"messages of {question_id!r} hold no message of the user")
    answers = strings(fields.get("answers", []))
    if spoken[-1]["role"] == "assistant":
        answers = [turns.pop()["content"], *answers]
    return Question(
        id=question_id,
        text=turns[-1]["content"],
        answers=answers,
        relevant=[],
        old_answers=[],
        metadata=metadata,
        options=[],
        earlier=turns[:-1],
    )


def _answers_at(timeline: Any, as_of: str) -> tuple[list[str], list[str]]:
    """Return the answers of the entry that covers `as_of` and of the entry before it; two empty lists if none covers
    it."""
    try:
        entries = [(entry["from"], entry["to"], strings(entry["answers"])) for entry in timeline]
        well_formed = all(isinstance(start, str) and isinstance(stop, str | None) for start, stop, _ in entries)
    except (TypeError, KeyError, IndexError):
        entries, well_formed = [], False
    if not well_formed:
        raise BadLine("missing_field", "metadata.timeline is no list of {from, to, answers}")
    for position, (start, stop, answers) in enumerate(entries):
        if stop is None if as_of == "end" else start <= as_of and (stop is None or as_of < stop):
            return answers, entries[position - 1][2] if position else []
    return [], []
