"""A machine of the cluster is lost with everything that ran on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.survival.conftest import BOUND_S

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(280)
def test_a_lost_node_costs_a_pause_and_nothing_else(tmp_path: Path) -> None:
    """Its shards come back on the node that is left, and the refresh goes on there."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.cluster.survival.two_nodes", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=260)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    lost = [name for name, node in told["before"].items() if node == told["lost"]]
    assert any("shard" in name for name in lost), told
    assert told["lost"] not in told["after"].values()
    assert not told["violations"]
    assert told["searches"]
    assert told["longest_s"] < BOUND_S
    assert told["weights_version"] == 2
