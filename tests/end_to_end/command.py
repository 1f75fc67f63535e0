"""The real command line as a process of its own, with an eye on every process that it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.1


@dataclass(frozen=True)
class Process:
    """A line of /proc; `started` tells a process from a later one with the same id."""

    id: int
    parent: int
    started: int
    state: str

    @property
    def title(self) -> str:
        """The command line; Ray writes the actor's class there."""
        try:
            words = Path(f"/proc/{self.id}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return ""
        return b" ".join(words).decode(errors="replace").strip()

    @property
    def lives(self) -> bool:
        """Whether this very process still runs (one that ended and was not collected does not)."""
        now = _read(self.id)
        return now is not None and now.started == self.started and now.state != "Z"


class Command:
    """`tandem ARGUMENTS` under way. As a context manager, nothing of it outlives the block."""

    def __init__(self, *arguments: str, log: Path) -> None:
        """`log` gets what it prints."""
        self.log, self.began = log, time.monotonic()
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "RAY_"))}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=variables,
                cwd=ROOT,
            )
        self._known: dict[int, Process] = {}

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
            self.descendants()
            time.sleep(POLL_S)
        return found

    def descendants(self, title: str = "") -> list[Process]:
        """Living processes that this command started, itself or through others, whose title starts with `title`."""
        everyone = _everyone()
        family = {self.process.pid} | {known.id for known in self._known.values() if known.lives}
        grown = True
        while grown:
            more = {process.id for process in everyone if process.parent in family} - family
            family |= more
            grown = bool(more)
        found = [process for process in everyone if process.id in family - {self.process.pid}]
        self._known |= {process.id: process for process in found}
        return [process for process in found if process.lives and process.title.startswith(title)]

    def left(self) -> list[Process]:
        """Those of them that have been seen and still live, also after the command itself has ended."""
        return [process for process in self._known.values() if process.lives]


def kill(process: Process) -> None:
    """SIGKILL; harmless when it has ended."""
    if process.lives:
        try:
            os.kill(process.id, signal.SIGKILL)
        except ProcessLookupError:
            return


def rows(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Whole lines of a .jsonl file, of one kind of event if named; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    return [row for row in found if not event or row.get("event") == event]


def _everyone() -> list[Process]:
    found = [_read(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for process in found if process is not None]


def _read(number: int) -> Process | None:
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    state, parent, *rest = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return Process(number, int(parent), int(rest[17]), state)
