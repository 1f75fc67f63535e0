"""Signals stop a run: one checkpoint at the present step, one sentence, the right exit code, nothing left running; and
the same command goes on as if nothing had happened.
"""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.end_to_end.command import Command, rows

STEPS = 60
BOUND_S = 30.0  # cluster.stop_timeout_s
CONFIG = """
run: {name: stopped, directory: "DIRECTORY"}
corpus: {world: {num_people: 12, num_values: 12}}
encoder: {fresh: {num_layers: 1, hidden: 16, num_heads: 2, intermediate: 32}, tokenizer: {vocabulary: 300}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 16, num_heads: 2, intermediate: 32}}
retrieval: {k: 2}
training: {train: generator_only, steps: 60, batch_size: 2}
evaluation: {k: 5, max_questions: 8, every_steps: 20, batch_size: 8, decoding: {max_tokens: 2}}
monitor: {wandb: off}
"""


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step that was logged."""
    return {row["step"]: row["loss/total"] for row in rows(folder / "metrics.jsonl") if "loss/total" in row}


def write_config(tmp_path: Path, runs: str) -> Path:
    config = tmp_path / f"{runs}.yaml"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / runs)), encoding="utf-8")
    return config


def stop(command: Command, number: signal.Signals) -> None:
    """Send the signal, and wait until nothing of the command is left."""
    command.marked()
    begin = time.monotonic()
    command.process.send_signal(number)
    assert command.wait(BOUND_S + 10) == (130 if number == signal.SIGINT else 143), command.printed
    assert time.monotonic() - begin < BOUND_S, command.printed
    assert command.printed.splitlines()[-1].startswith(f"tandem: stopped by {number.name}: ")
    assert "Traceback" not in command.printed
    command.until(lambda: not command.marked(), 30, "end of its processes", must_run=False)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))


@pytest.mark.timeout(400)
def test_stopped_run_goes_on_as_an_uninterrupted_one(tmp_path: Path) -> None:
    folder, log = tmp_path / "runs" / "stopped", tmp_path / "output.log"
    config = write_config(tmp_path, "runs")
    with Command("train", str(config), log=log) as command:
        trainer = command.until(lambda: command.descendants("ray::RayTrainWorker"), 150, "trainer")[0]
        while not losses(folder):  # a look at all processes would take many steps
            time.sleep(0.01)
        trainer.suspend()
        with Command("train", str(config), log=tmp_path / "second.log") as second:
            assert second.wait(60) == 2, second.printed
            assert f"is in use by process {command.process.pid}" in second.printed
        trainer.resume()
        stop(command, signal.SIGTERM)
    step = newest(folder)
    assert step == max(losses(folder))
    assert step < STEPS
    assert f"saved {folder / 'checkpoints' / f'step-{step}'}; the same command goes on there" in command.printed
    assert not (folder / "lock.json").exists()
    with Command("train", str(config), log=log) as again:
        assert again.wait(200) == 0, again.printed
    assert [row["step"] for row in rows(folder / "events.jsonl", "resumed")] == [step]
    for name in ("tokenizers", "data", "world"):  # training a tokeniser twice breaks ties differently
        shutil.copytree(folder / name, tmp_path / "other" / "stopped" / name)
    with Command("train", str(write_config(tmp_path, "other")), log=tmp_path / "other.log") as other:
        assert other.wait(200) == 0, other.printed
    whole = losses(tmp_path / "other" / "stopped")
    assert losses(folder) == whole
    assert sorted(whole) == list(range(1, STEPS + 1))
    evaluated = [row["step"] for row in rows(folder / "metrics.jsonl") if any(key.startswith("eval/") for key in row)]
    assert evaluated == sorted(set(evaluated))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.timeout(400)
def test_every_signal_stops_in_every_phase(tmp_path: Path, number: signal.Signals) -> None:
    folder, log = tmp_path / "runs" / "stopped", tmp_path / "output.log"
    config = write_config(tmp_path, "runs")
    with Command("train", str(config), log=log) as command:  # the index is waited for, and does not come
        worker = command.until(lambda: command.descendants("ray::RefreshWorkerActor"), 100, "refresh worker")[0]
        worker.suspend()
        command.until(lambda: rows(folder / "events.jsonl", "refresh_started"), 100, "refresh")
        stop(command, number)
    assert not (folder / "checkpoints").exists()
    with Command("train", str(config), log=log) as command:
        command.until(lambda: command.descendants("ray::RayTrainWorker"), 150, "trainer")
        while not losses(folder):
            time.sleep(0.01)
        stop(command, number)
    first = newest(folder)
    assert first == max(losses(folder))
    often = ("evaluation.every_steps=1", "evaluation.max_questions=0")  # most of the time it evaluates
    with Command("train", str(config), *often, log=tmp_path / "often.log") as command:
        command.until(lambda: "resumes from" in command.printed, 150, "resumed training")
        stop(command, number)
    assert first <= newest(folder) == max(losses(folder))
    with Command("train", str(config), log=log) as command:
        assert command.wait(200) == 0, command.printed
    assert json.loads((folder / "evaluation.json").read_text())["step"] == STEPS


@pytest.mark.long
@pytest.mark.timeout(200)
def test_work_that_does_not_end_is_ended_after_the_bound(tmp_path: Path) -> None:
    folder, config = tmp_path / "runs" / "stopped", write_config(tmp_path, "runs")
    with Command("train", str(config), "cluster.stop_timeout_s=8", log=tmp_path / "output.log") as command:
        command.until(lambda: losses(folder), 150, "first step")
        for trainer in command.descendants("ray::RayTrainWorker"):
            trainer.suspend()
        begin = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(20) == 143, command.printed
        assert time.monotonic() - begin < 12
        command.until(lambda: not command.marked(), 90, "end of its processes", must_run=False)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_machines_stop_together(tmp_path: Path) -> None:
    """Both launchers get the signal, as from a scheduler: a checkpoint of both trainers, no Ray and no token left."""
    folder, config = tmp_path / "runs" / "stopped", write_config(tmp_path, "runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"TANDEM_HEAD": f"127.0.0.1:{port}", "TANDEM_NODES": "2", "TANDEM_TOKEN_FILE": str(tmp_path / "token")}
    launched = [
        Command(
            *("train", str(config), "cluster.num_trainers=2", "training.steps=2000"),
            log=tmp_path / f"machine-{rank}.log",
            module="cluster.nodes",
            environment={**where, "TANDEM_NODE_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    with launched[0] as head, launched[1] as other:
        head.until(lambda: losses(folder), 200, "first step")
        for command in (head, other):
            command.marked()
            command.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert [head.wait(BOUND_S), other.wait(BOUND_S)] == [143, 143], head.printed + other.printed
        assert time.monotonic() - begin < BOUND_S
        for command in (head, other):
            command.until(lambda command=command: not command.marked(), 30, "end of its processes", must_run=False)
    assert newest(folder) == max(losses(folder))
    assert not (tmp_path / "token").exists()
