"""The quickstart as a person would run it, small: one command trains, the next ones find what it left."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from indexing.corpus.snapshot import is_complete
from tests.end_to_end.command import Command, rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STAGES = ("warm_start", "frozen", "frozen_fused", "joint")
OVERRIDES = (
    *("corpus.world.num_people=60", "corpus.world.num_values=60", "encoder.tokenizer.vocabulary=800"),
    *("training.steps=6", "training.batch_size=8", "training.warmup_steps=2", "refresh.every_steps=2"),
    *("stages.warm_start.training.steps=4", "stages.warm_start.training.batch_size=16"),
    *("evaluation.every_steps=3", "evaluation.max_questions=10", "checkpoint.every_steps=3"),
)
# At least these, in one row or another of a joint stage.
METRICS = {
    *("loss/total", "loss/generator", "retrieval/entropy", "retrieval/gold_in_k", "optim/lr_retriever"),
    *("optim/lr_generator", "optim/grad_norm_retriever", "optim/grad_norm_generator", "optim/skipped_steps"),
    *("index/generation", "index/staleness_steps", "index/generations_committed", "index/refresh_s"),
    *("index/slow", "index/hedged", "index/refused"),
    *("index/blocked_steps", "perf/refresh_passages_per_s", "perf/tokens_per_s", "perf/questions_per_s"),
    *("perf/memory_rss_gib", "time/step_s", "time/search_wait_s", "time/search_wait_share", "time/fetch_s"),
    *("time/forward_s", "time/backward_s", "time/optimizer_s", "time/publish_s", "time/evaluate_s", "time/save_s"),
    *("eval/test/exact_match", "eval/test/f1", "eval/test/recall@1", "eval/test/recall@5", "eval/test/recall@20"),
    *("eval/test/ndcg@10", "eval/test/mrr", "eval/test/log_likelihood", "eval/test/closed_book/exact_match"),
}


@dataclass(frozen=True)
class Quickstart:
    """A finished run, and how to call the command line about it again."""

    folder: Path
    printed: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """Configuration and overrides of the run."""
        return ("configs/quickstart.yaml", f"run.directory={self.folder.parent}", *OVERRIDES)

    def call(self, *command: str, timeout_s: float = 200) -> str:
        """What a command about this run prints; it must succeed, and end everything that it started."""
        log = self.folder.parent / "again.log"
        log.unlink(missing_ok=True)
        with Command(*command, log=log) as again:
            assert again.wait(timeout_s) == 0, again.printed
            again.until(lambda: not again.left(), 30, "end of its processes", must_run=False)
            return again.printed

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quickstart]:
    """The one training of this file."""
    runs = tmp_path_factory.mktemp("runs")
    run = Quickstart(runs / "quickstart", "")
    with Command("train", *run.arguments, log=runs / "first.log") as command:
        assert command.wait(560) == 0, command.printed
        command.until(lambda: not command.left(), 30, "end of its processes", must_run=False)
        yield Quickstart(run.folder, command.printed)


def test_summary_has_what_it_promises(quickstart: Quickstart) -> None:
    summary = quickstart.summary()
    assert {"recall@1", "recall@5", "exact_match"} <= set(summary["frozen"]) & set(summary["joint"])
    assert "exact_match" in summary["frozen_fused"]
    assert "exact_match" in summary["closed_book"]
    assert {"new", "old"} <= set(summary["swap"])
    assert summary["swap"]["num_changed"] > 0
    assert summary["generations_committed"] >= 3
    assert summary["blocked_steps"] == 0
    assert 0 < summary["seconds"] < 600
    table = [
        line for line in quickstart.printed.splitlines() if line.startswith(("joint", "frozen", "after the update"))
    ]
    assert len(table) >= 4


def test_every_metric_and_event_was_written(quickstart: Quickstart) -> None:
    metrics = rows(quickstart.folder / "joint" / "metrics.jsonl")
    assert set().union(*metrics) >= METRICS
    assert [row["step"] for row in metrics if "loss/total" in row] == list(range(1, 7))
    events = quickstart.folder / "joint" / "events.jsonl"
    committed = [row["weights_version"] for row in rows(events, "refresh_committed")]
    assert len(committed) >= 2
    assert committed == sorted(committed)
    assert committed[-1] == 6
    assert [row["step"] for row in rows(events, "checkpoint")] == [3, 6]


def test_run_folders_hold_configuration_and_wandb(quickstart: Quickstart) -> None:
    for stage in STAGES:
        folder = quickstart.folder / stage
        assert "num_people: 60" in (folder / "config.yaml").read_text(encoding="utf-8")
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
        assert (folder / "checkpoints" / "latest").read_text() == ("step-4\n" if stage == "warm_start" else "step-6\n")


def test_report_is_self_contained(quickstart: Quickstart) -> None:
    page = (quickstart.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert "frozen_fused" in page
    assert not re.search(
        r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//|url\(\s*[\"']?(https?:)?//|@import|<link", page
    )


def test_second_call_finds_everything_finished(quickstart: Quickstart) -> None:
    kept = ["summary.json", "joint/metrics.jsonl", "joint/events.jsonl", "joint/evaluation.json"]
    before = [(quickstart.folder / name).read_bytes() for name in kept]
    printed = quickstart.call("train", *quickstart.arguments)
    assert "finished before, not run again" in printed
    assert "stage quickstart" not in printed  # neither trained nor measured again
    assert [(quickstart.folder / name).read_bytes() for name in kept] == before


def test_ask_answers_with_passages_and_scores(quickstart: Quickstart) -> None:
    asked = rows(quickstart.folder / "joint" / "predictions.jsonl")[0]
    printed = quickstart.call("ask", asked["question"], str(quickstart.folder / "joint"))
    answer, *rest = printed.splitlines()
    assert answer == asked["prediction"]
    assert f"from {quickstart.folder}/joint/checkpoints/step-6; p(z|q), index score, passage:" in rest
    found = re.findall(r"^  (0\.\d{3}|1\.000)  (-?\d\.\d{3})  (person-\S+)  ", printed, re.MULTILINE)
    assert [passage for _, _, passage in found] == asked["hits"]
    assert sum(float(share) for share, _, _ in found) == pytest.approx(1, abs=0.005)


def test_evaluate_measures_the_same_again(quickstart: Quickstart) -> None:
    quickstart.call("evaluate", *quickstart.arguments)
    again = json.loads((quickstart.folder / "joint" / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    for name in ("recall@1", "recall@5", "exact_match", "f1"):
        assert again["evaluate"][name] == pytest.approx(quickstart.summary()["joint"][name], abs=1e-6)


def test_index_builds_one_without_training(quickstart: Quickstart) -> None:
    printed = quickstart.call("index", *quickstart.arguments)
    folder = quickstart.folder / "joint" / "index_only"
    assert f"index in {folder}/index" in printed
    assert any(is_complete(path) for path in (folder / "index").glob("generation-*"))
    assert not (folder / "checkpoints").exists()


def test_damaged_checkpoint_is_named_and_the_one_before_answers(quickstart: Quickstart) -> None:
    """Last: it damages the run."""
    weights = quickstart.folder / "joint" / "checkpoints" / "step-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    printed = quickstart.call("ask", "where was somebody born?", str(quickstart.folder / "joint"))
    assert "step-6 is incomplete or damaged: model.safetensors differs from its checksum" in printed
    assert f"from {quickstart.folder}/joint/checkpoints/step-3; " in printed
