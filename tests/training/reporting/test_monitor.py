"""The monitor: files that survive a crash, a real offline W&B run read back from disk, and W&B that fails."""

import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training.reporting.jsonl import append_line, read_rows
from training.reporting.meters import Timer, memory_metrics
from training.reporting.monitor import Monitor
from training.reporting.progress import Progress, duration, share
from training.reporting.redact import REDACTED, redact, redact_text
from training.reporting.wandb_settings import wandb_mode
from training.training_settings import MonitorConfig

QUIET = MonitorConfig(console=False, wandb="off")
OFFLINE = MonitorConfig(console=True, wandb="offline")
SECRETS = {
    "api_key": "value-of-api-key",
    "nested": {"HF_TOKEN": "value-of-token", "list": [{"clientSecret": "value-of-secret"}]},
    "Password": "value-of-password",
    "url": "https://me:value-of-userinfo@host/path",
    "overrides": ["store.access_token=value-of-override"],
    "max_tokens": 64,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def inspect(run_dir: Path) -> list[dict[str, Any]]:
    """Every record of every W&B run file below `run_dir`, oldest file first."""
    records = []
    for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        records += [json.loads(line) for line in output.splitlines()]
    return records


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    root = Path(__file__).resolve().parents[3]
    # A W&B service that this process has started would be shared with the new one.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, timeout=60, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_metrics_lines(tmp_path: Path) -> None:
    with Monitor(tmp_path, QUIET, run_config={}, total_steps=2, rank=0) as monitor:
        monitor.log({"loss/total": 1.5, "index/generation": 2}, step=1)
        monitor.log({"loss/total": float("nan"), "optim/grad_norm_generator": float("inf")}, step=2)
    first, second = lines(tmp_path / "metrics.jsonl")
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"step": 1, "loss/total": 1.5, "index/generation": 2}
    assert second["loss/total"] is None
    assert second["optim/grad_norm_generator"] is None
    assert second["num_nonfinite"] == 2
    assert not (tmp_path / "wandb").exists()


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/to')
    with Monitor(tmp_path, QUIET, run_config={}, total_steps=3, rank=0) as monitor:
        monitor.log({"loss/total": 1.0}, step=2)
    assert [(row["step"], row["loss/total"]) for row in lines(tmp_path / "metrics.jsonl")] == [(1, 2.0), (2, 1.0)]
    assert [row["event"] for row in lines(tmp_path / "events.jsonl")] == ["torn_metrics_line_dropped"]


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Monitor(tmp_path / "run", OFFLINE, run_config=SECRETS, total_steps=1, rank=1, stream=stream) as monitor:
        monitor.log({"loss/total": 1.0}, step=1)
        monitor.event("x")
        monitor.message("x")
        monitor.summary({"x": 1})
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def append_many(path: Path, writer: int) -> None:
    for number in range(200):
        append_line(path, {"writer": writer, "number": number, "filling": "x" * 300})


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    found = [(row["writer"], row["number"]) for row in lines(path)]
    assert sorted(found) == [(writer, number) for writer in range(3) for number in range(200)]


def test_rows_that_are_no_json_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n{"a":\n{"a": 2}\n')
    assert list(read_rows(tmp_path / "x.jsonl")) == [{"a": 1}, {"a": 2}]
    assert list(read_rows(tmp_path / "absent.jsonl")) == []


def test_a_full_disk_costs_one_message(tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = Monitor(tmp_path, MonitorConfig(wandb="off"), run_config={}, total_steps=100, rank=0, stream=stream)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    monitor.event("one")
    monitor.event("two")
    assert stream.getvalue().count("cannot write to") == 1
    assert "No space left" in stream.getvalue()


def test_a_closed_terminal_does_not_stop_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = Monitor(tmp_path, MonitorConfig(wandb="off"), run_config={}, total_steps=2, rank=0, stream=stream)
    stream.close()
    monitor.log({"loss/total": 1.0}, step=1)
    monitor.message("nobody reads this")
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_offline_run_holds_every_metric_and_no_secret(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Monitor(tmp_path, OFFLINE, run_config=SECRETS, total_steps=2, rank=0, stream=stream) as monitor:
        monitor.log({"loss/total": 2.0, "retrieval/entropy": 1.0}, step=1)
        monitor.log({"loss/total": 1.0, "retrieval/entropy": float("nan")}, step=2)
        monitor.summary({"joint": {"recall@1": 0.93}})
    assert "W&B: offline run in" in stream.getvalue()
    records = inspect(tmp_path)
    first, second = history(records)
    assert (first["loss/total"], first["retrieval/entropy"], first["trainer/step"]) == (2.0, 1.0, 1)
    assert (second["loss/total"], second["trainer/step"], second["num_nonfinite"]) == (1.0, 2, 1)
    assert {"glob_name": "*", "step_metric": "trainer/step"}.items() <= {
        key: value for record in records if "metric" in record for key, value in record["metric"].items()
    }.items()
    assert any(r["summary"]["update"].get("joint/recall@1") == 0.93 for r in records if r["type"] == "summary")
    config = next(record["run"]["config"]["update"] for record in records if record["type"] == "run")
    assert config["nested"] == {"HF_TOKEN": REDACTED, "list": [{"clientSecret": REDACTED}]}
    assert config["max_tokens"] == 64
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if b"value-of-" in path.read_bytes()]


def test_a_resume_continues_the_same_run(tmp_path: Path) -> None:
    for start in (0, 2):
        config = MonitorConfig(console=False, wandb="offline")
        with Monitor(tmp_path, config, run_config={}, total_steps=4, rank=0) as monitor:
            for step in (start + 1, start + 2):
                monitor.log({"loss/total": 1.0 / step}, step=step)
    records = inspect(tmp_path)
    assert len({record["run"]["run_id"] for record in records if record["type"] == "run"}) == 1
    assert [row["trainer/step"] for row in history(records)] == [1, 2, 3, 4]
    assert [row["_step"] for row in history(records)] == [0, 1, 2, 3]
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_an_unreachable_server_costs_no_time_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    stream = io.StringIO()
    config = MonitorConfig(wandb="online", init_timeout_s=1.0)
    monitor = Monitor(tmp_path, config, run_config={}, total_steps=3, rank=0, stream=stream)
    start = time.monotonic()
    for step in (1, 2, 3):
        monitor.log({"loss/total": 1.0}, step=step)
    assert time.monotonic() - start < 1.0
    monitor.finish()
    assert time.monotonic() - start < 20.0
    assert stream.getvalue().count("server not reached") == 1
    assert [row["event"] for row in lines(tmp_path / "events.jsonl")] == ["wandb_failed"]
    assert [row["trainer/step"] for row in history(inspect(tmp_path))] == [1, 2, 3]
    key = b"0123456789" * 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key in path.read_bytes()]


DIES_MIDWAY = """
import io, sys, time
from pathlib import Path
import psutil
from training.reporting.monitor import Monitor
from training.training_settings import MonitorConfig

stream = io.StringIO()
settings = MonitorConfig(wandb="offline")
with Monitor(Path(sys.argv[1]), settings, run_config={}, total_steps=9, rank=0, stream=stream) as monitor:
    monitor.log({"loss/total": 1.0}, step=1)
    deadline = time.monotonic() + 30
    while "offline run in" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    service = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
    assert service
    for process in service:
        process.kill()
    psutil.wait_procs(service, timeout=10)
    for step in range(2, 9):
        monitor.log({"loss/total": 1.0}, step=step)
print(stream.getvalue() + "trained")
"""


def test_wandb_that_dies_midway_is_reported_once(tmp_path: Path) -> None:
    result = python(DIES_MIDWAY, str(tmp_path))
    assert result.stdout.count("training goes on") == 1
    assert result.stdout.endswith("trained\n")
    assert result.stderr == ""
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    assert [row["event"] for row in lines(tmp_path / "events.jsonl")] == ["wandb_failed"]


def test_off_never_imports_wandb() -> None:
    code = (
        "import sys, pathlib, tempfile\n"
        "from training.reporting.monitor import Monitor\n"
        "from training.training_settings import MonitorConfig\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "monitor = Monitor(folder, MonitorConfig(wandb='off'), run_config={}, total_steps=1, rank=0)\n"
        "monitor.log({'loss/total': 1.0}, 1)\n"
        "assert not {'wandb', 'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    python(code)


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("off", {"WANDB_API_KEY": "x"}, "off"),
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
        ("online", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "online"),
        ("online", {}, "offline"),
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
    ],
)
def test_modes(setting: str, environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert wandb_mode(setting, {"NETRC": str(tmp_path / "absent"), **environment}) == expected


def test_netrc_counts_as_a_key(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example login user password x\n")
    environment = {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://wandb.example/"}
    assert wandb_mode("auto", environment) == "online"
    assert wandb_mode("auto", {**environment, "WANDB_BASE_URL": "https://other.example"}) == "offline"


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor\.wandb=of: must be one of auto, online, offline, off"):
        Monitor(tmp_path, MonitorConfig(wandb="of"), run_config={}, total_steps=1, rank=0)


@pytest.mark.parametrize(
    "key",
    [
        "key",
        "API_KEY",
        "apiKey",
        "wandb_api_key",
        "hf.token",
        "authToken",
        "DB_PASSWORD",
        "client-secret",
        "passwd_file",
        "tokens",
        "secrets",
        "mytoken",
    ],
)
def test_secret_keys_are_redacted(key: str) -> None:
    assert redact({"a": [{key: "x"}]}) == {"a": [{key: REDACTED}]}


@pytest.mark.parametrize("key", ["max_tokens", "batch_tokens", "keys"])
def test_counts_are_no_secrets(key: str) -> None:
    assert redact({key: 64}) == {key: 64}


def test_redaction_leaves_the_rest_alone() -> None:
    config = {"tokenizer": {"vocabulary": 3000}, "keyboard": "qwerty", "url": "https://host:80/a@b", "none": None}
    assert redact(config) == config
    assert redact(MonitorConfig(entity="me"))["entity"] == "me"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pass@host:8080/x", f"http://{REDACTED}@host:8080/x"),
        ("https://host/x?token=abc&k=4", f"https://host/x?token={REDACTED}&k=4"),
        ("a.api_key=abc b=2", f"a.api_key={REDACTED} b=2"),
        ("max_tokens=12", "max_tokens=12"),
        ("use hf_abcdefghijklmnopqrst now", f"use {REDACTED} now"),
    ],
)
def test_secrets_inside_text(text: str, expected: str) -> None:
    assert redact_text(text) == expected


class Clock:
    """A clock that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_line() -> None:
    clock = Clock()
    progress = Progress(250, io.StringIO(), clock=clock)
    metrics = {"loss/total": 1.2341, "perf/questions_per_s": 12.34, "index/generation": 2, "index/staleness_steps": 30}
    evaluation = {"eval/test/recall@1": 0.834, "eval/test/exact_match": 0.7, "eval/test/num_questions": 10}
    assert progress.line(evaluation, 119) == "step 119/250  test: recall@1 .83  exact_match .70"
    assert progress.line(metrics, 119) == "step 119/250  loss 1.234  recall@1 .83  12.3 q/s  gen 2 (stale 30)"
    clock.now = 6.0
    line = progress.line(metrics, 120)
    assert line == "step 120/250  loss 1.234  recall@1 .83  12.3 q/s  gen 2 (stale 30)  13m00s left"


def test_progress_is_limited_and_always_shows_the_last_step() -> None:
    clock = Clock()
    progress = Progress(100, io.StringIO(), clock=clock)
    shown = []
    for step in range(1, 101):
        clock.now += 0.25
        if progress.line({"loss/total": 1.0}, step) is not None:
            shown.append(step)
    assert shown == [1, 21, 41, 61, 81, 100]


def test_slow_steps_are_all_shown() -> None:
    clock = Clock()
    progress = Progress(5, io.StringIO(), clock=clock)
    for step in range(1, 6):
        clock.now += 60.0
        assert progress.line({"loss/total": float("nan")}, step) is not None
    assert progress.seconds_left(3) == pytest.approx(120.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (45, "45s"), (80, "1m20s"), (59.6, "1m00s"), (7500, "2h05m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_share() -> None:
    assert [share(value) for value in (0.0, 0.834, 1.0)] == [".00", ".83", "1.00"]


def test_timer_adds_parts_up() -> None:
    clock = Clock()
    timer = Timer(clock=clock)
    for seconds in (1.0, 2.0):
        with timer.measure("forward"):
            clock.now += seconds
    timer.add("search_wait", 0.5)
    assert timer.pop() == {"forward": 3.0, "search_wait": 0.5}
    assert timer.pop() == {}


def test_memory() -> None:
    assert 0.01 < memory_metrics()["perf/memory_rss_gib"] < 64
