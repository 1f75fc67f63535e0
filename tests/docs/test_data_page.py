"""Every sample of docs/data.md is read by the reader that the page names; "your own data" of the README is prepared."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from cluster.prepare import corpus_changes
from indexing.corpus.files.corpus import Passage, read_corpus, read_passages, read_questions
from indexing.corpus.files.formats import Question
from indexing.corpus.files.preferences import Preferences, is_paired, read_preferences
from indexing.corpus.stores.filters import parse_filter
from indexing.indexing_settings import CorpusConfig, PreferencesConfig, QuestionsConfig
from tests.docs.samples import ROOT, samples

PAGE = ROOT / "docs" / "data.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples of the page, each in the file that its title names."""
    place = tmp_path_factory.mktemp("page")
    for name, text in samples(PAGE).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    return place


def questions(folder: Path, split: str = "train", as_of: str = "") -> list[Question]:
    return read_questions(QuestionsConfig(path=str(folder), as_of=as_of), split)


def preferences(folder: Path, split: str, as_pairs: bool) -> Preferences:
    return read_preferences(PreferencesConfig(path=str(folder)), split, as_pairs)


@pytest.mark.parametrize("place", ["mine", "mine/corpus.jsonl"])
def test_a_corpus_is_a_folder_or_a_file(folder: Path, place: str):
    passages, report = read_corpus(CorpusConfig(path=str(folder / place)))
    assert [passage.id for passage in passages] == ["baikal", "caspian", "7"]
    assert passages[0] == Passage("baikal", "Lake Baikal", "Lake Baikal is 1,642 m deep.", {"lang": "en", "year": 2019})
    assert passages[2].title == ""
    assert report.num_kept == 3


def test_the_script_writes_parquet_whose_further_columns_are_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    runpy.run_path("write_parquet.py")
    passages, _ = read_corpus(CorpusConfig(path="corpus.parquet"))
    assert passages == [
        Passage("baikal", "Lake Baikal", "Lake Baikal is 1,642 m deep.", {"year": 2019}),
        Passage("caspian", "", "The Caspian Sea is 1,025 m deep.", {}),
    ]


def test_conditions_on_metadata_choose_passages(folder: Path):
    where = yaml.safe_load((folder / "where.yaml").read_text(encoding="utf-8"))["retrieval"]["where"]
    passages, _ = read_corpus(CorpusConfig(path=str(folder / "mine")))

    def passing(**conditions: object) -> list[str]:
        found = parse_filter(conditions)
        assert found is not None
        return [passage.id for passage in passages if found.passes(passage.metadata)]

    assert passing(lang=where["lang"]) == ["baikal", "caspian"]
    assert passing(kind=where["kind"]) == ["7"]
    assert passing(year=where["year"]) == ["baikal", "caspian"]
    assert passing(year=None) == ["7"]
    assert passing(**where) == []


def test_questions_have_several_answers_and_relevant_passages(folder: Path):
    first, second = questions(folder / "mine")
    assert (first.text, first.answers) == ("How deep is Lake Baikal?", ["1,642 m", "1642 metres"])
    assert (first.relevant, second.relevant) == (["baikal"], ["caspian"])
    assert second.answers == ["1,025 m"]


def test_options_claims_and_chats(folder: Path):
    (choice,) = questions(folder / "choice")
    assert (choice.options, choice.answers) == (["Baikal", "Caspian", "Bodensee"], ["Baikal"])
    true, false = questions(folder / "claims")
    assert (true.answers, false.answers) == (["SUPPORTS"], ["REFUTES"])
    assert true.options == ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"]
    (chat,) = questions(folder / "chats")
    assert (chat.text, chat.answers) == ("How deep is it?", ["1,642 m"])
    assert [turn["role"] for turn in chat.earlier] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("as_of", "answers", "former"),
    [("2024-06-30", ["1.4"], []), ("2024-07-01", ["1.5"], ["1.4"]), ("end", ["1.5"], ["1.4"])],
)
def test_the_date_chooses_the_answers(folder: Path, as_of: str, answers: list[str], former: list[str]):
    (question,) = questions(folder / "dated", "test", as_of=as_of)
    assert (question.answers, question.old_answers) == (answers, former)


def test_a_question_may_have_no_answer(folder: Path):
    (question,) = questions(folder / "refusal", "unanswerable")
    assert question.answers == []


def test_pairs_are_read_for_dpo_and_for_kto(folder: Path):
    assert is_paired(PreferencesConfig(path=str(folder / "paired")))
    pairs = preferences(folder / "paired", "train", as_pairs=True)
    assert pairs.labels is None
    assert [(p.id, p.answers, p.relevant) for p in pairs.questions] == [("p1", ["1,642 m", "1,025 m"], ["baikal"])]
    (test,) = preferences(folder / "paired", "test", as_pairs=True).questions
    assert (test.id, test.relevant) == ("line-2", ["caspian"])
    judged = preferences(folder / "paired", "train", as_pairs=False)
    assert (judged.labels, [p.answers for p in judged.questions]) == ([1, 0], [["1,642 m"], ["1,025 m"]])


def test_judged_answers_are_read_for_kto(folder: Path):
    assert not is_paired(PreferencesConfig(path=str(folder / "unpaired")))
    judged = preferences(folder / "unpaired", "train", as_pairs=False)
    assert (judged.labels, [p.answers for p in judged.questions]) == ([1, 0], [["1,642 m"], ["It is a lake."]])


@pytest.mark.parametrize(
    ("as_of", "ids"),
    [
        ("2024-04-30", ["baikal", "caspian", "7"]),
        ("2024-06-01", ["baikal", "caspian", "7", "vostok"]),
        ("end", ["caspian", "7", "vostok"]),
    ],
)
def test_dated_updates_apply_up_to_their_day(folder: Path, as_of: str, ids: list[str]):
    passages, _ = read_corpus(CorpusConfig(path=str(folder / "mine"), as_of=as_of))
    assert [passage.id for passage in passages] == ids
    text = next(passage.text for passage in passages if passage.id == "caspian")
    assert ("1,026 m" in text) == (as_of != "2024-04-30")


def test_files_of_the_verb_corpus(folder: Path):
    (added,) = read_passages(folder / "new.jsonl", 100_000)
    (changed,) = read_passages(folder / "changed.jsonl", 100_000)
    assert (added.id, added.metadata, changed.id) == ("tanganyika", {"lang": "en"}, "caspian")
    command = corpus_changes.parse(["delete", "runs/mine", "--file", str(folder / "ids.txt")])
    assert command.action == "delete"
    assert (folder / "ids.txt").read_text(encoding="utf-8").split() == ["baikal", "7"]


def test_bad_lines_are_told_as_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError) as refused:
        read_corpus(CorpusConfig(path="bad"))
    assert str(refused.value) == (folder / "bad.txt").read_text(encoding="utf-8").rstrip("\n")
    passages, report = read_corpus(CorpusConfig(path="bad", on_bad="skip"))
    assert ([passage.id for passage in passages], sum(report.bad.values())) == (["baikal"], 4)


def test_every_json_line_of_the_page_was_in_a_file(folder: Path):
    for name, text in samples(PAGE).items():
        if name.endswith(".jsonl") and not name.startswith("bad/"):
            assert all(json.loads(line) for line in text.splitlines())
    blocks = PAGE.read_text(encoding="utf-8").count("```jsonl")
    assert blocks == sum(name.endswith(".jsonl") for name in samples(PAGE))
