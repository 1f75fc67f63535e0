"""kill -9 on any one actor of a running training does not lose the run; one of the driver leaves nothing behind."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, kill, rows

pytestmark = pytest.mark.long

STEPS = 700
CONFIG = """
run: {name: survive, directory: "DIRECTORY"}
corpus: {world: {num_people: 40, num_values: 40}}
encoder: {fresh: {num_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}, tokenizer: {vocabulary: 600}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}}
retrieval: {k: 3}
refresh: {every_steps: 10}
training: {steps: 700, batch_size: 4}
checkpoint: {every_steps: 25}
evaluation: {k: 20, decoding: {max_tokens: 4}}
monitor: {wandb: off}
"""


@dataclass(frozen=True)
class Run:
    """Where a run writes."""

    config: Path
    folder: Path
    log: Path

    def events(self, kind: str) -> int:
        """How many there are so far."""
        return len(rows(self.folder / "events.jsonl", kind))

    def step(self) -> int:
        """The newest that was logged."""
        return max((row["step"] for row in rows(self.folder / "metrics.jsonl")), default=0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = tmp_path / "survive.yaml"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / "runs")), encoding="utf-8")
    return Run(config, tmp_path / "runs" / "survive", tmp_path / "output.log")


def kill_and_await(command: Command, run: Run, title: str, *events: str) -> None:
    """SIGKILL one process whose title starts with `title`; wait for another one, for new events of all these kinds, and
    for a refresh that was started after that."""
    assert run.step() < STEPS, f"the run is too short for all of its deaths: {command.printed}"
    before = {kind: run.events(kind) for kind in events}
    known = command.until(lambda: command.descendants(title), 60, f"process {title}")
    kill(known[0])
    what = f"{', '.join((*events, 'refresh'))} after the death of {title} at step {run.step()}"

    def recovered() -> bool:
        another = any(process not in known for process in command.descendants(title))
        return another and all(run.events(kind) > before[kind] for kind in events)

    command.until(recovered, 90, what)
    begun = run.events("refresh_started")
    command.until(lambda: run.events("refresh_committed") > begun, 60, what)


@pytest.mark.timeout(600)
def test_every_actor_may_die(run: Run) -> None:
    with Command("train", str(run.config), log=run.log) as command:
        command.until(lambda: run.events("checkpoint"), 150, "first checkpoint")
        kill_and_await(command, run, "ray::ShardActor", "shard_restored")
        kill_and_await(command, run, "ray::RefreshWorkerActor")
        kill_and_await(command, run, "ray::CoordinatorActor", "index_taken_over")
        kill_and_await(command, run, "ray::RayTrainWorker", "resumed")
        kill_and_await(command, run, "ray::TrainController", "controller_lost", "resumed")
        assert run.step() < STEPS
        assert command.wait(200) == 0, command.printed
        assert not command.left()
    assert json.loads((run.folder / "evaluation.json").read_text())["step"] == STEPS
    check_metrics(run)


def check_metrics(run: Run) -> None:
    """Every step was logged; after each resume they go on from its checkpoint."""
    events, metrics = run.folder / "events.jsonl", rows(run.folder / "metrics.jsonl")
    assert {row["step"] for row in metrics if "loss/total" in row} == set(range(1, STEPS + 1))
    for resumed in rows(events, "resumed"):
        later = [row["step"] for row in metrics if row["time"] >= resumed["time"] and "loss/total" in row]
        assert later[0] == resumed["step"] + 1
        assert (run.folder / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS}"


@pytest.mark.timeout(600)
def test_driver_dies_and_the_same_command_goes_on(run: Run) -> None:
    arguments = ("train", str(run.config), "training.steps=120")
    with Command(*arguments, log=run.log) as command:
        command.until(lambda: run.events("checkpoint"), 150, "first checkpoint")
        command.descendants()
        command.process.kill()
        command.process.wait()
        with Command(*arguments, log=run.log) as again:
            assert again.wait(200) == 0, again.printed
        command.until(lambda: not command.left(), 90, "end of what the killed driver started", must_run=False)
    assert rows(run.folder / "events.jsonl", "resumed")[0]["step"] >= 25
    assert json.loads((run.folder / "evaluation.json").read_text())["step"] == 120
