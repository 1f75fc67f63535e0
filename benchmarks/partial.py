"""Whole against partial refreshes on the same number of encoded passages: what does training gain?

    python -m benchmarks.partial [--seeds 3] [--people 300] [--steps 200] [--arms NAME ...]

The quickstart's stage `joint` in this process, on a smaller world and from one warm start a seed, with an index of real
shards that commits a refresh as soon as it is asked for. Every arm but `whole 10` encodes a fiftieth of the corpus a
step for the index; `whole 10` encodes five times as many and is what more budget would bring. `rescore 4` encodes 16
candidates a question in the trainer besides.

In service: recall@1 of held-out questions in the index as it serves, mean of the evaluations while training (every 29
steps, so that they meet the index at all ages). Final: recall@1 and exact match at the end, in an index of the last
weights: what the weights have learned. In k: share of training questions with a labelled passage among the k read,
second half of training. Means over the seeds, each seed's in brackets. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config.config_files import ROOT
from cluster.config.experiment import load
from cluster.config.settings import Settings
from cluster.prepare.stores import Prepared, prepare_data
from cluster.stage.run_stage import make_job
from indexing.corpus.stores.passages import Store
from tests.helpers.local_index import LocalIndex
from training.checkpoint import newest_checkpoint
from training.models.text.tokenizers import load_tokenizer
from training.reporting.jsonl import read_rows
from training.stage import Stage

ARMS: dict[str, list[str]] = {
    "whole 50": ["refresh.every_steps=50"],
    "partial 20% 10": ["refresh.every_steps=10", "refresh.partial=0.2", "refresh.whole_every=0"],
    "partial 10% 10, whole 100": ["refresh.every_steps=10", "refresh.partial=0.1", "refresh.whole_every=10"],
    "partial 20% 10, rescore 4": [
        "refresh.every_steps=10",
        "refresh.partial=0.2",
        "refresh.whole_every=0",
        "retrieval.rescore=4",
    ],
    "whole 10": ["refresh.every_steps=10"],
    "whole 50, rescore 4": ["refresh.every_steps=50", "retrieval.rescore=4"],
}
EVALUATE_EVERY = 29
COLUMNS = ("in service", "final", "exact match", "in k", "staleness", "corpus/step", "seconds")


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    values: dict[str, float]  # by column


class World:
    """The quickstart's data and warm starts under one folder."""

    def __init__(self, folder: Path, people: int, steps: int) -> None:
        self.folder, self.people, self.steps = folder, people, steps
        self.prepared: Prepared | None = None

    def settings(self, stage: str, seed: int, overrides: list[str]) -> Settings:
        """A stage of the quickstart, smaller, without console and W&B."""
        common = [
            f"run.seed={seed}",
            f"corpus.world.num_people={self.people}",
            f"stages.joint.training.steps={self.steps}",
            f"evaluation.every_steps={EVALUATE_EVERY}",
            "evaluation.max_questions=200",
            "stages.joint.evaluation.also=[]",
            "refresh.probe_questions=0",
            "refresh.max_staleness_steps=0",  # every refresh is committed at once
            "checkpoint.every_steps=0",
            "checkpoint.index=false",
            "cluster.threads_per_trainer=1",
            "monitor.console=false",
            "monitor.wandb=off",
        ]
        made = load([str(ROOT / "configs" / "quickstart.yaml")], [*common, *overrides]).stages[stage]
        return replace(made, run=replace(made.run, init_from=""))

    def start(self, seed: int) -> Path:
        """The checkpoint of this seed's warm start."""
        folder = self.folder / f"warm-{seed}"
        if self.prepared is None:
            self.prepared = prepare_data(self.settings("joint", seed, []), self.folder / "data", lambda _: None)
        if newest_checkpoint(folder, print) is None:
            Stage(make_job(self.settings("warm_start", seed, []), self.prepared, "", folder), None).run()
        found = newest_checkpoint(folder, print)
        assert found is not None
        return found

    def run(self, arm: str, seed: int) -> Run:
        """Train one arm, unless its numbers are there."""
        known = self.folder / f"{arm}-{self.people}-{self.steps}-{seed}.json"
        if known.exists():
            return Run(arm, seed, json.loads(known.read_text()))
        start, folder = self.start(seed), self.folder / f"{arm.replace(' ', '-')}-{seed}"
        assert self.prepared is not None
        settings = self.settings("joint", seed, ARMS[arm])
        index = LocalIndex(
            Store.open(self.prepared.passages, verify=False),
            settings.encoder,
            len(load_tokenizer(self.prepared.tokenizers / "retriever")),
            num_shards=settings.index.num_shards,
        )
        begin = time.monotonic()
        stage = Stage(make_job(settings, self.prepared, str(start), folder), index)
        result = stage.run()
        seconds = time.monotonic() - begin
        rows = list(read_rows(folder / "metrics.jsonl"))
        steps = [row for row in rows if "loss/total" in row]
        key = "eval/test/recall@1"
        while_training = [row[key] for row in rows if key in row and 0 < row["step"] < self.steps]
        values = {
            "in service": statistics.mean(while_training),
            "final": result["metrics"]["recall@1"],
            "exact match": result["metrics"]["exact_match"],
            "in k": statistics.mean(row["retrieval/gold_in_k"] for row in steps[len(steps) // 2 :]),
            "staleness": statistics.mean(row["index/staleness_steps"] for row in steps),
            "corpus/step": stage.state.refreshed_share / self.steps,
            "seconds": seconds,
        }
        known.write_text(json.dumps(values))
        return Run(arm, seed, values)


def line(arm: str, runs: list[Run]) -> str:
    """One row of the table."""
    cells: list[str] = []
    for column in COLUMNS:
        values = [run.values[column] for run in runs]
        if column in ("seconds", "staleness"):
            cells.append(f"{statistics.mean(values):12.1f}")
        elif column == "corpus/step":
            cells.append(f"{statistics.mean(values):12.3f}")
        else:
            single = " ".join(f"{value:.3f}" for value in values)
            cells.append(f"{statistics.mean(values):8.3f} [{single}]")
    return f"{arm:<26}" + "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--folder", default="", help="keep everything here, and do not run again what was run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        world, runs = World(folder, arguments.people, arguments.steps), list[Run]()
        for seed in range(arguments.seeds):
            for arm in arguments.arms:
                runs.append(world.run(arm, seed))
                print(arm, seed, json.dumps(runs[-1].values), flush=True)
    print(f"\n{6 * arguments.people} passages, {arguments.steps} steps, {arguments.seeds} seeds")
    print(f"{'':<26}" + "".join(f"{column:>{12 if column in COLUMNS[4:] else 28}}" for column in COLUMNS))
    found: dict[str, dict[str, Any]] = {}
    for arm in arguments.arms:
        of_arm = [run for run in runs if run.arm == arm]
        print(line(arm, of_arm))
        found[arm] = {column: round(statistics.mean(run.values[column] for run in of_arm), 4) for column in COLUMNS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
