"""The real command with all that keeps an index fresh: re-scoring, drift, a policy with a budget, partial refreshes."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, rows

pytestmark = pytest.mark.long

CONFIG = """
run: {name: fresh, directory: "DIRECTORY"}
corpus: {world: {num_people: 40, num_values: 40}}
encoder: {fresh: {num_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}, tokenizer: {vocabulary: 600}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}}
retrieval: {k: 3, rescore: 3}
refresh:
  every_steps: 20
  policy: both
  drift_threshold: 1.0
  check_every_steps: 5
  max_share: 0.035
  probe_questions: 8
  partial: 0.25
  whole_every: 4
  max_staleness_steps: 80
training: {steps: 100, batch_size: 4, lr_retriever: 3.0e-3}
checkpoint: {every_steps: 50}
evaluation: {k: 20, decoding: {max_tokens: 4}}
monitor: {wandb: off}
"""


@pytest.mark.timeout(600)
def test_a_run_with_all_of_it(tmp_path: Path) -> None:
    config = tmp_path / "fresh.yaml"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / "runs")), encoding="utf-8")
    with Command("train", str(config), log=tmp_path / "output.log") as command:
        assert command.wait(560) == 0, command.printed
        command.until(lambda: not command.left(), 30, "end of its processes", must_run=False)
    folder = tmp_path / "runs" / "fresh"
    steps = [row for row in rows(folder / "metrics.jsonl") if "loss/total" in row]
    assert [row["step"] for row in steps] == list(range(1, 101))
    assert all(0 <= row["retrieval/rescore_overlap"] <= 1 for row in steps)
    assert all(row["index/staleness_max_steps"] <= 80 + 20 for row in steps)
    looked = [row for row in steps if "drift/overlap" in row]
    assert [row["step"] for row in looked] == list(range(5, 101, 5))
    assert all({"drift/rank_correlation", "drift/passage_shift", "time/drift_s"} <= row.keys() for row in looked)

    triggered = rows(folder / "events.jsonl", "refresh_triggered")
    by_clock = [row["step"] for row in triggered if row["why"] == "refresh.every_steps=20"]
    assert by_clock == list(range(20, 101, 20))
    spent = 0.0
    for row in triggered:
        spent += row["share"]
        if row["step"] not in by_clock:
            assert row["overlap"] < 1
            assert spent <= 0.035 * row["step"] + 1e-9
    shares = [row["share"] for row in triggered]
    assert shares == [1.0 if n % 4 == 3 else 0.25 for n in range(len(shares))]
    assert rows(folder / "events.jsonl", "refresh_withheld")  # drift alone would ask at every check
    committed = rows(folder / "events.jsonl", "refresh_committed")
    assert {row["passages"] for row in committed if row.get("partial")} >= {60}
    assert all(row["passages"] == 240 for row in committed if not row.get("partial"))
    assert not rows(folder / "events.jsonl", "refresh_failed")
    assert not rows(folder / "events.jsonl", "coordinator_error")
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["weights_version"] == 100  # the last measurement has a whole, fresh index
