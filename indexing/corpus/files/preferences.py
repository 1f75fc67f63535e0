"""Reads preferences from a file and validates each line, as `indexing/corpus/files/corpus.py` does for passages.

A pair becomes a question with two answers, the chosen one first; a judged answer becomes a question with one answer and
a label. Both are then written like questions (`indexing/corpus/stores/questions.py`). A file of pairs can be read as
judged answers: each pair gives two of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.files.corpus import CorpusReport, Question
from indexing.corpus.files.lines import BadLine, find_file, id_field, read_lines, text_field
from indexing.declare import check_values, looked_at, refuse
from indexing.indexing_settings import PreferencesConfig

FILE = "preferences.jsonl"
SAMPLE_SEED = 0  # seed of the sample of `preferences.max_pairs`

log = logging.getLogger(__name__)


@dataclass
class Preferences:
    """The preferences of one split."""

    questions: list[Question]
    labels: list[int] | None  # 1 desirable, 0 undesirable; None for pairs: answers[0] is chosen and answers[1] rejected
    report: CorpusReport = field(default_factory=CorpusReport)
    num_too_unequal: int = 0  # Number of pairs left out by `max_length_ratio`


def preferences_path(config: PreferencesConfig) -> Path:
    """Return the file of preferences. Raises ValueError if there is none."""
    if not config.path:
        raise refuse("preferences.path", "", f"must be a .jsonl[.gz] file or a folder with {FILE}[.gz]")
    path = Path(config.path)
    found = find_file(path, FILE) if path.is_dir() else path
    if found is None or not found.is_file():
        allowed = f"must be a .jsonl[.gz] file or a folder with {FILE}[.gz]{looked_at(config.path)}"
        raise refuse("preferences.path", config.path, allowed)
    if not found.name.endswith((".jsonl", ".jsonl.gz")):
        raise refuse("preferences.path", config.path, "must end in .jsonl or .jsonl.gz")
    return found


def is_paired(config: PreferencesConfig) -> bool:
    """Return True if the file holds pairs. If the format is auto, its first good line decides."""
    check_values(config, "preferences.")
    if config.format != "auto":
        return config.format == "paired"
    for _, content in read_lines(preferences_path(config)):
        if isinstance(content, dict):
            return not {"answer", "desirable"} & content.keys()
    return True


def read_preferences(config: PreferencesConfig, split: str, as_pairs: bool) -> Preferences:
    """Return the preferences of a split, as pairs or as judged answers.

    Raises ValueError for wrong settings, if pairs are asked of a file of judged answers, for bad lines unless `on_bad`
    is skip (with counts, files and lines), and for a split without preferences.
    """
    path, paired = preferences_path(config), is_paired(config)
    check_values(config, "preferences.")
    if as_pairs and not paired:
        allowed = "must hold pairs (prompt, chosen, rejected) for objective.name=dpo and for preferences.evaluate; this"
        raise refuse("preferences.path", config.path, f"{allowed} file has judged answers, which kto takes too")
    found = Preferences([], None if as_pairs else [])
    seen: set[str] = set()
    for number, content in read_lines(path):
        found.report.num_read += 1
        try:
            if isinstance(content, BadLine):
                raise content
            preference = _pair(content, number) if paired else _judged(content, number)
            if preference.id in seen:
                raise BadLine("duplicate_id", f"id {preference.id!r} was there before")
            seen.add(preference.id)
            of_split = text_field(content, "split", config.train) == split
        except BadLine as bad:
            found.report.add(f"{path}:{number}", bad)
            continue
        found.report.num_kept += 1
        if not of_split:
            continue
        if paired and 0 < config.max_length_ratio < _length_ratio(preference.answers):
            found.num_too_unequal += 1
            continue
        _append(found, preference, content, paired)
    if found.report.bad and config.on_bad == "error":
        raise ValueError(
            f"{found.report.summary()}\npreferences.on_bad is error: set it to skip to leave these lines out"
        )
    if found.report.bad:
        log.warning("%s", found.report.summary())
    if not found.questions:
        raise ValueError(
            f"{path} has no preferences of split {split!r} ({found.num_too_unequal} left out by "
            f"preferences.max_length_ratio={config.max_length_ratio})"
        )
    return found


def sampled_pairs(config: PreferencesConfig, questions: Sequence[Question]) -> list[Question]:
    """Return at most `max_pairs` of them in their order, the same ones in every run."""
    if not 0 < config.max_pairs < len(questions):
        return list(questions)
    chosen = np.sort(np.random.default_rng(SAMPLE_SEED).permutation(len(questions))[: config.max_pairs])
    return [questions[int(index)] for index in chosen]


def _append(found: Preferences, preference: Question, fields: dict[str, Any], paired: bool) -> None:
    if found.labels is None:
        found.questions.append(preference)
    elif not paired:
        found.questions.append(preference)
        found.labels.append(int(fields["desirable"]))
    else:
        for answer, label in zip(preference.answers, (1, 0), strict=True):
            single = {"id": f"{preference.id}/{label}", "answers": [answer]}
            found.questions.append(Question(**{**vars(preference), **single}))
            found.labels.append(label)


def _pair(fields: dict[str, Any], number: int) -> Question:
    answers = [_text(fields, "chosen"), _text(fields, "rejected")]
    if answers[0].split() == answers[1].split():
        raise BadLine("equal_answers", f"chosen and rejected are both {answers[0][:40]!r}")
    return _question(fields, number, answers)


def _judged(fields: dict[str, Any], number: int) -> Question:
    if not isinstance(fields.get("desirable"), bool):
        raise BadLine("missing_field", f"desirable is {fields.get('desirable')!r}: needed is true or false")
    return _question(fields, number, [_text(fields, "answer")])


def _question(fields: dict[str, Any], number: int, answers: list[str]) -> Question:
    """Return the prompt with its answers. A line without an id is named by its number."""
    name = id_field(fields) if {"_id", "id"} & fields.keys() else f"line-{number}"
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadLine("missing_field", f"metadata is a {type(metadata).__name__}, not an object")
    several = metadata.get("positive_passage_ids")
    relevant = [text_field(fields, "positive_passage_id", ""), *(several if isinstance(several, list) else [])]
    relevant = list(dict.fromkeys(str(passage_id) for passage_id in relevant if passage_id))
    return Question(
        id=name, text=_text(fields, "prompt"), answers=answers, relevant=relevant, old_answers=[], metadata=metadata
    )


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise BadLine("missing_field", f"{name} is missing: there are {', '.join(sorted(fields)) or 'no fields'}")
    text = text_field(fields, name)
    if not text.strip():
        raise BadLine("empty_text", f"{name} is empty")
    return text


def _length_ratio(answers: Sequence[str]) -> float:
    lengths = [max(1, len(answer.split())) for answer in answers]
    return max(lengths) / min(lengths)
