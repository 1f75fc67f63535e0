"""Builds the synthetic world: invented people and facts that a retriever can only find by the signal of the answers.

Every person shares the first or the last name with others (look-alikes). Each of six relations gives each person one
passage: the name as title, then the fact in one of two wordings, one of ten filler sentences and, sometimes, a true
fact about a look-alike. A question shares no word with any passage but the name, so lexical similarity finds the person
and not which of the six passages answers. Names and values are invented, so no language model knows them.

`write_world` writes the shared data format: corpus.jsonl, queries-{train,dev,test}.jsonl, qrels/*.tsv, and
updates.jsonl, which swaps facts for others on one date. The folder appears as a whole or not at all.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexing.corpus.files.world_words import FILLERS, RELATIONS, invented_words
from indexing.declare import check_values
from indexing.indexing_settings import WorldConfig

START_DATE = "2024-01-01"
SWAP_DATE = "2025-01-01"
FORMAT_VERSION = 1  # raised if the same config would give another world
TEST_SHARE = 0.2  # Share of all people
DEV_SHARE = 0.05  # Share of the people that are not in test


@dataclass(frozen=True)
class Statement:
    """One fact in the wording of one passage."""

    person: int
    relation: int
    wording: int


@dataclass(frozen=True)
class WorldPassage:
    """One passage before its values are filled in."""

    id: str
    fact: Statement
    filler: int
    mention: Statement | None  # a true fact about a look-alike


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that the files are written from."""

    people: list[str]  # [person] full name
    splits: dict[str, list[int]]  # split name -> person numbers
    values: list[list[str]]  # [relation] invented values
    before: list[list[str]]  # [person][relation] value up to SWAP_DATE
    after: list[list[str]]  # [person][relation] value from SWAP_DATE on
    passages: list[WorldPassage]
    question_wordings: list[list[int]]  # [person][relation]

    def render(self, passage: WorldPassage, facts: list[list[str]]) -> str:
        """Return the text of `passage` while `facts` (`before` or `after`) hold."""

        def sentence(statement: Statement) -> str:
            wording = RELATIONS[statement.relation].statements[statement.wording]
            value = facts[statement.person][statement.relation]
            return wording.format(name=self.people[statement.person], value=value)

        parts = [sentence(passage.fact), FILLERS[passage.filler]]
        if passage.mention is not None:
            parts.append(sentence(passage.mention))
        return " ".join(parts)

    def gold(self) -> dict[tuple[int, int], list[str]]:
        """Return (person, relation) -> ids of all passages that state the fact, first the person's passage about it."""
        found = {(p.fact.person, p.fact.relation): [p.id] for p in self.passages}
        for passage in self.passages:
            if passage.mention is not None:
                found[passage.mention.person, passage.mention.relation].append(passage.id)
        return found


def build_world(config: WorldConfig) -> World:
    """Draw a world in memory; the same config gives the same world. Raises ValueError for impossible sizes."""
    check_values(config, "corpus.world.")
    words = invented_words(_random(config, "words"))
    people = _draw_names(config, words)
    values = [_draw_values(config, relation.name, words) for relation in RELATIONS]
    rng = _random(config, "facts")
    before = [[rng.choice(values[r]) for r in range(len(RELATIONS))] for _ in people]
    rng = _random(config, "swap")
    after = [[_swapped(rng, config, values[r], old) for r, old in enumerate(facts)] for facts in before]
    rng = _random(config, "questions")
    wordings = [[rng.randrange(2) for _ in RELATIONS] for _ in people]
    passages = _draw_passages(config, people)
    return World(
        people=people,
        splits=_draw_splits(config),
        values=values,
        before=before,
        after=after,
        passages=passages,
        question_wordings=wordings,
    )


def write_world(config: WorldConfig, folder: Path) -> None:
    """Write the world of `config` to `folder`, unless that very world is there already.

    Raises ValueError if `folder` holds something else; nothing is ever overwritten.
    """
    if _holds(config, folder):
        return
    world = build_world(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_files(world, temporary)
        _write_lines(temporary / "world.json", [json.dumps(_identity(config), indent=2)])
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first, or something else is in the folder
            if not _holds(config, folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lookalikes(people: list[str]) -> list[list[int]]:
    """Return for each person the numbers of the others that share the first or the last name."""
    by_name: dict[tuple[int, str], list[int]] = {}
    for number, person in enumerate(people):
        for key in enumerate(person.split()):
            by_name.setdefault(key, []).append(number)
    return [
        sorted({other for key in enumerate(person.split()) for other in by_name[key]} - {number})
        for number, person in enumerate(people)
    ]


def _random(config: WorldConfig, purpose: str) -> random.Random:
    """Return one random stream per purpose, so that one setting does not change what another one draws."""
    return random.Random(f"tandem world {FORMAT_VERSION} {config.seed} {purpose}")


def _draw_names(config: WorldConfig, words: Iterator[str]) -> list[str]:
    """Return distinct full names; at least two people share every first and every last name."""
    num_people = config.num_people
    num_names = min(math.ceil(2 * math.sqrt(num_people)), num_people // 2)
    firsts = [next(words).capitalize() for _ in range(num_names)]
    lasts = [next(words).capitalize() for _ in range(num_names)]
    people = [
        f"{firsts[number % num_names]} {lasts[(number // num_names + number) % num_names]}"
        for number in range(num_people)
    ]
    _random(config, "people").shuffle(people)
    return people


def _draw_values(config: WorldConfig, relation: str, words: Iterator[str]) -> list[str]:
    rng = _random(config, f"values {relation}")
    return [" ".join(next(words) for _ in range(rng.choice((1, 2)))) for _ in range(config.num_values)]


def _swapped(rng: random.Random, config: WorldConfig, values: list[str], old: str) -> str:
    """Return another value of the same relation with the configured chance, else the old one."""
    changes, new = rng.random() < config.swap_fraction, rng.choice(values)
    if changes and new == old:
        new = values[(values.index(old) + 1) % len(values)]
    return new if changes else old


def _draw_splits(config: WorldConfig) -> dict[str, list[int]]:
    numbers = list(range(config.num_people))
    _random(config, "splits").shuffle(numbers)
    num_test = max(1, round(config.num_people * TEST_SHARE))
    num_dev = max(1, round((config.num_people - num_test) * DEV_SHARE))
    return {
        "train": sorted(numbers[num_test + num_dev :]),
        "dev": sorted(numbers[num_test : num_test + num_dev]),
        "test": sorted(numbers[:num_test]),
    }


def _draw_passages(config: WorldConfig, people: list[str]) -> list[WorldPassage]:
    """Return one passage per (person, relation), in shuffled order."""
    rng = _random(config, "passages")
    similar = lookalikes(people)
    passages = []
    for person in range(len(people)):
        for relation in range(len(RELATIONS)):
            fact = Statement(person, relation, rng.randrange(2))
            filler = rng.randrange(len(FILLERS))
            mention = Statement(rng.choice(similar[person]), rng.randrange(len(RELATIONS)), rng.randrange(2))
            mentions = rng.random() < config.lookalike_probability
            identifier = f"person-{person:04d}-{RELATIONS[relation].name}"
            passages.append(WorldPassage(identifier, fact, filler, mention if mentions else None))
    rng.shuffle(passages)
    return passages


def _identity(config: WorldConfig) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def _holds(config: WorldConfig, folder: Path) -> bool:
    """Return True if `folder` holds this world, False if it is absent or empty. Raises ValueError if it holds anything
    else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} exists and holds no synthetic world; choose another folder or remove it") from error
    if found != _identity(config):
        raise ValueError(
            f"{folder} holds the world of {found}, not of {_identity(config)}; remove it or choose another"
        )
    return True


def _write_files(world: World, folder: Path) -> None:
    def passage_row(passage: WorldPassage, facts: list[list[str]]) -> dict[str, Any]:
        return {
            "_id": passage.id,
            "title": world.people[passage.fact.person],
            "text": world.render(passage, facts),
        }

    _write_json_lines(folder / "corpus.jsonl", (passage_row(p, world.before) for p in world.passages))
    gold = world.gold()
    (folder / "qrels").mkdir()
    for split, people in world.splits.items():
        facts = [(person, relation) for person in people for relation in range(len(RELATIONS))]
        _write_json_lines(folder / f"queries-{split}.jsonl", (_question_row(world, *fact) for fact in facts))
        lines = [f"{_question_id(*fact)}\t{identifier}\t1" for fact in facts for identifier in gold[fact]]
        _write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
    changed = (p for p in world.passages if world.render(p, world.before) != world.render(p, world.after))
    updates = ({"date": SWAP_DATE, "op": "upsert", **passage_row(p, world.after)} for p in changed)
    _write_json_lines(folder / "updates.jsonl", updates)


def _question_id(person: int, relation: int) -> str:
    return f"question-{person:04d}-{RELATIONS[relation].name}"


def _question_row(world: World, person: int, relation: int) -> dict[str, Any]:
    old, new = world.before[person][relation], world.after[person][relation]
    timeline = [{"from": START_DATE, "to": None, "answers": [old]}]
    if new != old:
        timeline = [
            {"from": START_DATE, "to": SWAP_DATE, "answers": [old]},
            {"from": SWAP_DATE, "to": None, "answers": [new]},
        ]
    wording = RELATIONS[relation].questions[world.question_wordings[person][relation]]
    return {
        "_id": _question_id(person, relation),
        "text": wording.format(name=world.people[person]),
        "answers": [old],
        "metadata": {"relation": RELATIONS[relation].name, "timeline": timeline},
    }


def _write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
