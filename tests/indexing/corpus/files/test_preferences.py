"""Preference files: pairs and judged answers, splits, filters, and every bad line by file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.files.preferences import is_paired, preferences_path, read_preferences, sampled_pairs
from indexing.corpus.stores.passages import write_store
from indexing.corpus.stores.questions import QuestionStore, write_questions
from indexing.indexing_settings import PreferencesConfig
from tests.indexing.helpers import words_side

PAIRS = [
    {"_id": "a", "prompt": "when?", "chosen": "2015", "rejected": "in 2014 maybe", "split": "train"},
    {"_id": "b", "prompt": "who?", "chosen": "Ada", "rejected": "Bob", "split": "test", "positive_passage_id": "p1"},
    {"prompt": "where?", "chosen": "Rome", "rejected": "Oslo", "metadata": {"positive_passage_ids": ["p0", "p1"]}},
]
JUDGED = [
    {"prompt": "when?", "answer": "2015", "desirable": True},
    {"prompt": "who?", "answer": "Bob", "desirable": False, "split": "train"},
]


def write(path: Path, rows: list[dict[str, Any]], *raw: bytes) -> Path:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"".join(line + b"\n" for line in raw)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def config(path: Path, **changes: Any) -> PreferencesConfig:
    return PreferencesConfig(path=str(path), **changes)


@pytest.mark.parametrize("name", ["preferences.jsonl", "preferences.jsonl.gz"])
def test_pairs(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, PAIRS)
    for path in (file, tmp_path):
        settings = config(path)
        assert preferences_path(settings) == file
        assert is_paired(settings)
        train = read_preferences(settings, "train", as_pairs=True)
        assert train.labels is None
        assert [(q.id, q.text, q.answers) for q in train.questions] == [
            ("a", "when?", ["2015", "in 2014 maybe"]),
            ("line-3", "where?", ["Rome", "Oslo"]),  # without a split it is trained on
        ]
        assert [q.relevant for q in train.questions] == [[], ["p0", "p1"]]
        assert [q.relevant for q in read_preferences(settings, "test", as_pairs=True).questions] == [["p1"]]


def test_pairs_are_two_judged_answers(tmp_path: Path) -> None:
    found = read_preferences(config(write(tmp_path / "p.jsonl", PAIRS)), "train", as_pairs=False)
    assert found.labels == [1, 0, 1, 0]
    assert [q.answers for q in found.questions] == [["2015"], ["in 2014 maybe"], ["Rome"], ["Oslo"]]
    assert len({q.id for q in found.questions}) == 4


def test_judged_answers(tmp_path: Path) -> None:
    settings = config(write(tmp_path / "p.jsonl", JUDGED))
    assert not is_paired(settings)
    found = read_preferences(settings, "train", as_pairs=False)
    assert found.labels == [1, 0]
    assert [q.answers for q in found.questions] == [["2015"], ["Bob"]]
    with pytest.raises(ValueError, match=r"must hold pairs .* for objective.name=dpo"):
        read_preferences(settings, "train", as_pairs=True)


def test_pairs_of_unequal_length_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", PAIRS)
    found = read_preferences(config(file, max_length_ratio=2.0), "train", as_pairs=False)
    assert [q.answers for q in found.questions] == [["Rome"], ["Oslo"]]
    assert found.num_too_unequal == 1
    assert read_preferences(config(file, max_length_ratio=3.0), "train", as_pairs=True).num_too_unequal == 0


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    bad = [
        ({"prompt": "x", "chosen": "y"}, "missing_field: rejected is missing: there are chosen, prompt"),
        ({"prompt": " ", "chosen": "y", "rejected": "z"}, "empty_text: prompt is empty"),
        ({"prompt": "x", "chosen": "", "rejected": "z"}, "empty_text: chosen is empty"),
        ({"prompt": "x", "chosen": "y  z", "rejected": "y z"}, "equal_answers: chosen and rejected are both 'y  z'"),
        ({"prompt": "x", "chosen": 3, "rejected": "z"}, "missing_field: chosen is '3': needed is a string"),
        ({"_id": "a", "prompt": "x", "chosen": "y", "rejected": "z"}, "duplicate_id: id 'a' was there before"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "metadata": [1]}, "missing_field: metadata is a list"),
    ]
    file = write(tmp_path / "p.jsonl", [*PAIRS, *(row for row, _ in bad)], b"{no json", b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="set it to skip") as caught:
        read_preferences(config(file), "train", as_pairs=True)
    message = str(caught.value)
    assert "12 lines read, 3 good, 9 bad: 1 broken_utf8, 1 duplicate_id, 2 empty_text, 1 equal_answers" in message
    for number, (_, why) in enumerate(bad, start=4):
        assert f"{file}:{number}: {why}" in message
    assert f"{file}:11: not_json" in message
    assert f"{file}:12: broken_utf8" in message
    found = read_preferences(config(file, on_bad="skip"), "train", as_pairs=True)
    assert [q.id for q in found.questions] == ["a", "line-3"]
    assert sum(found.report.bad.values()) == 9


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_judgement_is_true_or_false(tmp_path: Path, value: object) -> None:
    file = write(tmp_path / "p.jsonl", [*JUDGED, {"prompt": "x", "answer": "y", "desirable": value}])
    with pytest.raises(ValueError, match=rf"p.jsonl:3: missing_field: desirable is {value!r}: needed is true or false"):
        read_preferences(config(file), "train", as_pairs=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "preferences.path=: must be a"),
        ({"path": "nowhere.jsonl"}, "preferences.path=nowhere.jsonl: must be"),
        ({"format": "pairs"}, "preferences.format=pairs: must be one of auto, paired, unpaired"),
        ({"format": "unpaired"}, "desirable is None: needed is true or false"),
        ({"on_bad": "ignore"}, "preferences.on_bad=ignore: must be one of"),
        ({"train": "dev"}, "no preferences of split 'train'"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rows = [row | {"split": "test"} for row in PAIRS] if "train" in changes else PAIRS
    file = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_preferences(PreferencesConfig(**{"path": str(file), **changes}), "train", as_pairs=False)


def test_the_same_sample_in_every_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    settings = config(write(tmp_path / "p.jsonl", rows), max_pairs=5)
    questions = read_preferences(settings, "train", as_pairs=True).questions
    first, second = (sampled_pairs(settings, questions) for _ in range(2))
    assert first == second
    assert len(first) == 5
    assert [q.id for q in first] == sorted((q.id for q in first), key=lambda name: int(name.removeprefix("line-")))


def test_labels_are_kept_in_the_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Passage("p0", "", "Rome."), Passage("p1", "", "Ada.")], [])
    found = read_preferences(config(write(tmp_path / "p.jsonl", PAIRS)), "train", as_pairs=False)
    sides = [words_side("retriever")]
    written = write_questions(
        tmp_path / "judged",
        found.questions,
        sides=sides,
        answer_side=words_side("answer"),
        store=store,
        labels=found.labels,
    )
    again = QuestionStore.open(written.path)
    assert again.labels is not None
    assert again.labels.tolist() == [1, 0, 1, 0]
    assert again.gold_rows(2).tolist() == [0, 1]
    plain = write_questions(
        tmp_path / "plain", found.questions, sides=sides, answer_side=words_side("answer"), store=store
    )
    assert plain.labels is None


def test_real_files(data_folder: Path) -> None:
    for name in ("squad-mini", "halueval-qa", "qa-feedback"):
        settings = config(data_folder / name)
        found = read_preferences(settings, "train", as_pairs=True)
        assert not found.report.bad
        assert found.report.num_read > len(found.questions) > 100
    assert (
        read_preferences(config(data_folder / "halueval-qa", max_length_ratio=2.0), "train", True).num_too_unequal > 400
    )
