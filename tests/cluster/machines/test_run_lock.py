"""A run folder is held by one process; what a process that has ended left is taken over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.machines import run_lock
from cluster.machines.run_lock import LOCK_FILE, clear, holding

HOLD = "import sys, time; from pathlib import Path; from cluster.machines.run_lock import holding\n"
HOLD += "with holding(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


def test_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        refusal = rf"is in use by process {first.pid} on .* take another run\.name"
        with pytest.raises(ValueError, match=refusal), holding(tmp_path):
            raise AssertionError("two hold it")
        first.kill()
    with holding(tmp_path), holding(tmp_path):  # again by the same process
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        (tmp_path / "old").mkdir()
        clear(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert list(tmp_path.iterdir()) == []


def test_lock_of_another_machine_counts_while_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    monkeypatch.setattr(run_lock, "LOOK_S", 0.1)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    with holding(tmp_path):
        monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "another-machine")
        with pytest.raises(ValueError, match="is in use by process"), holding(tmp_path):
            raise AssertionError("two hold it")
        monkeypatch.undo()
        monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "gone", "pid": 1, "created": 0.0, "command": "tandem train"}))
    with holding(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
