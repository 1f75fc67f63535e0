"""The commands of the chain, one after the other, on the small edition of its data and for a few steps."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, rows

pytestmark = pytest.mark.long

OVERRIDES = (
    *("questions.max_questions=24", "encoder.tokenizer.vocabulary=2000", "encoder.fresh.hidden=32"),
    *("generator.fresh.hidden=32", "encoder.max_passage_tokens=64", "generator.max_passage_tokens=64"),
    *("training.steps=4", "training.batch_size=4", "refresh.every_steps=2", "evaluation.k=20"),
    *("evaluation.every_steps=0", "monitor.wandb=off"),
)


@pytest.mark.timeout(900)
def test_finetuning_starts_where_pretraining_ended(data_folder: Path, tmp_path: Path) -> None:
    for name, more in (
        ("pretrain", ("stages.warm_start.training.steps=4", "stages.pretrain.training.steps=4")),
        ("finetune", (f"run.init_from={tmp_path / 'pretrain' / 'pretrain'}", "questions.unanswerable=")),
    ):
        arguments = (f"corpus.path={data_folder / 'squad-mini'}", f"run.directory={tmp_path}", *OVERRIDES, *more)
        with Command("train", f"configs/{name}.yaml", *arguments, log=tmp_path / f"{name}.log") as command:
            assert command.wait(420) == 0, command.printed
            command.until(lambda: not command.left(), 30, "end of its processes", must_run=False)
    pretrained = json.loads((tmp_path / "pretrain" / "summary.json").read_text(encoding="utf-8"))["pretrain"]
    assert pretrained["held_out/loss"] > 0
    assert 0 <= pretrained["recall@20"] <= 1
    assert max(row["step"] for row in rows(tmp_path / "pretrain" / "pretrain" / "metrics.jsonl")) == 4
    finetuned = json.loads((tmp_path / "finetune" / "summary.json").read_text(encoding="utf-8"))["run"]
    assert {"exact_match", "recall@1", "refusal_answerable"} <= set(finetuned)
    assert "starts from" in (tmp_path / "finetune.log").read_text(encoding="utf-8")
