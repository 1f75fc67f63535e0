"""Processors and memory of this process: in folders laid out as the kernel lays them out, and under real limits."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from indexing.allowance import usable_cpus, usable_memory

ROOT = Path(__file__).resolve().parents[2]
CPUS = len(os.sched_getaffinity(0))
MIB = 2**20
HALF_A_CPU = {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}


def lay_out(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with the groups of this process, as /proc/self/cgroup says them, and files below /sys/fs/cgroup."""
    for path, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n" if text else "", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/", {"cpu.max": "100000 100000"}),  # a container sees its own group as the top
        ("0::/job 7/step", {"job 7/cpu.max": "199000 100000", "job 7/step/cpu.max": "max 100000"}),  # 1.99: one whole
        ("0::/not/seen/here", {"cpu.max": "50000 100000"}),  # half a processor is one, too
        ("3:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "1", "cpu,cpuacct/job/cpu.cfs_period_us": "9"}),
        ("5:cpu:/docker/x\n0::/", {f"cpu/{name}": text for name, text in HALF_A_CPU.items()}),
    ],
)
def test_a_quota_of_processors(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    assert usable_cpus(lay_out(tmp_path, groups, files)) == 1


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/job", {"job/cpu.max": "max 100000", "job/memory.max": "max", "job/memory.current": "4096"}),
        (
            "4:memory:/job\n3:cpu:/job",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}
            | {"memory/job/memory.limit_in_bytes": "9223372036854771712", "memory/job/memory.usage_in_bytes": "4096"},
        ),
        ("0::/job", {"other/cpu.max": "1 9", "other/memory.max": "1", "other/memory.current": "1"}),
        ("", {}),
    ],
)
def test_groups_without_a_limit(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    root = lay_out(tmp_path, groups, files)
    assert usable_cpus(root) == CPUS
    total, free = usable_memory(root)
    assert total == psutil.virtual_memory().total
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert usable_cpus(tmp_path / "no system of Linux") == CPUS


@pytest.mark.parametrize("place", ["", "job/", "job/step/"])
def test_a_limit_of_memory_at_any_height(tmp_path: Path, place: str) -> None:
    """300 of 512 MiB are in use, and 100 of them are pages of files that the kernel gives back."""
    second = {f"{place}memory.max": str(512 * MIB), f"{place}memory.current": str(300 * MIB)}
    second[f"{place}memory.stat"] = f"anon 5\ninactive_file {100 * MIB}\nactive_file 7"
    root = lay_out(tmp_path / "2", "0::/job/step", second)
    assert usable_memory(root) == (512 * MIB, 312 * MIB)
    first = {f"{place}memory.limit_in_bytes": str(512 * MIB), f"{place}memory.usage_in_bytes": str(300 * MIB)}
    first[f"{place}memory.stat"] = f"inactive_file 3\ntotal_inactive_file {100 * MIB}"
    root = lay_out(
        tmp_path / "1", "9:name=systemd:/\n4:memory:/job/step", {f"memory/{name}": text for name, text in first.items()}
    )
    assert usable_memory(root) == (512 * MIB, 312 * MIB)


def test_the_tightest_group_of_several_counts(tmp_path: Path) -> None:
    files = {"memory.max": f"{1000 * MIB}", "memory.current": f"{990 * MIB}"}
    files |= {"job/memory.max": f"{500 * MIB}", "job/memory.current": f"{100 * MIB}"}
    assert usable_memory(lay_out(tmp_path, "0::/job", files)) == (500 * MIB, 10 * MIB)


def said(code: str, before: str = "") -> list[str]:
    """The words that a new process prints, which ran `before` first."""
    line = f"import os\n{before}\n{code}"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, env=variables, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_an_affinity_is_a_limit() -> None:
    code = "from indexing.allowance import usable_cpus; print(usable_cpus())"
    assert said(code, f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})") == ["1"]
    assert said(code) == [str(CPUS)]


@pytest.fixture
def group() -> Iterator[dict[str, str]]:
    """A real control group with 256 MiB and half a processor; yields the file of each controller that takes a
    process."""
    name, limits = f"tandem-{uuid.uuid4().hex[:8]}", {"memory": {"memory.limit_in_bytes": str(256 * MIB)}}
    joins: dict[str, str] = {}
    with ExitStack() as stack:
        for controller, files in (limits | {"cpu": HALF_A_CPU}).items():
            folder = Path("/sys/fs/cgroup") / controller / name
            with suppress(OSError):
                folder.mkdir()
                stack.callback(folder.rmdir)
                for file, text in files.items():
                    (folder / file).write_text(text)
                joins[controller] = str(folder / "cgroup.procs")
        if not joins:
            pytest.skip("no control group may be made here")
        yield joins


def test_a_real_control_group(group: dict[str, str]) -> None:
    """What FAISS starts is held to it, too."""
    join = "\n".join(f"open({path!r}, 'w').write(str(os.getpid()))" for path in group.values())
    code = "from indexing.allowance import usable_cpus, usable_memory; print(usable_cpus(), *usable_memory())"
    cpus, total, free = map(float, said(code, join))
    if "memory" in group:
        assert total == 256 * MIB
        assert 0 < free < 256 * MIB
    if "cpu" in group:
        assert cpus == 1
        code = "from indexing.dense.faiss_library import load_faiss; print(load_faiss().omp_get_max_threads())"
        assert said(code, join) == ["1"]
        assert said(code) == [str(CPUS)]
