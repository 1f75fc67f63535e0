"""The synthetic world: its promises about words, golds, splits and swapped facts, and its files."""

import json
import math
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from indexing.corpus.files.world import SWAP_DATE, World, build_world, lookalikes, write_world
from indexing.corpus.files.world_words import FILLERS, RELATIONS, template_words
from indexing.indexing_settings import WorldConfig

SMALL = WorldConfig(num_people=40, num_values=30, seed=3)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def full() -> World:
    return build_world(WorldConfig())


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    write_world(SMALL, tmp_path / "world")
    return tmp_path / "world"


def test_sizes_of_the_full_world(full: World) -> None:
    assert len(full.people) == len(set(full.people)) == 900
    assert len(full.passages) == len({p.id for p in full.passages}) == 5400
    assert {split: len(people) for split, people in full.splits.items()} == {"train": 684, "dev": 36, "test": 180}
    assert len({person for people in full.splits.values() for person in people}) == 900
    share = sum(p.mention is not None for p in full.passages) / 5400
    assert abs(share - 0.4) < 0.03


def test_every_person_has_lookalikes(full: World) -> None:
    for person, others in zip(full.people, lookalikes(full.people), strict=True):
        first, last = person.split()
        assert {o for o in others if full.people[o].startswith(f"{first} ")}
        assert {o for o in others if full.people[o].endswith(f" {last}")}
        assert all(person != full.people[other] for other in others)


def test_mentions_are_true_facts_about_lookalikes(full: World) -> None:
    similar = lookalikes(full.people)
    for passage in full.passages:
        if passage.mention is not None:
            person, relation = passage.mention.person, passage.mention.relation
            assert person in similar[passage.fact.person]
            text = full.render(passage, full.before)
            assert full.people[person] in text
            assert full.before[person][relation] in text


def test_questions_share_no_word_with_passages_but_the_name() -> None:
    passages = {word for text in FILLERS for word in words(text)}
    for relation in RELATIONS:
        passages |= {word for text in relation.statements for word in words(text)}
    questions = {word for relation in RELATIONS for text in relation.questions for word in words(text)}
    assert passages & questions == {"name"}


def test_invented_words_are_unique(full: World) -> None:
    names = {word.lower() for person in full.people for word in person.split()}
    in_values = [word for values in full.values for value in values for word in value.split()]
    assert len(in_values) == len(set(in_values))
    assert not names & set(in_values)
    assert not (names | set(in_values)) & template_words()
    assert [len(values) for values in full.values] == [200] * 6
    assert {len(value.split()) for values in full.values for value in values} == {1, 2}


def test_gold_is_every_passage_that_states_the_fact(full: World) -> None:
    gold = full.gold()
    texts = {p.id: full.render(p, full.before) for p in full.passages}
    assert len(gold) == 5400
    for (person, relation), ids in list(gold.items())[::50]:
        sentences = [
            s.format(name=full.people[person], value=full.before[person][relation])
            for s in RELATIONS[relation].statements
        ]
        expected = {i for i, text in texts.items() if any(sentence in text for sentence in sentences)}
        assert set(ids) == expected


def test_lexical_search_finds_the_person_and_not_the_passage(full: World) -> None:
    """BM25 over title and text: almost all gold passages within 20, the first one right about once in six."""
    documents = [words(f"{full.people[p.fact.person]} {full.render(p, full.before)}") for p in full.passages]
    identifiers = [p.id for p in full.passages]
    gold = full.gold()
    postings: dict[str, dict[int, int]] = {}
    for number, document in enumerate(documents):
        for word, count in Counter(document).items():
            postings.setdefault(word, {})[number] = count
    average = sum(map(len, documents)) / len(documents)
    found, first, asked = 0.0, 0, 0
    for person in full.splits["test"]:
        for relation in range(len(RELATIONS)):
            question = RELATIONS[relation].questions[full.question_wordings[person][relation]]
            scores: Counter[int] = Counter()
            for word in words(question.format(name=full.people[person])):
                matches = postings.get(word, {})
                rarity = math.log(1 + (len(documents) - len(matches) + 0.5) / (len(matches) + 0.5))
                for number, count in matches.items():
                    length = 0.25 + 0.75 * len(documents[number]) / average
                    scores[number] += rarity * count * 2.2 / (count + 1.2 * length)  # type: ignore[assignment]
            best = [identifiers[number] for number, _ in scores.most_common(20)]
            relevant = gold[person, relation]
            found += len(set(best) & set(relevant)) / len(relevant)
            first += best[0] in relevant
            asked += 1
    assert asked == 1080
    assert found / asked > 0.9
    assert 0.1 < first / asked < 0.25


def test_swap_changes_every_fact_consistently(small_folder: Path) -> None:
    world = build_world(SMALL)
    corpus = {row["_id"]: row for row in rows(small_folder / "corpus.jsonl")}
    updates = rows(small_folder / "updates.jsonl")
    assert len(updates) == len(corpus) == 240
    assert {(row["date"], row["op"]) for row in updates} == {(SWAP_DATE, "upsert")}
    after = {row["_id"]: row["text"] for row in updates}
    qrels = [line.split("\t") for line in (small_folder / "qrels/test.tsv").read_text().splitlines()]
    assert qrels[0] == ["query-id", "corpus-id", "score"]
    for row in rows(small_folder / "queries-test.jsonl"):
        old, new = (entry["answers"][0] for entry in row["metadata"]["timeline"])
        assert row["answers"] == [old] != [new]
        relation = next(i for i, r in enumerate(RELATIONS) if r.name == row["metadata"]["relation"])
        assert {old, new} <= set(world.values[relation])
        assert [(e["from"], e["to"]) for e in row["metadata"]["timeline"]] == [
            ("2024-01-01", "2025-01-01"),
            ("2025-01-01", None),
        ]
        gold = [line[1] for line in qrels if line[0] == row["_id"]]
        assert gold
        for identifier in gold:
            assert f" {old}" in corpus[identifier]["text"]
            assert f" {new}" in after[identifier]


def test_partial_swap_leaves_the_rest_alone(tmp_path: Path) -> None:
    config = WorldConfig(num_people=40, num_values=30, seed=3, swap_fraction=0.25)
    write_world(config, tmp_path / "world")
    questions = [
        row for split in ("train", "dev", "test") for row in rows(tmp_path / "world" / f"queries-{split}.jsonl")
    ]
    changed = [row for row in questions if len(row["metadata"]["timeline"]) == 2]
    assert 0.1 < len(changed) / len(questions) < 0.4
    assert len(rows(tmp_path / "world/updates.jsonl")) < 200
    assert build_world(config).before == build_world(SMALL).before


def test_same_config_same_bytes_and_other_seed_other_world(tmp_path: Path, small_folder: Path) -> None:
    write_world(SMALL, tmp_path / "again")
    write_world(WorldConfig(num_people=40, num_values=30, seed=4), tmp_path / "other")
    names = sorted(str(p.relative_to(small_folder)) for p in small_folder.rglob("*") if p.is_file())
    assert names == [
        "corpus.jsonl",
        "qrels/dev.tsv",
        "qrels/test.tsv",
        "qrels/train.tsv",
        "queries-dev.jsonl",
        "queries-test.jsonl",
        "queries-train.jsonl",
        "updates.jsonl",
        "world.json",
    ]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (small_folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (small_folder / name).read_bytes()


def test_a_folder_is_reused_and_never_overwritten(tmp_path: Path, small_folder: Path) -> None:
    (small_folder / "corpus.jsonl").write_text("marked\n")
    write_world(SMALL, small_folder)
    assert (small_folder / "corpus.jsonl").read_text() == "marked\n"
    with pytest.raises(ValueError, match="holds the world of"):
        write_world(WorldConfig(num_people=41, num_values=30, seed=3), small_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no synthetic world"):
        write_world(SMALL, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "world"]


def test_two_writers_at_once_leave_one_whole_world(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def write() -> None:
        try:
            write_world(SMALL, tmp_path / "world")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == ["world"]
    assert len(rows(tmp_path / "world/corpus.jsonl")) == 240


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WorldConfig(num_people=9), "num_people=9: must be at least 10"),
        (WorldConfig(num_values=1), "num_values=1: must be between 2 and 20000"),
        (WorldConfig(lookalike_probability=1.5), "lookalike_probability=1.5: must be between 0 and 1"),
        (WorldConfig(swap_fraction=-0.1), "swap_fraction=-0.1: must be between 0 and 1"),
    ],
)
def test_impossible_sizes_are_refused(config: WorldConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_world(config)
