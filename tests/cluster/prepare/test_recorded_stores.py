"""A run folder belongs to the data that it was started with: others are refused, the same ones made anew are not."""

import shutil
from pathlib import Path

import pytest

from cluster.config.experiment import load
from cluster.prepare.recorded_stores import check_same_data, record_stores
from cluster.prepare.stores import Prepared, prepare_data
from tests.cluster.prepare.test_finetuning_formats import SETTINGS, corpus


def prepared(folder: Path, root: Path) -> Prepared:
    config = root / "a.yaml"
    config.write_text(f"corpus: {{path: {folder}}}\nrun: {{directory: {root}, name: r}}\n", encoding="utf-8")
    return prepare_data(load([str(config)], [*SETTINGS]).settings, root / "r", lambda _: None)


def test_changed_passages_and_questions_are_refused_by_name(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "towns", lambda town: {"text": f"Which colour is {town}?", "answers": ["red"]})
    run = tmp_path / "r"
    before = prepared(folder, tmp_path)
    check_same_data(run, before.passages, before.questions)  # nothing is recorded yet
    record_stores(run, before.passages, before.tokenizers)
    check_same_data(run, before.passages, before.questions)

    again = tmp_path / "again"
    shutil.copytree(before.passages.parent, again)  # the same data, at another place
    moved = {split: again / path.name for split, path in before.questions.items()}
    check_same_data(run, again / "passages", moved)

    questions = folder / "queries-test.jsonl"
    questions.write_text(questions.read_text(encoding="utf-8").replace("Which", "What"), encoding="utf-8")
    now = prepared(folder, tmp_path)
    with pytest.raises(ValueError, match=r"other data \(questions test have changed since\)"):
        check_same_data(run, now.passages, now.questions)

    passages = folder / "corpus.jsonl"
    passages.write_text(passages.read_text(encoding="utf-8").replace("a town", "a city"), encoding="utf-8")
    now = prepared(folder, tmp_path)
    with pytest.raises(ValueError, match=r"other data \(passages, questions t"):
        check_same_data(run, now.passages, now.questions)
