"""From files to memory-mapped stores: validate, tokenise once with both tokenisers, write once.

    <run>/world/                     the synthetic world, where no corpus is named
    <run>/tokenizers/{retriever,generator}/
    <run>/data/<key>/{passages,questions-SPLIT,duplicates-THRESHOLD}/     key: hash of everything that these depend on
    <run>/data/<key>/preferences-.../                judged answers (`cluster/prepare/preference_stores.py`)
    <run>/data/<key>/lexical-.../                    BM25 over the passages (`indexing/lexical/lexical.py`)

What is there and fits is used again; a corpus file that changed has another key.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.experiment import load
from cluster.config.settings import Settings
from cluster.prepare.preference_stores import prepare_preferences
from cluster.prepare.recorded_stores import recorded_stores
from indexing.corpus.files.corpus import CorpusReport, Passage, Question, iterate_corpus, read_questions
from indexing.corpus.files.world import write_world
from indexing.corpus.snapshot import is_complete
from indexing.corpus.stores.duplicates import write_groups
from indexing.corpus.stores.passages import Store, TokenSide, write_store
from indexing.corpus.stores.questions import QuestionStore, write_questions
from indexing.declare import looked_at, refuse
from indexing.lexical.lexical import lexical_name, write_lexical
from training.feeding.mixture import pretrains
from training.models.retriever.reranker import has_tokenizer
from training.models.text.tokenizers import build_tokenizer
from training.objectives.dispatch import needs
from training.run_text import RunText
from training.training_settings import PREFERENCE, TokenizerConfig

Say = Callable[[str], None]
REPORT_EVERY_S = 5.0  # Seconds between two lines of progress
SECTIONS = {"retriever": "encoder", "generator": "generator", "reranker": "reranker"}  # tokeniser folder: settings


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Folders with the data of a stage."""

    passages: Path
    questions: dict[str, Path]  # by split
    tokenizers: Path  # holds retriever/ and generator/
    duplicates: Path | None = None  # groups of near-duplicates, of a stage that pretrains on the corpus
    preferences: dict[str, Path] = field(default_factory=dict)  # `train`, `evaluate`: where there are any
    lexical: Path | None = None  # index of the passages' words, where retrieval.hybrid asks for one


def prepare_data(settings: Settings, root: Path, say: Say, splits: Iterable[str] | None = None) -> Prepared:
    """Write what is not there yet. Raises ValueError for bad settings and, with `on_bad: error`, for bad lines."""
    settings = with_corpus(settings, root, say)
    questions = settings.questions
    wanted = splits
    if wanted is None:  # preference objectives learn from preferences instead
        train = () if settings.objective.name in PREFERENCE else (questions.train,)
        wanted = (*train, questions.evaluate)
    wanted = [split for split in dict.fromkeys(wanted) if split]
    text = prepare_tokenizers(settings, root, say)
    folder = _data_folder(settings, root, text)
    passages = _prepare_passages(settings, folder / "passages", text, say)
    store = Store.open(passages, verify=False)
    paths = {split: folder / f"questions-{split}" for split in wanted}
    for split, path in paths.items():
        if not is_complete(path):
            _prepare_questions(settings, split, path=path, store=store, text=text, say=say)
    _check_answers(settings, paths)
    duplicates = _prepare_duplicates(settings, folder, store, say) if pretrains(settings.pretraining) else None
    preferences = {}
    if wanted:
        preferences = prepare_preferences(settings, folder, store=store, text=text, train=splits is None, say=say)
    lexical = _prepare_lexical(settings, folder, store, say) if settings.retrieval.hybrid != "none" else None
    return Prepared(
        passages=passages,
        questions=paths,
        tokenizers=root / "tokenizers",
        duplicates=duplicates,
        preferences=preferences,
        lexical=lexical,
    )


def with_corpus(settings: Settings, root: Path, say: Say) -> Settings:
    """Return the settings with paths filled in; generate the synthetic world if no corpus is named."""
    corpus, questions = settings.corpus, settings.questions
    if not corpus.path:
        world = root / "world"
        if not world.exists():
            say(f"generating the synthetic world in {world}")
        write_world(corpus.world, world)
        corpus = replace(corpus, path=str(world))
    if not questions.path:
        folder = Path(corpus.path)
        questions = replace(questions, path=str(folder if folder.is_dir() else folder.parent))
    preferences = settings.preferences
    if not preferences.path and settings.objective.name in PREFERENCE:
        folder = Path(corpus.path)
        preferences = replace(preferences, path=str(folder if folder.is_dir() else folder.parent))
    return replace(settings, corpus=corpus, questions=questions, preferences=preferences)


def prepare_tokenizers(settings: Settings, root: Path, say: Say) -> RunText:
    """Return how the run reads text. Its tokenisers, saved in `<root>/tokenizers`, are those that are there, else those
    of the checkpoint that it starts from, else those of the pretrained models, else trained on the corpus and the
    training questions."""
    folder = root / "tokenizers"
    start = _starting_tokenizers(settings)
    if start is not None and not folder.exists():
        shutil.copytree(start, folder)
    encoder, generator, reranker = settings.encoder, settings.generator, settings.reranker
    if has_tokenizer(reranker):
        _build_tokenizer(
            reranker.name,
            TokenizerConfig(),
            texts=iter(()),
            folder=folder,
            part="reranker",
            trust=reranker.trust_remote_code,
        )
    if start is not None:
        return RunText.load(settings, folder)

    def build(name: str, config: TokenizerConfig, part: str, trust: bool) -> None:
        if not name and not (folder / part / "tokenizer.json").is_file():
            say(f"training a tokeniser of {config.vocabulary} pieces for the {part}")
        _build_tokenizer(name, config, texts=_texts(settings), folder=folder, part=part, trust=trust)

    build(encoder.name, encoder.tokenizer, "retriever", encoder.trust_remote_code)
    if not encoder.name and not generator.name:  # both fresh: one vocabulary
        if not (folder / "generator").exists():
            shutil.copytree(folder / "retriever", folder / "generator")
    else:
        build(generator.name, generator.tokenizer, "generator", generator.trust_remote_code)
    return RunText.load(settings, folder)


def _build_tokenizer(
    name: str, config: TokenizerConfig, *, texts: Iterator[str], folder: Path, part: str, trust: bool
) -> None:
    try:
        build_tokenizer(name, config, texts=texts, save_dir=folder / part, trust_remote_code=trust)
    except ValueError as error:
        if name:
            raise refuse(f"{SECTIONS[part]}.name", name, f"must have a tokeniser: {error}") from None
        if str(error).startswith("tokenizer."):
            raise ValueError(f"{SECTIONS[part]}.{error}") from None
        raise


def _starting_tokenizers(settings: Settings) -> Path | None:
    """Tokenisers of the checkpoint that the run starts from, when it is of another run."""
    start = Path(settings.run.init_from) if settings.run.init_from else None
    if start is None or not start.is_dir():
        return None
    places = [start / "tokenizers", start.parent / "tokenizers", start.parent.parent / "tokenizers"]
    return next((place for place in places if (place / "retriever").is_dir()), None)


def _texts(settings: Settings) -> Iterator[str]:
    """Yield the texts that a fresh tokeniser is trained on."""
    passages, _ = iterate_corpus(settings.corpus)
    for passage in passages:
        yield f"{passage.title} {passage.text}"
    if settings.questions.train:
        for question in read_questions(settings.questions, settings.questions.train):
            yield question.text


def _prepare_passages(settings: Settings, path: Path, text: RunText, say: Say) -> Path:
    if is_complete(path):
        return path
    passages, report = iterate_corpus(settings.corpus)
    source = {"corpus": settings.corpus.path}
    store = write_store(path, _with_progress(passages, "passages", say), text.passage_sides, source)
    say(f"{len(store)} passages tokenised with both tokenisers into {path}")
    _tell_bad(report, settings.corpus.path, say)
    return path


def _prepare_questions(settings: Settings, split: str, *, path: Path, store: Store, text: RunText, say: Say) -> None:
    config = settings.questions
    questions = alive(read_questions(config, split), store, config.as_of)
    if split == config.evaluate and config.unanswerable:
        questions += read_questions(replace(config, evaluate=config.unanswerable, as_of=""), config.unanswerable)
    if not questions:
        raise ValueError(f"questions.path {settings.questions.path!r}: split {split!r} has no question to ask")
    written: QuestionStore = write_questions(
        path,
        questions,
        sides=text.question_sides,
        answer_side=text.answer_side,
        store=store,
        render=text.render,
        refusal=config.refusal,
    )
    say(f"{len(written)} questions of split {split} tokenised into {path}")


def _check_answers(settings: Settings, paths: dict[str, Path]) -> None:
    """Refuse to train on questions without an answer."""
    split = settings.questions.train
    contrastive, trains = needs(settings.objective).in_batch, settings.training.train != "none"
    if contrastive or not trains or pretrains(settings.pretraining) or split not in paths:
        return
    missing = QuestionStore.open(paths[split], verify=False).num_without_answer
    if missing:
        raise ValueError(
            f"questions.train={split}: {missing} questions have no answer to train on; leave them out, or set "
            "questions.refusal to what their answer shall be"
        )


def _prepare_duplicates(settings: Settings, folder: Path, store: Store, say: Say) -> Path:
    """Groups of near-duplicate passages, by what the generator reads of them."""
    threshold = settings.pretraining.duplicate_threshold
    path = folder / f"duplicates-{threshold:g}"
    if not is_complete(path):
        sizes = np.bincount(write_groups(path, store, "generator", threshold))
        joined, largest = int(sizes[sizes > 1].sum()), int(sizes.max())
        say(f"{joined} of {len(store)} passages have near-duplicates (the largest group has {largest}), see {path}")
    return path


def _prepare_lexical(settings: Settings, folder: Path, store: Store, say: Say) -> Path:
    """BM25 over titles and texts."""
    path = folder / lexical_name(settings.lexical, store.fingerprint)
    if not is_complete(path):
        begin = time.monotonic()
        index = write_lexical(settings.lexical, store, path)
        words = f"{len(index.postings.words)} words in {len(store)} passages"
        say(f"lexical index of {words} in {time.monotonic() - begin:.1f} s: {path}")
    return path


def alive(questions: list[Question], store: Store, as_of: str) -> list[Question]:
    """With `as_of`, without the questions none of whose passages exists at that date."""
    if not as_of:
        return questions
    return [q for q in questions if not q.relevant or any(store.row_of(id) is not None for id in q.relevant)]


def _with_progress(passages: Iterator[Passage], what: str, say: Say) -> Iterator[Passage]:
    begin = last = time.monotonic()
    for count, passage in enumerate(passages, start=1):
        yield passage
        now = time.monotonic()
        if now - last > REPORT_EVERY_S:
            last = now
            say(f"{count} {what} tokenised, {count / (now - begin):.0f}/s")


def _tell_bad(report: CorpusReport, path: str, say: Say) -> None:
    if sum(report.bad.values()):
        say(f"{path}: {report.summary()}")


def _data_folder(settings: Settings, root: Path, text: RunText) -> Path:
    """Return the folder of the stores that fit: by key; else, where the files that they were made from are gone or are
    a world of the run's own, the one that this run or the run that it starts from was started with."""
    passages, questions = text.passage_sides, text.question_sides
    ordered = (passages[0], questions[0], passages[1], questions[1], text.answer_side, *passages[2:], *questions[2:])
    prints = [side.fingerprint for side in ordered]
    world = root / "world"
    known = [root / "data" / _key(settings, prints, place) for place in (world, None)]  # None: as earlier versions did
    for folder in known:
        if folder.is_dir():
            return folder
    paths = {"corpus.path": settings.corpus.path, "questions.path": settings.questions.path}
    gone = [name for name, path in paths.items() if not Path(path).exists()]
    start = Path(settings.run.init_from)
    for run in (Path(settings.run.directory) / settings.run.name, *start.parents[1:2], start):
        found = recorded_stores(run) if gone or Path(settings.corpus.path) == world else None
        if found is not None and _is_of(found[0], settings, run, passages):
            return found[0].parent
    if gone:
        allowed = f"must exist, since {root / 'data'} has no store that was made of it for these settings"
        raise refuse(gone[0], paths[gone[0]], allowed + looked_at(paths[gone[0]]))
    return known[0]


def _is_of(passages: Path, settings: Settings, run: Path, sides: list[TokenSide]) -> bool:
    """Return true if a store was made of the corpus and the questions of `settings`, as config.yaml of the run folder
    `run` has them, with these tokenisers."""
    if not is_complete(passages) or not (run / "config.yaml").is_file():
        return False
    kept, recorded = Store.open(passages, verify=False).sides, load([str(run)], []).settings
    named = {path.name for path in map(Path, (settings.corpus.path, recorded.corpus.path)) if path.name}
    same = [(replace(one.corpus, path="", updates=""), replace(one.questions, path="")) for one in (settings, recorded)]
    return same[0] == same[1] and len(named) == 1 and kept == {side.name: side.fingerprint for side in sides}


def _key(settings: Settings, prints: list[str], world: Path | None) -> str:
    """Hash of settings, source files and tokenisers (`prints`) that the stores depend on, the same wherever the run
    lies: files in `world` follow from the settings, others go by their absolute paths."""
    generator = settings.generator
    prompt = (generator.system_prompt, generator.chat_template, generator.max_context_tokens)
    corpus, questions = asdict(settings.corpus), asdict(settings.questions)
    folders = {Path(settings.corpus.path), Path(settings.questions.path), Path(settings.corpus.updates or ".")}
    folders -= {Path(".")}
    if world is not None:
        folders = {folder.resolve() for folder in folders - {world}}
        for section in (corpus, questions):
            section["path"] = "" if Path(section["path"]) == world else str(Path(section["path"]).resolve())
    parts: list[Any] = [corpus, questions, prints, prompt]
    for folder in sorted(folders):
        files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
        parts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
