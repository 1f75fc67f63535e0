"""The recipe for real text, on its small edition: every stage for a few steps."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, rows

pytestmark = pytest.mark.long

OVERRIDES = (
    *("questions.max_questions=24", "encoder.tokenizer.vocabulary=2000", "encoder.fresh.hidden=32"),
    *("generator.fresh.hidden=32", "encoder.max_passage_tokens=64", "generator.max_passage_tokens=64"),
    *("training.steps=4", "training.batch_size=4", "refresh.every_steps=2", "evaluation.k=20"),
    *("stages.warm_start.training.steps=4", "stages.warm_start.training.batch_size=16"),
    *("stages.reader_warmup.training.steps=4", "evaluation.every_steps=0", "monitor.wandb=off"),
)


@pytest.mark.timeout(600)
def test_every_stage_of_the_recipe_trains(data_folder: Path, tmp_path: Path) -> None:
    arguments = (f"corpus.path={data_folder / 'squad-mini'}", f"run.directory={tmp_path}", *OVERRIDES)
    with Command("train", "configs/squad_open.yaml", *arguments, log=tmp_path / "output.log") as command:
        assert command.wait(560) == 0, command.printed
        command.until(lambda: not command.left(), 30, "end of its processes", must_run=False)
    folder = tmp_path / "squad_open"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for stage in ("reader_warmup", "frozen", "joint"):
        assert {"recall@1", "recall@20", "exact_match", "f1"} <= set(summary[stage])
        assert max(row["step"] for row in rows(folder / stage / "metrics.jsonl")) == 4
    assert {"joint - frozen", "joint - reader_warmup"} == set(summary["paired"])
    assert summary["joint"]["gold/exact_match"] >= 0
    assert summary["generations_committed"] >= 2
    # The frozen stage trains no passage encoder: it takes the index of the stage before it, and encodes nothing.
    assert rows(folder / "frozen" / "events.jsonl", "index_taken_over")
    assert not rows(folder / "frozen" / "events.jsonl", "refresh_started")
    assert rows(folder / "joint" / "events.jsonl", "refresh_started")
    first = rows(folder / "reader_warmup" / "metrics.jsonl")[0]
    assert first["retrieval/gold_in_k"] == 1.0  # the labelled passage is always among those that it reads
