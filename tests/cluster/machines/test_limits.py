"""A process that may use one processor plans with one, and computes with one, whatever the machine has."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from cluster.machines.session import MIN_LOGICAL_CPUS, logical_cpus, set_environment
set_environment()
from cluster.planning.hardware import this_host
from cluster.service.actors import ShardActor
from indexing.dense.faiss_library import load_faiss
from indexing.indexing_settings import IndexConfig
ShardActor(0, 0, 10, IndexConfig(), 47)
print(logical_cpus() == MIN_LOGICAL_CPUS, os.environ["OMP_NUM_THREADS"], load_faiss().omp_get_max_threads())
print(this_host(16, 4, 0.04).cpus)
"""


def test_one_processor() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["True", "1", "1", "1"], done.stdout + done.stderr
