"""launch.sh and .ci/run: what can be said about them without installing anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """The parts of the project that an answer without an environment needs, in a folder without .venv."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("cluster", "training", "indexing"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def stand_in(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "SLURM_", "RAY_"))
    }
    command = [str(folder / "launch.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**variables, **environment}, check=False
    )


@pytest.mark.parametrize("script", ["launch.sh", ".ci/run"])
def test_scripts_parse_and_can_be_called(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_help_needs_no_environment(bare_copy: Path) -> None:
    result = call(bare_copy, "--help")
    assert result.returncode == 0
    assert "usage: tandem" in result.stdout
    assert not (bare_copy / ".venv").exists()


def test_mistyped_verb_is_answered_before_the_installation(bare_copy: Path) -> None:
    result = call(bare_copy, "trian")
    assert result.returncode == 2
    assert "Did you mean train?" in result.stderr
    assert not (bare_copy / ".venv").exists()


def test_unknown_extra_and_missing_python_are_named(bare_copy: Path) -> None:
    result = call(bare_copy, "show", TANDEM_EXTRA="tpu")
    assert result.returncode == 2
    assert "TANDEM_EXTRA=tpu: must be cpu or gpu" in result.stderr
    result = call(bare_copy, "show", TANDEM_PYTHON="python-that-is-not-here")
    assert result.returncode == 1
    assert "needs Python 3.11 or newer" in result.stderr


def test_failed_installation_is_not_taken_for_a_finished_one(bare_copy: Path) -> None:
    """An environment of an older pyproject.toml whose pip fails: exit code 1, the log is named, no stamp is left."""
    python = stand_in(bare_copy / ".venv" / "bin" / "python", "echo no such release; exit 1")
    stand_in(python.with_name("tandem"), "echo never")
    stamp = bare_copy / ".venv" / "installed"
    stamp.write_text(f"cpu {bare_copy}\nolder", encoding="utf-8")
    result = call(bare_copy, "show", TANDEM_EXTRA="cpu")
    assert result.returncode == 1
    assert "no such release" in result.stderr
    assert f"the installation failed; the whole log: {bare_copy}/.venv/install.log" in result.stderr
    assert not stamp.exists()


def test_finished_installation_is_used_without_pip(bare_copy: Path) -> None:
    """A stand-in environment with a stamp: the command is called at once, with .venv/bin first on the path."""
    tools = stand_in(bare_copy / ".venv" / "bin" / "tandem", 'echo "tandem $* $PATH"').parent
    stamp = f"cpu {bare_copy}\n{(bare_copy / 'pyproject.toml').read_text(encoding='utf-8')}"
    (bare_copy / ".venv" / "installed").write_text(stamp, encoding="utf-8")
    result = call(bare_copy, "show", "a b.yaml", TANDEM_EXTRA="cpu")
    assert result.returncode == 0
    assert result.stdout.startswith(f"tandem show a b.yaml {tools}:")
    assert call(bare_copy, TANDEM_EXTRA="cpu").stdout.startswith("tandem train")
