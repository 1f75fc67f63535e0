"""The verb `corpus` on the folder of a run that nobody serves: what it changes, what it refuses, and what it says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster import cli
from cluster.config.experiment import to_yaml
from cluster.config.settings import RunConfig, Settings
from cluster.prepare.corpus_changes import is_running, open_to_changes, passage_sides, wait_until_served
from cluster.prepare.stores import Prepared
from cluster.stage.inherit import inherit_corpus
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.passages import TokenSide, write_store
from training.models.text.token_rows import generator_passage_side, retriever_passage_side
from training.models.text.tokenizers import build_tokenizer
from training.training_settings import EncoderConfig, RerankerConfig, RetrievalConfig, TokenizerConfig

ENCODER = EncoderConfig(tokenizer=TokenizerConfig(vocabulary=120))
WORDS = "the cat sat on a mat while seven dogs ran over green hills towards an old red house by the sea"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it, as far as this verb looks at it."""
    root = tmp_path_factory.mktemp("runs")
    settings = Settings(run=RunConfig(name="a", directory=str(root)), encoder=ENCODER, retrieval=RetrievalConfig(k=4))
    folder = root / "a"
    texts = [" ".join(WORDS.split()[n : n + 6]) for n in range(9)]
    tokenizers = [
        build_tokenizer("", ENCODER.tokenizer, texts=texts, save_dir=folder / "tokenizers" / name)
        for name in ("retriever", "generator")
    ]
    sides = [
        retriever_passage_side(tokenizers[0], ENCODER),
        generator_passage_side(tokenizers[1], settings.generator, ENCODER.max_title_tokens),
    ]
    write_store(folder / "passages", [Passage(f"p{n}", "", text) for n, text in enumerate(texts)], sides)
    (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
    with open_to_changes(
        folder / "corpus", Prepared(passages=folder / "passages", questions={}, tokenizers=folder / "tokenizers")
    ):
        assert is_running(folder / "corpus")
    assert not is_running(folder / "corpus")
    return folder


@pytest.fixture
def run(made: Path) -> Path:
    """The same run without changes."""
    shutil.rmtree(made / "corpus" / "versions", ignore_errors=True)
    shutil.rmtree(made / "corpus" / "segments", ignore_errors=True)
    return made


def store_of(run: Path) -> LiveStore:
    return LiveStore.open_with(run / "passages", run / "corpus")


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_add_update_delete_show(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = write(tmp_path / "new.jsonl", {"_id": "n1", "text": "a new cat"}, {"_id": 17, "title": "t", "text": "dogs"})
    assert cli.main(["corpus", "add", str(run), new]) == 0
    assert "2 put in, 0 taken away: version 1 of the corpus, 11 passages" in capsys.readouterr().out
    changed = write(tmp_path / "changed.jsonl", {"_id": "p3", "text": "another house"})
    assert cli.main(["corpus", "update", str(run), changed]) == 0
    assert cli.main(["corpus", "delete", str(run), "n1", "p0"]) == 0
    assert cli.main(["corpus", "delete", str(run), "--file", write(tmp_path / "ids.txt", "p1", "", "p2")]) == 0
    printed = capsys.readouterr().out
    assert "no job serves this run: its next start encodes what is new" in printed
    store = store_of(run)
    living = np.arange(len(store))[store.is_living(np.arange(len(store)))]
    assert {store.passage(int(n)).id for n in living} == {"p3", "p4", "p5", "p6", "p7", "p8", "17"}
    row = store.row_of("p3")
    assert row is not None
    assert store.passage(row).text == "another house"
    assert len(store.tokens("generator").rows([row])[0]) > 0
    assert cli.main(["corpus", "show", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "9 passages; 7 living in version 4" in printed
    for line in (
        "version 1: 2 added, 0 updated, 0 deleted; 11 passages",
        "version 2: 0 added, 1 updated, 0 deleted; 11 passages",
        "version 4: 0 added, 0 updated, 2 deleted; 7 passages",
    ):
        assert line in printed


GOOD = {"_id": "x", "text": "fine"}


@pytest.mark.parametrize(
    ("arguments", "rows", "expected"),
    [
        ([], [], "corpus: allowed are add, update, delete, show"),
        (["ad", "RUN", "FILE"], [], "corpus ad: allowed are add, update, delete, show"),
        (["add"], [], "corpus add needs a run folder"),
        (["add", "RUN"], [], "corpus add needs one file of passages"),
        (["add", "RUN", "nowhere.jsonl"], [], "nowhere.jsonl does not exist"),
        (["add", "nowhere", "FILE"], [GOOD], "nowhere is no run folder (it has no config.yaml)"),
        (["delete", "RUN"], [], "corpus delete needs ids"),
        (["delete", "RUN", "--file"], [], "corpus delete --file needs one file"),
        (["delete", "RUN", "--file", "FILE"], [""], "has no ids"),
        (["show", "RUN", "more"], [], "corpus show takes a run folder alone"),
        (["delete", "RUN", "p1", "q9"], [], "passage 'q9' is not in the corpus: it cannot be deleted"),
        (["delete", "RUN", "p1", "p1"], [], "id 'p1' comes twice"),
        (["delete", "RUN", *(f"p{n}" for n in range(6))], [], "3 passages would be left in the corpus: 4 are needed"),
        (["add", "RUN", "FILE"], [GOOD, "{broken"], "FILE:2: not_json"),
        (
            ["add", "RUN", "FILE"],
            [GOOD, {"_id": "y", "text": " "}, "{"],
            "FILE:2: empty_text: passage 'y' has no text (and",
        ),
        (["add", "RUN", "FILE"], [GOOD, GOOD], "FILE:2: duplicate_id: id 'x' was there before"),
        (["add", "RUN", "FILE"], [{"text": "no id"}], "FILE:1: missing_field: _id is None"),
        (["add", "RUN", "FILE"], [""], "FILE has no passages"),
        (["add", "RUN", "FILE"], [GOOD, {"_id": "p5", "text": "there"}], "passage 'p5' is in the corpus already"),
        (["update", "RUN", "FILE"], [GOOD], "passage 'x' is not in the corpus: use add"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    rows: list[object],
    expected: str,
) -> None:
    file = write(tmp_path / "file.jsonl", *rows)
    given = [{"RUN": str(run), "FILE": file}.get(argument, argument) for argument in arguments]
    assert cli.main(["corpus", *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected.replace("FILE", file) in captured.err
    assert captured.err.count("\n") == 1
    assert store_of(run).log.version == 0


def test_the_wait_for_a_job_ends(run: Path) -> None:
    corpus, prepared = run / "corpus", Prepared(passages=run / "passages", questions={}, tokenizers=run / "tokenizers")
    with open_to_changes(corpus, prepared):
        (corpus / "serving.json").write_text('{"version": 2, "generation": 5, "waits": "a shard is lost"}')
        assert wait_until_served(corpus, 2, 1.0)["generation"] == 5
        with pytest.raises(TimeoutError, match=r"version 3 is made, but not served after 0\.2 s: a shard is lost"):
            wait_until_served(corpus, 3, 0.2)
    assert not (corpus / "serving.json").exists()


def test_a_job_that_died_does_not_run(run: Path) -> None:
    """Its driver's number may belong to another process by now."""
    corpus = run / "corpus"
    with open_to_changes(corpus, Prepared(passages=run / "passages", questions={}, tokenizers=run / "tokenizers")):
        driver = json.loads((corpus / "running.json").read_text())
        for other in ({**driver, "created": driver["created"] - 5}, {**driver, "pid": 2**22 + 5}):
            (corpus / "running.json").write_text(json.dumps(other))
            assert not is_running(corpus)


def test_a_run_goes_on_with_the_changes_of_the_run_that_it_starts_from(run: Path, tmp_path: Path) -> None:
    """Also with those made later, until it changes its own corpus or has a checkpoint."""
    before, own = store_of(run), tmp_path / "next"
    checkpoint = str(run / "checkpoints" / "step-1")
    assert inherit_corpus(checkpoint, own, before).version == 0
    change_corpus(before, Wanted(delete=["p1"]), sides=[])
    assert inherit_corpus("", own, before).version == 0

    def inherited() -> LiveStore:
        inherit_corpus(checkpoint, own, LiveStore.open_with(run / "passages", tmp_path / "none"))
        return LiveStore.open_with(run / "passages", own / "corpus")

    assert inherited().row_of("p1") is None
    change_corpus(before, Wanted(delete=["p2"]), sides=[])
    assert inherited().log.version == 2
    change_corpus(inherited(), Wanted(delete=["p3"]), sides=[])
    change_corpus(before, Wanted(delete=["p4"]), sides=[])
    store = inherited()
    assert [store.row_of(f"p{n}") is None for n in range(1, 5)] == [True, True, True, False]


def test_a_re_ranker_reads_what_was_added_before_there_was_one(run: Path, tmp_path: Path) -> None:
    """A stage with a re-ranker that has a tokeniser of its own goes on with the changes of one without: what was added
    there is tokenised for it, too."""
    before, own, settings = store_of(run), tmp_path / "own", read_settings(run)
    change_corpus(before, Wanted(put=[Passage("n1", "t", "a new cat"), Passage("n2", "", "dogs")]), sides=sides_of(run))
    shutil.copytree(run / "tokenizers", tmp_path / "tokenizers")
    shutil.copytree(run / "tokenizers" / "retriever", tmp_path / "tokenizers" / "reranker")
    settings = replace(settings, reranker=RerankerConfig(mode="add", name="cross-encoder"))
    sides = passage_sides(settings, tmp_path / "tokenizers")
    assert [side.name for side in sides] == ["retriever", "generator", "reranker"]
    texts = [before.passage(row) for row in range(before.num_base)]
    passages = write_store(tmp_path / "passages", texts, sides)
    log = inherit_corpus(str(run / "checkpoints" / "step-1"), own, passages, lambda: sides)
    assert log.version == 1
    store = LiveStore.open_with(tmp_path / "passages", own / "corpus")
    assert store.row_of("n2") == before.row_of("n2") == 10
    pairs = [("t", "a new cat"), ("", "dogs")]
    for side in sides:
        assert [row.tolist() for row in store.tokens(side.name).rows([9, 10])] == side.tokenize(pairs)


def read_settings(run: Path) -> Settings:
    return list(cli.read_experiment([str(run)]).stages.values())[-1]


def sides_of(run: Path) -> list[TokenSide]:
    return passage_sides(read_settings(run), run / "tokenizers")
