"""The real command line as a process of its own, with an eye on every process that it starts."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.1
LOOK_S = 2.0  # between looks at all processes of the machine
NOTHING: Mapping[str, str] = {}


class Command:
    """`tandem ARGUMENTS` under way. As a context manager, nothing of it outlives the block."""

    def __init__(
        self, *arguments: str, log: Path, module: str = "cluster.cli", environment: Mapping[str, str] = NOTHING
    ) -> None:
        """`log` gets what it prints; `environment` is added to the variables."""
        self.log, self.began = log, time.monotonic()
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "RAY_"))}
        self._mark = variables["STARTED_BY_TEST"] = uuid.uuid4().hex  # every process that it starts inherits it
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=variables | dict(environment),
                cwd=ROOT,
            )
        self._known: set[psutil.Process] = set()
        self._looked = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The driver first, so that it can take Ray down; then whatever is left."""
        self.descendants()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for process in self.left():
            kill(process)

    @property
    def printed(self) -> str:
        """Everything so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float) -> int:
        """The exit code. Raises AssertionError with what was printed when it takes longer."""
        self.until(lambda: self.process.poll() is not None, timeout_s, "its end", must_run=False)
        return self.process.returncode

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str, must_run: bool = True) -> Any:
        """Wait until `condition()` is true, and return what it returned."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            code = self.process.poll()
            assert not must_run or code is None, f"ended with {code} before {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"no {what} after {timeout_s:.0f} s:\n{self.printed}"
            if time.monotonic() - self._looked > LOOK_S:
                self.descendants()
            time.sleep(POLL_S)
        return found

    def descendants(self, title: str = "") -> list[psutil.Process]:
        """Living processes that this command started, itself or through others, whose command line starts with `title`
        (Ray writes the actor's class there)."""
        self._looked = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            self._known |= set(psutil.Process(self.process.pid).children(recursive=True))
        for orphan in self.left():  # their children are not among the command's any more
            with suppress(psutil.NoSuchProcess):
                if orphan.ppid() == 1:
                    self._known |= set(orphan.children(recursive=True))
        return [process for process in self.left() if _title(process).startswith(title)]

    def marked(self) -> list[psutil.Process]:
        """Living processes of this command, whoever their parent is by now."""
        return [process for process in psutil.process_iter() if _lives(process) and self._mark in _variables(process)]

    def left(self) -> list[psutil.Process]:
        """Those of them that have been seen and still live, also after the command itself has ended."""
        return [process for process in self._known if _lives(process)]


def kill(process: psutil.Process) -> None:
    """SIGKILL; harmless when it has ended."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def rows(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Whole lines of a .jsonl file, of one kind of event if named; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    return [row for row in found if not event or row.get("event") == event]


def _lives(process: psutil.Process) -> bool:
    """Whether this very process still runs; one that ended and was not collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _variables(process: psutil.Process) -> list[str]:
    try:
        return [value for name, value in process.environ().items() if name == "STARTED_BY_TEST"]
    except psutil.Error:  # it has ended, or is another user's
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
