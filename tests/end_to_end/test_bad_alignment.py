"""Bad settings and preference files of alignment: one line each, exit code 2, before Ray starts."""

from pathlib import Path

import pytest

from tests.end_to_end.test_bad_inputs import ASKED, GOOD, QUICKSTART, Refusal, lines, refusal  # noqa: F401

PAIR = {"prompt": "what is item 1?", "chosen": "item 1", "rejected": "item 2", "split": "train"}
HELD_OUT = {**PAIR, "split": "test"}
PAIRS = lines([PAIR, HELD_OUT])

ARGUMENTS = [
    ("objective.name=grpo objective.group_size=1", "objective.group_size=1: must be 2 or above"),
    ("objective.name=grpo objective.reward=nice", "objective.reward=nice: must be exact_match, f1, grounded"),
    ("objective.name=grpo objective.reward=no/file.py:f", "it cannot be loaded: FileNotFo"),
    (
        "objective.name=grpo objective.reward=math:fun",
        "objective.reward=math:fun: must be a function: math has no 'fun'",
    ),
    ("objective.name=grpo objective.reward=likelihood", "with objective.name=grpo"),
    (
        "objective.name=grpo objective.kl_weight=0.1 alignment.reference=none",
        "alignment.reference=none: must be copy or offload with objective.name=grpo and kl_weight=0.1",
    ),
    ("objective.name=kto alignment.reference=none", "alignment.reference=none: must be copy or offload with"),
    ("objective.name=dpo alignment.reference=adapter", "alignment.reference=adapter: must be one of copy, offload"),
    ("objective.name=dpo alignment.updates_per_sample=2", "alignment.updates_per_sample=2: must be 1, or"),
    (
        "objective.name=grpo alignment.updates_per_sample=2 engine.gradient_accumulation=2",
        "alignment.updates_per_sample=2: must be 1 with engine.gradient_accumulation above 1",
    ),
    ("objective.name=stochastic_rag objective.num_selected=4", "objective.num_selected=4: must be below retrieval.k=4"),
    ("objective.name=dpo objective.beta=0", "objective.beta=0.0: must be above 0"),
    ("objective.name=dpo retrieval.source=none", "retrieval.source=none: must be index or gold"),
    ("objective.name=dpo preferences.format=pairs", "preferences.format=pairs: must be one of auto, paired, unpaired"),
    ("preferences.max_length_ratio=-1", "preferences.max_length_ratio=-1.0: must not be negative"),
]

# The objective, the preference file, further settings, what the message says.
FILES = [
    ("dpo", None, "", "data: must be a .jsonl[.gz] file or a folder with preferences.jsonl[.gz]"),
    ("dpo", PAIRS + b"{\n", "", "preferences.jsonl:3: not_json"),
    ("dpo", PAIRS + b'{"prompt": "\xff"}\n', "", "preferences.jsonl:3: broken_utf8"),
    (
        "dpo",
        PAIRS + lines([{"prompt": "x", "chosen": "y"}]),
        "",
        "preferences.jsonl:3: missing_field: rejected is",
    ),
    ("dpo", PAIRS + lines([{**PAIR, "rejected": " "}]), "", "preferences.jsonl:3: empty_text: rejected is empty"),
    ("dpo", PAIRS + lines([{**PAIR, "rejected": "item 1"}]), "", "preferences.jsonl:3: equal_answers"),
    ("dpo", lines([{"prompt": "x", "answer": "y", "desirable": True}]), "", "this file has j"),
    ("dpo", lines([PAIR]), "", "has no preferences of split 'test'"),
    ("dpo", lines([HELD_OUT]), "", "has no preferences of split 'train'"),
    ("kto", PAIRS + lines([{**PAIR, "chosen": 3}]), "", "preferences.jsonl:3: missing_field: chosen is '3'"),
    ("dpo", PAIRS, "preferences.max_length_ratio=0.5", "1 left out by preferences.max_length_ratio=0.5"),
]


@pytest.mark.parametrize(("overrides", "expected"), ARGUMENTS)
def test_bad_arguments(overrides: str, expected: str, refusal: Refusal, tmp_path: Path) -> None:  # noqa: F811
    config = tmp_path / "a.yaml"
    config.write_text("corpus: {world: {num_people: 20}}", encoding="utf-8")
    said = refusal("train", str(config), *overrides.split())
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("objective", "content", "override", "expected"), FILES)
def test_bad_preferences(
    objective: str,
    content: bytes | None,
    override: str,
    expected: str,
    refusal: Refusal,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.jsonl").write_bytes(GOOD)
    for split in ("train", "test"):
        (data / f"queries-{split}.jsonl").write_bytes(ASKED)
    if content is not None:
        (data / "preferences.jsonl").write_bytes(content)
    config = tmp_path / "a.yaml"
    text = f"corpus: {{path: {data}}}\nencoder: {{tokenizer: {{vocabulary: 300}}}}\nobjective: {{name: {objective}}}"
    config.write_text(text, encoding="utf-8")
    said = refusal("train", str(config), *override.split())
    assert expected in said
    assert said.count("\n") == 1 or "lines read" in said


def test_the_quickstart_knows_no_preferences(refusal: Refusal) -> None:  # noqa: F811
    said = refusal("train", QUICKSTART, "corpus.world.num_people=20", "stages.joint.objective.name=dpo")
    assert "must be a .jsonl[.gz] file or a folder with preferences.jsonl[.gz]" in said
