"""What is planned has room: on two nodes that Ray, left to itself, would fill so that no trainer fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(280)
def test_everything_starts_where_it_was_planned(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.cluster.service.two_small_nodes", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=260)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, last = done.stdout.splitlines()
    told = json.loads(last)
    refused = told.pop("no room")
    assert len(told) == 3
    for found in told.values():
        for seat, nodes in found.pop("planned").items():
            assert found[seat] == nodes, seat
    for found in told.values():
        zero, one = found["index shard"][:2], found["index shard"][2:]
        assert len(set(zero)) == len(set(one)) == 2  # the replicas of a shard are on two nodes
    apart = told["a trainer of 2 GPUs"]
    assert set(apart["trainer"]).isdisjoint(apart["refresh worker"])
    assert refused.startswith(
        "there was no room for the trainers within 5 s (cluster.start_timeout_s): 1 x trainer of 4"
    )
    assert "free: " in refused
    assert "placement on 2 node(s) with 10 CPU and 4 GPU" in refused
    assert "2 CPU and 2 GPU on " in refused
    assert "3 CPU and 2 GPU on " in refused
    assert any(line.startswith("waits ") and "1 x trainer of 4 CPU and 0 GPU; free: " in line for line in said)
