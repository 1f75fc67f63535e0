"""Runs the verb `test`: every check of the project, in order, up to the first that fails.

Without options for pytest the tests run in two processes side by side: those of the cluster wait for Ray most of the
time, the others compute, at a lower priority. The output of the second process is printed when both have ended.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ruff", "pyright", "importlinter", "mkdocs", "pytest")
WAITING = ("tests/cluster", "tests/end_to_end", "tests/tandem")
COMPUTING = ("tests/indexing", "tests/training", "tests/docs", "tests/test_house.py")
NICENESS = 5  # added to the priority number of the tests that compute


def commands() -> list[list[str]]:
    """Return the commands of the checks before the tests; the last one counts lines."""
    python = sys.executable
    return [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "pyright", "--pythonpath", python],
        [str(Path(python).parent / "lint-imports")],
        [python, "-m", "pyright", "--pythonpath", python, "--verifytypes", "tandem", "--ignoreexternal"],
        [python, "-m", "mkdocs", "build", "--strict"],
        [python, "-m", "tests.code_size"],  # lines of each room and the longest functions, against the budget
    ]


def run(pytest_options: list[str]) -> int:
    """Run all checks in the project's folder and print each. Returns the exit code of the one that failed, else 0.
    Raises ValueError if a tool is not installed."""
    missing = [tool for tool in TOOLS if find_spec(tool) is None]
    if missing:
        raise ValueError(
            f"test: {', '.join(missing)} not installed; use ./launch.sh test, or pip install -e '.[cpu,dev]'"
        )
    for command in commands():
        _announce(command)
        # the type checker finds the public face from outside by this path alone
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
            return _failed(code)
    if code := run_tests(pytest_options):
        return _failed(code)
    print("== all checks passed", flush=True)
    return 0


def run_tests(options: list[str]) -> int:
    """Run pytest with these options, or all tests in two processes if there are none. Returns the exit code of the
    process that failed, else 0."""
    pytest = [sys.executable, "-m", "pytest"]
    if options:
        _announce([*pytest, *options])
        return subprocess.run([*pytest, *options], cwd=ROOT).returncode
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        _announce([*pytest, *COMPUTING])
        beside = subprocess.Popen(
            [*pytest, *COMPUTING],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(NICENESS),
        )
        try:
            _announce([*pytest, *WAITING])
            code = subprocess.run([*pytest, *WAITING], cwd=ROOT).returncode
            other = beside.wait()
        finally:
            beside.kill()
        _announce([*pytest, *COMPUTING])
        output.seek(0)
        print(output.read(), flush=True)
    return code or other


def _announce(command: list[str]) -> None:
    print(f"== {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)


def _failed(code: int) -> int:
    print(f"== failed with exit code {code}", file=sys.stderr, flush=True)
    return code
