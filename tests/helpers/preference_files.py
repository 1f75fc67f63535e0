"""Preferences over the tiny world: the true answer of a question is chosen, that of another person rejected."""

import json
from pathlib import Path
from typing import Any

from indexing.corpus.files.preferences import read_preferences
from indexing.corpus.stores.questions import write_questions
from indexing.indexing_settings import PreferencesConfig
from tests.helpers.tiny_world import TinyWorld
from training.models.text import token_rows
from training.models.text.tokenizers import load_tokenizer


def preference_rows(world: TinyWorld, split: str) -> list[dict[str, Any]]:
    """A pair for each question: both answers are of the same relation, as lines of a preference file."""
    store = world.question_store(split)
    questions = [store.question(number) for number in range(len(store))]
    rows = []
    for number, question in enumerate(questions):
        others = [q for q in questions if q.text.split()[:3] == question.text.split()[:3]]
        rejected = next((q.answers[0] for q in others if q.answers[0] != question.answers[0]), "nothing of the kind")
        rows.append(
            {
                "_id": f"{split}-{number}",
                "prompt": question.text,
                "chosen": question.answers[0],
                "rejected": rejected,
                "positive_passage_id": question.relevant[0],
                "split": split,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A preference file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preference_store(world: TinyWorld, folder: Path, split: str, as_pairs: bool) -> Path:
    """A store of the split's pairs, or of the judged answers that they hold."""
    file = write_rows(folder / f"preferences-{split}.jsonl", preference_rows(world, split))
    found = read_preferences(PreferencesConfig(path=str(file)), split, as_pairs)
    reader_tokenizer = load_tokenizer(world.tokenizers / "generator")
    question_sides = [
        token_rows.retriever_question_side(world.tokenizer, world.encoder),
        token_rows.generator_question_side(reader_tokenizer, world.generator),
    ]
    answer_side = token_rows.generator_answer_side(reader_tokenizer, world.generator)
    path = folder / f"{'pairs' if as_pairs else 'judged'}-{split}"
    write_questions(
        path, found.questions, sides=question_sides, answer_side=answer_side, store=world.store(), labels=found.labels
    )
    return path


def variety(question: str, answer: str, golds: list[str], passages: list[str]) -> float:
    """A reward that differs from sample to sample."""
    return len(set(answer)) + len(passages[0]) / 100 if passages else float(len(set(answer)))
