"""A small matrix through the command line: two ways of training and two objectives, their table, and an update asked of
one of the cells afterwards."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import Command

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

CONFIG = """
run: {name: small, directory: %s}
corpus: {world: {num_people: 40, num_values: 40, swap_fraction: 0.5}, as_of: "2024-01-01"}
questions: {as_of: "2024-01-01"}
encoder:
  fresh: {num_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}
  tokenizer: {vocabulary: 700}
generator:
  fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}
  max_answer_tokens: 8
retrieval: {k: 3, max_context_tokens: 600}
refresh: {every_steps: 2}
training: {steps: 4, batch_size: 8, warmup_steps: 1}
checkpoint: {every_steps: 0, index: false}
evaluation: {k: 20}
monitor: {wandb: "off"}
stages:
  warm_start: {objective: {name: inverse_cloze}, training: {train: retriever_only, batch_size: 16}}
  joint: {run: {init_from: warm_start}}
compare:
  base_stage: joint
  baseline: frozen, rag_sequence
  axes:
    train:
      frozen: {training: {train: generator_only}, retrieval: {source: fixed}}
      both: {training: {train: both}}
    objective:
      rag_sequence: {objective: {name: rag_sequence}}
      emdr2: {objective: {name: emdr2}, evaluation: {decoding: {mode: fused}}}
"""
CELLS = ["frozen, rag_sequence", "frozen, emdr2", "both, rag_sequence", "both, emdr2"]


def call(folder: Path, *arguments: str) -> str:
    log = folder / "printed.log"
    log.unlink(missing_ok=True)
    with Command(*arguments, log=log) as command:
        assert command.wait(700) == 0, command.printed
        command.until(lambda: not command.left(), 30, "end of its processes", must_run=False)
        return command.printed


def test_a_matrix_and_an_update_of_one_cell(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG % (tmp_path / "runs"), encoding="utf-8")
    printed = call(tmp_path, "compare", str(config))
    assert "compare: 4 cells x 1 seeds; 5 of 5 runs to do" in printed
    root = tmp_path / "runs" / "small" / "compare"
    content = json.loads((root / "comparison.json").read_text(encoding="utf-8"))
    assert list(content["cells"]) == CELLS
    assert content["failed"] == {}
    for cell, values in content["cells"].items():
        assert values["seeds"] == [0]
        assert {"recall@1", "exact_match", "f1"} <= set(values["metrics"])
        assert bool(values["paired"]) == (cell != content["baseline"])
        assert values["train_seconds"] > 0
    frozen = content["cells"]["frozen, emdr2"]["paired"]["recall@1"]
    assert (frozen["mean"], frozen["low"], frozen["high"]) == (0.0, 0.0, 0.0)  # one retriever, one index
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "Comparison on held-out questions" in page
    assert "What the context costs" in page
    assert page.count("<svg") == 1

    marks = {path: path.stat().st_mtime_ns for path in root.glob("seed-0/*/evaluation.json")}
    assert len(marks) == 5
    assert "0 of 5 runs to do" in call(tmp_path, "compare", str(config))
    again = call(tmp_path, "compare", str(config), "stages.joint.retrieval.k=2")
    assert "4 of 5 runs to do" in again  # not the warm start
    assert marks[root / "seed-0" / "warm_start" / "evaluation.json"] in {
        path.stat().st_mtime_ns for path in root.glob("seed-0/warm_start/evaluation.json")
    }

    cell = root / "seed-0" / "both-emdr2"
    needle = ("evaluation.needle.lengths=[200,600]", "evaluation.needle.depths=[0,1]")
    asked = call(
        tmp_path, "evaluate", str(cell), "update.as_of=end", "evaluation.also=[closed_book,gold,long]", *needle
    )
    assert "After the update" in asked
    assert "What the context costs" in asked
    summary = json.loads((cell / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    swapped = summary["updates"]["evaluate"]
    assert swapped["num_changed"] > 0
    assert swapped["num_unchanged"] > 0
    assert swapped["num_changed"] + swapped["num_unchanged"] == 48  # 8 people, 6 facts each
    assert set(summary["costs"]["evaluate"]) == {"fused", "closed_book", "gold", "long"}
    tokens = {mode: costs["prompt_tokens"] for mode, costs in summary["costs"]["evaluate"].items()}
    assert tokens["closed_book"] < tokens["gold"] < tokens["fused"] < tokens["long"] <= 600
    result = json.loads((cell / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    assert [len(row) for row in result["needle"]["exact_match"]] == [2, 2]
    assert (cell / "evaluate" / "report.html").read_text(encoding="utf-8").count("Needle in a haystack") == 1
