"""Reads passages and questions from files, and validates each line before anything is built from it.

A bad line is counted under one of `BAD_KINDS`, reported with file and line, and refused or skipped, as `on_bad` says.
Only the ids read so far and the updates are kept in memory, so a corpus of millions of passages streams through.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from indexing.corpus.files.formats import Question, parse_question
from indexing.corpus.files.lines import BadLine, find_file, id_field, metadata_field, read_lines, text_field
from indexing.declare import check_values, is_date, looked_at, refuse
from indexing.indexing_settings import CorpusConfig, QuestionsConfig

BAD_KINDS = (
    "not_json",
    "broken_utf8",
    "duplicate_id",
    "empty_text",
    "oversized_text",
    "missing_field",
    "equal_answers",
)
MAX_EXAMPLES = 20
SAMPLE_SEED = 0  # seed of the sample of `questions.max_questions`: the same questions in every run

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Passage:
    """The unit of retrieval."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)  # field -> value; filters select by it


@dataclass
class CorpusReport:
    """Counts of the lines that a reader read; complete when it has read the last one."""

    num_read: int = 0  # Number of lines read: passages or questions, and updates
    num_kept: int = 0  # Number of good lines among them
    bad: dict[str, int] = field(default_factory=Counter)  # kind -> number of bad lines
    examples: list[str] = field(default_factory=list)  # the first bad lines as "file:line: why"

    def add(self, place: str, bad: BadLine) -> None:
        """Count a bad line."""
        self.bad[bad.kind] = self.bad.get(bad.kind, 0) + 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {bad.kind}: {bad.why}")

    def summary(self) -> str:
        """Return the counts on one line, then one line per example."""
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.bad.items())) or "none"
        head = f"{self.num_read} lines read, {self.num_kept} good, {sum(self.bad.values())} bad: {counts}"
        return "\n  ".join([head, *self.examples])


def read_corpus(config: CorpusConfig) -> tuple[list[Passage], CorpusReport]:
    """Return all passages, with the updates up to `as_of` applied, and the report.

    Raises ValueError for a wrong setting, for bad lines unless `on_bad` is skip, and for a corpus without passages.
    """
    passages, report = iterate_corpus(config)
    return list(passages), report


def iterate_corpus(config: CorpusConfig) -> tuple[Iterator[Passage], CorpusReport]:
    """Stream what `read_corpus` returns. The report fills as passages are taken; bad lines are refused after the last
    one."""
    corpus, updates = corpus_path(config), updates_path(config)
    report = CorpusReport()

    def stream() -> Iterator[Passage]:
        num_passages = 0
        for passage in _updated(config, corpus, updates, report):
            num_passages += 1
            yield passage
        _refuse_bad(report, "corpus.on_bad", config.on_bad)
        if not num_passages:
            raise refuse("corpus.path", config.path, "must have passages, but is empty")

    return stream(), report


def read_passages(source: Path | Sequence[Mapping[str, Any]], max_characters: int) -> list[Passage]:
    """Return the passages of one .jsonl[.gz] or .parquet file, or of such lines as dictionaries. Raises ValueError with
    the first bad line and the number of the others."""
    report = CorpusReport()
    passages = list(_good(source, report, lambda fields: _passage(fields, max_characters), set()))
    if report.bad:
        more = sum(report.bad.values()) - 1
        raise ValueError(f"{report.examples[0]}{f' (and {more} more bad lines)' if more else ''}; nothing was changed")
    if not passages:
        raise ValueError(f"{source if isinstance(source, Path) else 'the list'} has no passages")
    return passages


def validate(config: CorpusConfig) -> CorpusReport:
    """Read every line, keep nothing, refuse nothing, and return the report."""
    report = CorpusReport()
    for _ in _updated(config, corpus_path(config), updates_path(config), report):
        pass
    return report


def read_questions(config: QuestionsConfig, split: str) -> list[Question]:
    """Return the questions of a split with their relevant passages; of the evaluation split at most `max_questions`.

    With `as_of`, `answers` are those of the timeline entry that covers the date and `old_answers` those of the entry
    before it; a question without such an entry is left out. Raises ValueError as `read_corpus` does.
    """
    check_values(config, "questions.")
    if not config.path:
        raise refuse("questions.path", "", "must be a folder with queries-SPLIT.jsonl[.gz]")
    folder = Path(config.path)
    path = find_file(folder, f"queries-{split}.jsonl")
    mixed = path is None  # BEIR has one file for all splits; the judgements tell which split a question belongs to
    path = path or find_file(folder, "queries.jsonl")
    if path is None:
        allowed = f"must have queries-{split}.jsonl[.gz] or queries.jsonl[.gz]{looked_at(config.path)}"
        raise refuse("questions.path", config.path, allowed)
    report = CorpusReport()
    relevant = _read_relevant(folder / "qrels" / f"{split}.tsv", mixed, report)

    def parse(fields: dict[str, Any]) -> Question:
        question = parse_question(fields, config.as_of, config.labels)
        return Question(**{**vars(question), "relevant": relevant.get(question.id, [])})

    questions = list(_good(path, report, parse, set()))
    _refuse_bad(report, "questions.on_bad", config.on_bad)
    if config.as_of:
        questions = [question for question in questions if question.answers]
    if mixed:
        questions = [question for question in questions if question.id in relevant]
    if not questions:
        raise ValueError(
            f"{path} has no questions of split {split!r}" + (f" at {config.as_of}" if config.as_of else "")
        )
    if split == config.evaluate and 0 < config.max_questions < len(questions):
        chosen = sorted(random.Random(SAMPLE_SEED).sample(range(len(questions)), config.max_questions))
        questions = [questions[index] for index in chosen]
    return questions


def _updated(config: CorpusConfig, corpus: Path, updates: Path | None, report: CorpusReport) -> Iterator[Passage]:
    """Yield the passages of the corpus, each in its last version, then the passages that updates add."""
    pending = {} if updates is None else _read_updates(updates, config, report)
    for passage in _good(corpus, report, lambda fields: _passage(fields, config.max_characters), set()):
        last = pending.pop(passage.id, passage)
        if last is not None:
            yield last
    yield from (passage for passage in pending.values() if passage is not None)


def _read_updates(path: Path, config: CorpusConfig, report: CorpusReport) -> dict[str, Passage | None]:
    """Return passage id -> its version at `as_of`, for updated passages; None if it was deleted."""

    def parse(fields: dict[str, Any]) -> tuple[str, str, Passage | None]:
        day, operation = fields.get("date"), fields.get("op")
        if not isinstance(day, str) or not is_date(day):
            raise BadLine("missing_field", f"date is {day!r}: needed is YYYY-MM-DD")
        match operation:
            case "upsert":
                passage = _passage(fields, config.max_characters)
                return day, passage.id, passage
            case "delete":
                return day, id_field(fields), None
        raise BadLine("missing_field", f"op is {operation!r}: allowed are upsert, delete")

    last_day: dict[str, str] = {}
    last: dict[str, Passage | None] = {}
    for day, passage_id, passage in _good(path, report, parse):
        if (config.as_of == "end" or day <= config.as_of) and last_day.get(passage_id, "") <= day:
            last_day[passage_id], last[passage_id] = day, passage
    return last


def _good(
    source: Path | Sequence[Mapping[str, Any]],
    report: CorpusReport,
    parse: Callable[[dict[str, Any]], Item],
    seen: set[str] | None = None,
) -> Iterator[Item]:
    """Yield the lines of a file or of a list that `parse` accepts. Bad lines go into the report; so does an id that is
    in `seen` already."""
    lines = read_lines(source) if isinstance(source, Path) else enumerate(map(dict, source), start=1)
    for number, content in lines:
        report.num_read += 1
        try:
            if isinstance(content, BadLine):
                raise content
            item = parse(content)
            if seen is not None:
                item_id = id_field(content)
                if item_id in seen:
                    raise BadLine("duplicate_id", f"id {item_id!r} was there before")
                seen.add(item_id)
        except BadLine as bad:
            report.add(f"{source}:{number}" if isinstance(source, Path) else f"passage {number}", bad)
            continue
        report.num_kept += 1
        yield item


def _passage(fields: dict[str, Any], max_characters: int) -> Passage:
    title, text = text_field(fields, "title", default=""), text_field(fields, "text")
    passage = Passage(id_field(fields), title, text, metadata_field(fields))
    if not passage.text.strip():
        raise BadLine("empty_text", f"passage {passage.id!r} has no text")
    length = len(passage.title) + len(passage.text)
    if length > max_characters:
        raise BadLine("oversized_text", f"passage {passage.id!r} has {length} characters: allowed are {max_characters}")
    return passage


def _read_relevant(path: Path, required: bool, report: CorpusReport) -> dict[str, list[str]]:
    """Return question id -> passage ids from a file of judgements: question, passage and score, separated by tabs."""
    if not path.is_file():
        if required:
            raise ValueError(f"{path} does not exist: queries.jsonl[.gz] needs it to know the questions of the split")
        return {}
    relevant: dict[str, list[str]] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                question_id, passage_id, score = raw.decode().rstrip("\r\n").split("\t")
                if number == 1 and score == "score":
                    continue
                if float(score) > 0:
                    relevant.setdefault(question_id, []).append(passage_id)
            except UnicodeDecodeError:
                report.add(f"{path}:{number}", BadLine("broken_utf8", "the line is no UTF-8"))
            except ValueError:
                why = "needed are question id, passage id and a number, separated by tabs"
                report.add(f"{path}:{number}", BadLine("missing_field", why))
    return relevant


def corpus_path(config: CorpusConfig) -> Path:
    """Return the file of the corpus. Raises ValueError if there is none."""
    check_values(config, "corpus.")
    path = Path(config.path)
    if config.path and (config.format == "beir" or (config.format == "auto" and path.is_dir())):
        found = find_file(path, "corpus.jsonl")
        if found is None:
            allowed = f"must be a folder with corpus.jsonl[.gz]{looked_at(config.path)}"
            raise refuse("corpus.path", config.path, allowed)
        return found
    endings = {"auto": (".jsonl", ".jsonl.gz", ".parquet"), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}
    if not path.is_file():
        allowed = f"must be a BEIR folder, or a .jsonl[.gz] or .parquet file, that exists{looked_at(config.path)}"
        raise refuse("corpus.path", config.path, allowed)
    if not path.name.endswith(endings[config.format]):
        allowed = f"must end in {' or '.join(endings[config.format])} with corpus.format={config.format}"
        raise refuse("corpus.path", config.path, allowed)
    return path


def updates_path(config: CorpusConfig) -> Path | None:
    """Return the file of the corpus's dated updates, or None if no update applies. Raises ValueError if the file is
    missing."""
    if not config.as_of:
        return None
    if config.updates:
        path = Path(config.updates)
        if not path.is_file():
            allowed = f"must be a file that exists{looked_at(config.updates)}"
            raise refuse("corpus.updates", config.updates, allowed)
        return path
    corpus = Path(config.path)
    path = find_file(corpus if corpus.is_dir() else corpus.parent, "updates.jsonl")
    if path is None:
        allowed = f"must be empty, since there is no updates.jsonl[.gz] beside {config.path}"
        raise refuse("corpus.as_of", config.as_of, allowed)
    return path


def _refuse_bad(report: CorpusReport, name: str, on_bad: str) -> None:
    if not report.bad:
        return
    if on_bad == "error":
        raise ValueError(f"{report.summary()}\n{name} is error: set it to skip to leave these lines out")
    log.warning("%s", report.summary())
