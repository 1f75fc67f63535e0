"""The verb `test`: every check of the project, in order, up to the first that fails."""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("ruff", "pyright", "importlinter", "pytest")


def commands(pytest_options: list[str]) -> list[list[str]]:
    """The checks, cheapest first."""
    python = sys.executable
    return [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "pyright", "--pythonpath", python],
        [str(Path(python).parent / "lint-imports")],
        [python, "-m", "pytest", *pytest_options],
    ]


def run(pytest_options: list[str]) -> int:
    """Run all checks in the project's folder, printing each; returns the exit code of the one that failed, else 0.
    Raises ValueError where the tools are not installed."""
    missing = [tool for tool in TOOLS if find_spec(tool) is None]
    if missing:
        raise ValueError(
            f"test: {', '.join(missing)} not installed; use ./launch.sh test, or pip install -e '.[cpu,dev]'"
        )
    for command in commands(pytest_options):
        print(f"== {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            print(f"== failed with exit code {code}", file=sys.stderr, flush=True)
            return code
    print("== all checks passed", flush=True)
    return 0
