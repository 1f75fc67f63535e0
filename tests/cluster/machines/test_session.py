"""A local Ray listens on loopback only, behind a private token, and leaves nothing behind when its driver is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.machines import session

DRIVER = """
import json, os, subprocess, sys, time
from cluster.machines import session

connection = session.start_or_join("orphans", num_gpus=0)
import ray

@ray.remote(num_cpus=0, max_restarts=-1)
class Idle:
    def environment(self):
        return {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "CUDA_VISIBLE_DEVICES")}

idle = [Idle.options(name=f"idle-{i}").remote() for i in range(2)]
environments = ray.get([one.environment.remote() for one in idle])
print(json.dumps({"logs": connection.logs, "address": connection.address, "environment": environments[0]}), flush=True)
time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory without a token."""
    return tmp_path


def test_loopback_token_and_no_orphans(home: Path) -> None:
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        assert driver.stderr is not None
        line = driver.stdout.readline()
        assert line, driver.stderr.read()
        told = json.loads(line)
        token = home / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        secret = token.read_text()
        assert len(secret) == 64
        assert told["address"].startswith("127.0.0.1:")
        assert told["environment"] == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "CUDA_VISIBLE_DEVICES": ""}
        processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        addresses = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in processes
            for connection in process.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}
        assert not [path for path in Path(told["logs"]).rglob("*") if path.is_file() and secret in _text(path)]
        driver.send_signal(signal.SIGKILL)
        driver.wait(10)
        ours = [process for process in processes if "Agent" not in _name(process)]  # those two take a minute
        _, alive = psutil.wait_procs(ours, timeout=90)
        assert not alive, [_name(process) for process in alive]
    finally:
        driver.kill()
        for process in psutil.process_iter():
            if str(home) in _home_of(process) and process.pid != os.getpid():
                process.kill()


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _home_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("HOME", "")
    except psutil.Error:
        return ""


def test_a_token_that_others_can_read_is_closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    session._ensure_private_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"


def test_ray_that_was_imported_too_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_worker_niceness")
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(RuntimeError, match="RAY_worker_niceness"):
        session.set_environment()


def test_a_slow_machine_gets_more_than_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    attempts: list[int] = []

    def init(works_at: int) -> str:
        attempts.append(1)
        if len(attempts) < works_at:
            raise Exception("The current node timed out during startup.")
        return "started"

    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init)
    assert session._start_patiently(works_at=3) == "started"
    attempts.clear()
    with pytest.raises(RuntimeError, match="did not start in 3 attempts"):
        session._start_patiently(works_at=4)
