"""Corpora and questions: formats, one line per kind of damage, dated updates, the real sets."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from indexing.corpus.files.corpus import BAD_KINDS, Passage, iterate_corpus, read_corpus, read_questions, validate
from indexing.indexing_settings import CorpusConfig, QuestionsConfig

GOOD = b'{"_id": "a", "title": "A", "text": "first", "metadata": {"x": 1}}\n'
OTHER = b'{"_id": "b", "text": "second"}\n'

BAD_PASSAGES = [
    ("not_json", b"{oops\n"),
    ("not_json", b'["a", "list"]\n'),
    ("not_json", b'"a string"\n'),
    ("not_json", b'{"_id": "c", "text": "cut'),
    ("not_json", b"[" * 100_000 + b"\n"),
    ("not_json", b'{"_id": "c", "text": "x", "n": ' + b"1" * 5000 + b"}\n"),
    ("broken_utf8", b'{"_id": "c", "text": "caf\xe9"}\n'),
    ("broken_utf8", b'{"_id": "c", "text": "half \\ud83d a pair"}\n'),
    ("broken_utf8", b'{"_id": "\\udc00", "text": "x"}\n'),
    ("duplicate_id", b'{"_id": "a", "text": "again"}\n'),
    ("empty_text", b'{"_id": "c", "title": "T", "text": ""}\n'),
    ("empty_text", b'{"_id": "c", "text": " \\t\\n\\u00a0"}\n'),
    ("oversized_text", b'{"_id": "c", "title": "T", "text": "' + b"x" * 50 + b'"}\n'),
    ("missing_field", b'{"title": "T", "text": "x"}\n'),
    ("missing_field", b'{"_id": "", "text": "x"}\n'),
    ("missing_field", b'{"_id": null, "text": "x"}\n'),
    ("missing_field", b'{"_id": true, "text": "x"}\n'),
    ("missing_field", b'{"_id": "c", "title": "T"}\n'),
    ("missing_field", b'{"_id": "c", "text": null}\n'),
    ("missing_field", b'{"_id": "c", "text": ["x"]}\n'),
    ("missing_field", b'{"_id": "c", "title": 3, "text": "x"}\n'),
]


def write(path: Path, *lines: bytes) -> str:
    data = b"".join(lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def lines_of(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
@pytest.mark.parametrize(("kind", "line"), BAD_PASSAGES)
def test_bad_passage(tmp_path: Path, kind: str, line: bytes, name: str) -> None:
    assert kind in BAD_KINDS
    write(tmp_path / name, GOOD, OTHER, line)
    config = CorpusConfig(path=str(tmp_path), max_characters=50)
    with pytest.raises(ValueError, match=rf"1 {kind}\n.*{name}:3: {kind}: .*\ncorpus\.on_bad is error"):
        read_corpus(config)
    config.on_bad = "skip"
    passages, report = read_corpus(config)
    assert passages == [Passage("a", "A", "first", {"x": 1}), Passage("b", "", "second")]
    assert (report.num_read, report.num_kept, dict(report.bad)) == (3, 2, {kind: 1})
    assert len(report.examples) == 1
    assert validate(config) == report


def test_counts_of_many_bad_lines(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", GOOD, *(b"{\n" for _ in range(30)), b'{"_id": "a", "text": "x"}\n')
    with pytest.raises(ValueError, match="32 lines read, 1 good, 31 bad: 1 duplicate_id, 30 not_json") as caught:
        read_corpus(CorpusConfig(path=str(tmp_path)))
    assert str(caught.value).count("corpus.jsonl:") == 20


def test_tolerated(tmp_path: Path) -> None:
    """A byte order mark, blank lines, Windows line ends, whole numbers as ids, no line end at the end."""
    lines = [b'\xef\xbb\xbf{"_id": 7, "text": "x"}\r\n', b"\n", b"  \r\n", b'{"id": "b", "title": null, "text": "y"}']
    path = write(tmp_path / "corpus.jsonl", *lines)
    passages, report = read_corpus(CorpusConfig(path=path))
    assert passages == [Passage("7", "", "x"), Passage("b", "", "y")]
    assert report.num_read == 2


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", b"\n", GOOD, b"\n", b"{\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:4: not_json"):
        read_corpus(CorpusConfig(path=path))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3, 2], "text": ["x", None, "z", "w"], "other": [0, 0, 0, 0]}), path)
    passages, report = read_corpus(CorpusConfig(path=str(path), on_bad="skip"))
    zero = {"other": 0}
    assert passages == [Passage("1", "", "x", zero), Passage("3", "", "z", zero), Passage("2", "", "w", zero)]
    assert report.examples == [f"{path}:2: missing_field: text is 'None': needed is a string"]
    table = pa.table({"_id": ["a", "b", "b"], "title": ["A", None, "B"], "text": ["x", "y", "z"]})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"corpus\.parquet:3: duplicate_id"):
        read_corpus(CorpusConfig(path=str(path)))


def test_parquet_with_broken_utf8(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    text = pa.array([b"good", b"caf\xe9", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"_id": ["a", "b", "c"], "text": text}), path)
    passages, report = read_corpus(CorpusConfig(path=str(path), on_bad="skip"))
    assert [passage.id for passage in passages] == ["a", "c"]
    assert dict(report.bad) == {"broken_utf8": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"corpus\.path=: must be a BEIR folder"),
        ({"path": "nowhere.jsonl"}, r"corpus\.path=.*nowhere\.jsonl: must be a BEIR folder, or a"),
        ({"path": "empty"}, r"must be a folder with corpus\.jsonl"),
        ({"path": "corpus.txt"}, r"corpus\.txt: must end in \.jsonl or \.jsonl\.gz or \.parquet"),
        ({"path": "good.jsonl", "format": "csv"}, r"corpus\.format=csv: must be one of auto, beir"),
        ({"path": "good.jsonl", "format": "parquet"}, r"must end in \.parquet"),
        ({"path": "good.jsonl", "on_bad": "ignore"}, r"corpus\.on_bad=ignore: must be one of error, skip"),
        ({"path": "good.jsonl", "max_characters": 0}, r"corpus\.max_characters=0"),
        ({"path": "good.jsonl", "as_of": "01.01.2024"}, r"corpus\.as_of=01\.01\.2024: must be empty, .end. or a date"),
        ({"path": "good.jsonl", "as_of": "2024-02-30"}, r"corpus\.as_of=2024-02-30: must be empty, .end. or"),
        ({"path": "good.jsonl", "as_of": "end"}, r"as_of=end: must be empty, since there is no updates\.jsonl"),
        ({"path": "good.jsonl", "as_of": "end", "updates": "none.jsonl"}, r"corpus\.updates=.*: must be a file"),
        ({"path": "cut.jsonl.gz"}, r"cut\.jsonl\.gz is a damaged gzip file, after line"),
        ({"path": "no.jsonl.gz"}, r"no\.jsonl\.gz is a damaged gzip file, after line 0"),
        ({"path": "no.parquet"}, r"no\.parquet is no Parquet file"),
        ({"path": "columns.parquet"}, r"columns \['_id', 'body'\]: needed are _id"),
        ({"path": "blank.jsonl"}, "must have passages"),
        ({"path": "bad.jsonl", "on_bad": "skip"}, "must have passages"),
    ],
)
def test_refused(tmp_path: Path, settings: dict, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in {
        "corpus.txt": GOOD,
        "good.jsonl": GOOD,
        "blank.jsonl": b"\n",
        "bad.jsonl": b"{\n",
        "cut.jsonl.gz": gzip.compress(GOOD * 100)[:-20],
        "no.jsonl.gz": GOOD,
        "no.parquet": GOOD,
    }.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"_id": ["a"], "body": ["x"]}), tmp_path / "columns.parquet")
    paths = {name: str(tmp_path / value) for name, value in settings.items() if name in ("path", "updates") and value}
    with pytest.raises(ValueError, match=message):
        read_corpus(CorpusConfig(**{**settings, **paths}))


def test_streaming_refuses_at_the_end(tmp_path: Path) -> None:
    passages, report = iterate_corpus(CorpusConfig(path=write(tmp_path / "c.jsonl", GOOD, b"{\n", OTHER)))
    assert [next(passages).id, next(passages).id] == ["a", "b"]
    assert report.num_kept == 2
    with pytest.raises(ValueError, match="on_bad"):
        next(passages)


UPDATES = [
    {"date": "2024-02-01", "op": "upsert", "_id": "b", "title": "B", "text": "second, changed"},
    {"date": "2024-02-01", "op": "upsert", "_id": "c", "title": "C", "text": "new"},
    {"date": "2024-03-01", "op": "delete", "_id": "a"},
    {"date": "2024-03-01", "op": "delete", "_id": "c"},
    {"date": "2024-04-01", "op": "upsert", "_id": "a", "title": "A", "text": "first, again"},
    {"date": "2024-03-15", "op": "upsert", "_id": "a", "title": "A", "text": "written late, overtaken"},
    {"date": "2024-04-01", "op": "upsert", "_id": "d", "text": "last"},
    {"date": "2024-04-01", "op": "delete", "_id": "unknown"},
]


@pytest.mark.parametrize(
    ("as_of", "expected"),
    [
        ("", {"a": "first", "b": "second"}),
        ("2024-01-31", {"a": "first", "b": "second"}),
        ("2024-02-01", {"a": "first", "b": "second, changed", "c": "new"}),
        ("2024-03-31", {"a": "written late, overtaken", "b": "second, changed"}),
        ("2024-03-10", {"b": "second, changed"}),
        ("end", {"a": "first, again", "b": "second, changed", "d": "last"}),
    ],
)
def test_updates_up_to_a_date(tmp_path: Path, as_of: str, expected: dict[str, str]) -> None:
    write(tmp_path / "corpus.jsonl", GOOD, OTHER)
    write(tmp_path / "updates.jsonl.gz", lines_of(UPDATES))
    passages, _ = read_corpus(CorpusConfig(path=str(tmp_path), as_of=as_of))
    assert {passage.id: passage.text for passage in passages} == expected
    elsewhere = CorpusConfig(
        path=str(tmp_path / "corpus.jsonl"), as_of=as_of, updates=str(tmp_path / "updates.jsonl.gz")
    )
    assert read_corpus(elsewhere)[0] == passages


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        ("missing_field", {"op": "delete", "_id": "a"}),
        ("missing_field", {"date": "2024-2-1", "op": "delete", "_id": "a"}),
        ("missing_field", {"date": "2024-02-01", "op": "replace", "_id": "a"}),
        ("missing_field", {"date": "2024-02-01", "op": "delete"}),
        ("missing_field", {"date": "2024-02-01", "op": "upsert", "_id": "a"}),
        ("empty_text", {"date": "2024-02-01", "op": "upsert", "_id": "a", "text": " "}),
    ],
)
def test_bad_update(tmp_path: Path, kind: str, event: dict) -> None:
    write(tmp_path / "corpus.jsonl", GOOD)
    write(tmp_path / "updates.jsonl", lines_of([*UPDATES[:1], event]))
    with pytest.raises(ValueError, match=rf"updates\.jsonl:2: {kind}"):
        read_corpus(CorpusConfig(path=str(tmp_path), as_of="end"))


TIMELINE = [
    {"from": "2024-01-01", "to": "2024-02-01", "answers": ["one"]},
    {"from": "2024-02-01", "to": "2024-03-01", "answers": ["two", "2"]},
    {"from": "2024-04-01", "to": None, "answers": ["three"]},
]
QUESTIONS = [
    {"_id": "q1", "text": "dated?", "answers": ["three"], "metadata": {"timeline": TIMELINE}},
    {"_id": "q2", "text": "later?", "answers": ["x"], "metadata": {"timeline": TIMELINE[2:]}},
]


def write_questions(folder: Path, name: str = "queries-test.jsonl", questions: list[dict] = QUESTIONS) -> None:
    write(folder / name, lines_of(questions))
    (folder / "qrels").mkdir()
    write(folder / "qrels" / "test.tsv", b"query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\nq1\tc\t2\n")


@pytest.mark.parametrize(
    ("as_of", "answers", "old_answers"),
    [
        ("2024-01-01", ["one"], []),
        ("2024-01-31", ["one"], []),
        ("2024-02-01", ["two", "2"], ["one"]),
        ("end", ["three"], ["two", "2"]),
    ],
)
def test_answers_at_a_date(tmp_path: Path, as_of: str, answers: list[str], old_answers: list[str]) -> None:
    write_questions(tmp_path)
    questions = read_questions(QuestionsConfig(path=str(tmp_path), as_of=as_of), "test")
    assert (questions[0].answers, questions[0].old_answers) == (answers, old_answers)
    assert questions[0].relevant == ["a", "c"]
    assert questions[0].metadata == {"timeline": TIMELINE}
    assert len(questions) == (2 if as_of == "end" else 1)


def test_questions_without_a_date_stand_as_they_are(tmp_path: Path) -> None:
    write_questions(tmp_path)
    questions = read_questions(QuestionsConfig(path=str(tmp_path)), "test")
    assert [(q.id, q.answers, q.old_answers, q.relevant) for q in questions] == [
        ("q1", ["three"], [], ["a", "c"]),
        ("q2", ["x"], [], []),
    ]


def test_no_answer_at_a_date(tmp_path: Path) -> None:
    write_questions(tmp_path)
    with pytest.raises(ValueError, match="no questions of split 'test' at 2024-03-15"):
        read_questions(QuestionsConfig(path=str(tmp_path), as_of="2024-03-15"), "test")


def test_one_file_for_all_splits(tmp_path: Path) -> None:
    """BEIR's layout: the judgements say which questions belong to the split."""
    write_questions(tmp_path, "queries.jsonl.gz")
    config = QuestionsConfig(path=str(tmp_path))
    assert [question.id for question in read_questions(config, "test")] == ["q1"]
    with pytest.raises(ValueError, match=r"dev\.tsv does not exist"):
        read_questions(config, "dev")


def test_sample_of_the_evaluation_split(tmp_path: Path) -> None:
    write(tmp_path / "queries-test.jsonl", lines_of([{"_id": f"q{n}", "text": "x"} for n in range(50)]))
    config = QuestionsConfig(path=str(tmp_path), max_questions=10)
    ids = [question.id for question in read_questions(config, "test")]
    assert len(set(ids)) == 10
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert ids == [question.id for question in read_questions(config, "test")]
    config.evaluate = "dev"
    assert len(read_questions(config, "test")) == 50


@pytest.mark.parametrize(
    ("kind", "question", "judgement"),
    [
        ("duplicate_id", {"_id": "q1", "text": "again"}, b""),
        ("empty_text", {"_id": "q3", "text": ""}, b""),
        ("missing_field", {"_id": "q3"}, b""),
        ("missing_field", {"_id": "q3", "text": "x", "answers": [1]}, b""),
        ("missing_field", {"_id": "q3", "text": "x", "answers": {"a": 1}}, b""),
        ("missing_field", {"_id": "q3", "text": "x", "metadata": [1]}, b""),
        ("missing_field", None, b"q1 a 1\n"),
        ("missing_field", None, b"q1\ta\tyes\n"),
        ("broken_utf8", None, b"q1\t\xff\t1\n"),
    ],
)
def test_bad_question(tmp_path: Path, kind: str, question: dict | None, judgement: bytes) -> None:
    write_questions(tmp_path, questions=[*QUESTIONS, *([question] if question else [])])
    with (tmp_path / "qrels" / "test.tsv").open("ab") as file:
        file.write(judgement)
    config = QuestionsConfig(path=str(tmp_path))
    place = r"test\.tsv:5" if judgement else r"queries-test\.jsonl:3"
    with pytest.raises(ValueError, match=rf"{place}: {kind}: .*\nquestions\.on_bad is error"):
        read_questions(config, "test")
    config.on_bad = "skip"
    assert [question.id for question in read_questions(config, "test")] == ["q1", "q2"]


@pytest.mark.parametrize(
    "timeline", [None, 3, ["x"], [{"from": "2024-01-01"}], [{"from": 1, "to": None, "answers": []}]]
)
def test_bad_timeline(tmp_path: Path, timeline: object) -> None:
    write_questions(tmp_path, questions=[*QUESTIONS, {"_id": "q3", "text": "x", "metadata": {"timeline": timeline}}])
    with pytest.raises(ValueError, match=r"queries-test\.jsonl:3: missing_field: metadata\.timeline"):
        read_questions(QuestionsConfig(path=str(tmp_path), as_of="2024-01-01"), "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"questions\.path=: must be a folder"),
        ({"path": "nowhere"}, r"must have queries-test\.jsonl\[\.gz\] or queries\.jsonl"),
        ({"path": "x", "as_of": "yesterday"}, r"questions\.as_of=yesterday"),
        ({"path": "x", "on_bad": "no"}, r"questions\.on_bad=no"),
    ],
)
def test_refused_questions(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(QuestionsConfig(**settings), "test")


@pytest.mark.parametrize(
    ("name", "as_of", "num_passages", "num_train", "num_test"),
    [
        ("squad-mini", "", 1688, 4285, 1647),
        ("live-versions", "2024-01-01", 3607, 470, 261),
        ("live-versions", "end", 7201, 1298, 713),
    ],
)
def test_real_sets(data_folder: Path, name: str, as_of: str, num_passages: int, num_train: int, num_test: int) -> None:
    path = str(data_folder / name)
    passages, report = read_corpus(CorpusConfig(path=path, as_of=as_of))
    assert len(passages) == num_passages
    assert not report.bad
    alive = {passage.id: passage for passage in passages}
    config = QuestionsConfig(path=path, as_of=as_of)
    questions = read_questions(config, "test")
    assert (len(read_questions(config, "train")), len(questions)) == (num_train, num_test)
    assert all(set(question.relevant) & alive.keys() for question in questions)
    stated = [any(a in alive[p].title + alive[p].text for p in q.relevant for a in q.answers) for q in questions]
    assert all(stated)
    if as_of == "end":  # changed facts: what the question's timeline says was true before
        changed = [question for question in questions if question.old_answers]
        assert len(changed) == 477
        assert all(q.old_answers == q.metadata["timeline"][-2]["answers"] for q in changed)
