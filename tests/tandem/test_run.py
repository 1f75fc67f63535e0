"""A `Run` keeps what it loaded, takes note of changes, and works on a run folder that was moved."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tandem
from cluster import cli

QUESTION = "where was she born?"


def test_a_second_question_uses_what_is_loaded(run: tandem.Run) -> None:
    with tandem.load(run.folder) as again:
        begin = time.process_time()
        first = second = again.ask(QUESTION)
        seconds = [time.process_time() - begin]
        loaded = again._system()
        system, index = loaded.system, loaded._index
        for _ in range(3):
            begin = time.process_time()
            second = again.ask(QUESTION)
            seconds.append(time.process_time() - begin)
        assert min(seconds[1:]) < seconds[0] / 2
        assert first == second
        assert again._system() is loaded
        assert (loaded.system, loaded._index) == (system, index)
    with pytest.raises(ValueError, match="this run was closed; load it again"):
        again.ask(QUESTION)


def test_an_answer_says_what_it_was_read_from(run: tandem.Run) -> None:
    answer = run.ask(QUESTION, "what is her birth place?", k=5)
    assert len(answer.passages) == 5
    assert sum(passage.probability or 0 for passage in answer.passages) == pytest.approx(1, abs=1e-4)
    assert 0 <= answer.probability <= 1
    assert all(passage.text and passage.id and len(passage.dense_places) == 2 for passage in answer.passages)
    assert Path(answer.checkpoint) == run.folder / "checkpoints" / "step-2"


def test_search_and_encode(run: tandem.Run) -> None:
    one, (same, other) = run.search(QUESTION, k=4), run.search([QUESTION, "who is a baker?"], k=4)
    assert [hit.id for hit in one] == [hit.id for hit in same]
    assert len(other) == 4
    vectors = run.encode([QUESTION, "a much longer question than the first one was"])
    assert vectors.dtype == np.float32
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(vectors[:1], run.encode([QUESTION]), atol=1e-6)
    assert run.encode(["a passage"], kind="passage").shape == (1, 32)
    assert run.encode([]).shape == (0, 32)
    with pytest.raises(ValueError, match="kind='words': must be one of question, passage"):
        run.encode(["x"], kind="words")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"question": " "}, "ask needs a question"),
        ({"question": "x", "k": 0}, r"retrieval\.k=0: must be at least 1"),
        ({"question": "x", "where": {"nothing": 3}}, r"retrieval\.where\.nothing: "),
    ],
)
def test_mistakes_are_value_errors(run: tandem.Run, arguments: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        run.ask(**arguments)
    assert run.ask(QUESTION).text == run.ask(QUESTION).text


def test_mistakes_of_the_configuration_are_those_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder \(it has no config\.yaml\)"):
        tandem.load(tmp_path)
    with pytest.raises(ValueError, match=r"Did you mean training\.steps"):
        tandem.train("configs/quickstart.yaml", "training.stepz=3")
    with pytest.raises(ValueError, match=r"corpus\.path"):
        tandem.train("configs/quickstart.yaml", f"corpus.path={tmp_path / 'none'}", f"run.directory={tmp_path}")


def test_a_change_of_the_corpus_shows_at_the_next_question(moved: Path, tmp_path: Path) -> None:
    """Made by the run itself, and by another process."""
    run, text = tandem.load(moved), "zebra quagga okapi zebra quagga"
    before = {hit.id for hit in run.search(text)}
    loaded = run._system()._index
    assert run.corpus.add([{"_id": "n1", "text": text}, {"_id": "n2", "text": f"{text} {text}"}]) == 1
    assert {hit.id for hit in run.search(text)} & {"n1", "n2"} == {"n1", "n2"}
    assert run.corpus.delete("n1") == 2
    assert "n1" not in {hit.id for hit in run.search(text)}
    file = tmp_path / "new.jsonl"
    file.write_text(json.dumps({"_id": "n3", "text": text, "metadata": {"origin": "file"}}))
    command = [sys.executable, "-m", "cluster.cli", "corpus", "add", str(moved), str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    found = run.search(text)
    assert "n3" in {hit.id for hit in found}
    assert [hit.id for hit in run.search(text, where={"origin": "file"})] == ["n3"]
    assert {hit.id for hit in found} != before
    assert run._system()._index is loaded
    assert run.corpus.version == 3
    with pytest.raises(ValueError, match="passage 2: empty_text"):
        run.corpus.add({"_id": "g", "text": "good"}, {"_id": "b", "text": " "})
    with pytest.raises(ValueError, match="passage 'n3' is in the corpus already"):
        run.corpus.add(file)
    assert run.corpus.update(file) == 4


def test_threads_take_turns(run: tandem.Run) -> None:
    questions, answers = [f"where was number {n} born?" for n in range(4)], dict[str, str]()
    threads = [
        threading.Thread(target=lambda q=question: answers.update({q: run.ask(q).text})) for question in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {question: run.ask(question).text for question in questions}


def test_a_moved_run_answers_from_any_folder(
    trained: Path, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it answers is what it answered before, and nothing is written beside it or into the first one."""
    wanted = tandem.load(trained).ask(QUESTION)
    before = files_of(trained.parent), files_of(moved.parent)
    monkeypatch.chdir(moved.parent)
    answer = tandem.load("joint").ask(QUESTION)
    assert (answer.text, answer.passages) == (wanted.text, wanted.passages)
    assert cli.main(["ask", QUESTION, "joint"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == wanted.text
    assert tandem.load(moved).results() == tandem.load(trained).results()
    assert cli.main(["corpus", "show", "joint"]) == 0
    assert str(moved.parent / "data") in capsys.readouterr().out
    assert (files_of(trained.parent), files_of(moved.parent)) == before


def test_a_moved_run_takes_changes_through_the_command(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.jsonl").write_text(json.dumps({"_id": "n1", "text": "gneiss basalt gneiss schist"}))
    assert cli.main(["corpus", "add", str(moved), str(tmp_path / "new.jsonl")]) == 0
    assert "n1" in {hit.id for hit in tandem.load(moved).search("gneiss basalt gneiss schist")}
    assert cli.main(["corpus", "delete", str(moved), "n1"]) == 0
    assert "n1" not in {hit.id for hit in tandem.load(moved).search("gneiss basalt gneiss schist")}
    capsys.readouterr()
    assert cli.main(["corpus", "show", str(moved)]) == 0
    assert "version 2: 0 added, 0 updated, 1 deleted" in capsys.readouterr().out


def test_nothing_in_a_run_folder_names_its_place(trained: Path) -> None:
    """But for run.directory and run.init_from of config.yaml, which are read relative to the folder, and what is there
    to be read by people."""
    place = str(trained.parents[1]).encode()
    people = {"console.log", "report.html", "config.yaml", "events.jsonl"}
    naming = {path.name for path in trained.parent.rglob("*") if path.is_file() and place in path.read_bytes()}
    assert naming - people <= {"manifest.json"}  # of a store: what it was made of


def files_of(folder: Path) -> dict[str, int]:
    """Every file with its time."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} | {"cwd": len(os.sep)}
