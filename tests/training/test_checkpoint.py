"""Checkpoints: resumed training is bit for bit the uninterrupted one; what is damaged is refused and passed over."""

import importlib
import json
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from indexing.corpus.snapshot import TornSnapshot
from tests.helpers.distributed import spawn
from tests.helpers.toy import ToySystem, batches, toy_engine, train_steps
from training import checkpoint
from training.checkpoint import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from training.engine import engine_setup
from training.engine.engine import Engine
from training.models.parts.named_weights import load_weights_into
from training.training_settings import EngineConfig

DATA = batches(4, 8)
CONFIG = EngineConfig(clip_norm=0.5, weight_decay=0.01, timeout_s=60.0)
SETTINGS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
SETTINGS_OF_TWO = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]


def new_engine(stage: int, precision: str = "fp32", seed: int = 0) -> Engine:
    """With dropout, so that random states count."""
    return toy_engine(replace(CONFIG, zero_stage=stage, precision=precision), ToySystem(seed, dropout=0.3))


def save(engine: Engine, run_dir: Path, step: int, **settings: Any) -> Path:
    own = {"rng": rng_state(), "loader": {"order": np.arange(5) + engine.rank, "position": step}}
    return save_checkpoint(
        run_dir, step, engine=engine, state={"step": step, "generation": 3}, rank_state=own, **{"keep": 2, **settings}
    )


def measure_resume(run_dir: Path, stage: int, precision: str) -> dict[str, Any]:
    """Four steps with a save in the middle, and the last two again from the save."""
    engine = new_engine(stage, precision)
    torch.manual_seed(100 + engine.rank)
    train_steps(engine, DATA[:2])
    path = save(engine, run_dir, 2)
    norms = [result.grad_norm for result in train_steps(engine, DATA[2:])]
    weights = engine.consolidated_state()

    resumed = new_engine(stage, precision, seed=9)
    torch.manual_seed(1)
    saved = load_weights(path)
    state, own = load_checkpoint(path, resumed)
    set_rng_state(own["rng"])
    norms_again = [result.grad_norm for result in train_steps(resumed, DATA[2:])]
    again = resumed.consolidated_state()
    return {
        "equal": norms == norms_again and all(torch.equal(again[name], value) for name, value in weights.items()),
        "moved": any(not torch.equal(value, saved[name].float()) for name, value in weights.items()),
        "state": state,
        "loader": (own["loader"]["order"].tolist(), own["loader"]["position"]),
    }


@contextmanager
def small_disk(limit_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `limit_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def measure_full_disk(run_dir: Path, rank: int, stage: int) -> dict[str, Any]:
    """A save that works, then one per rank whose disk is full, then one that works again."""
    engine = new_engine(stage)
    train_steps(engine, DATA[:1])
    save(engine, run_dir, 1)
    errors = []
    for full in range(engine.world_size):
        with small_disk(2000 if rank == full else resource.RLIM_INFINITY), pytest.raises(OSError) as caught:
            save(engine, run_dir, 2)
        errors.append(str(caught.value))
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    engine.barrier()
    save(engine, run_dir, 3)
    return {"errors": errors, "left": left, "newest": newest_checkpoint(run_dir, print)}


def two_rank_measurements(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    engine_setup.PERSISTENT_ELEMENTS = 0
    found: dict[str, Any] = {}
    for stage, precision in SETTINGS_OF_TWO:
        name = f"{stage}-{precision}"
        found[name] = measure_resume(folder / name, stage, precision)
    found["full disk"] = [measure_full_disk(folder / f"full-{stage}", rank, stage) for stage in (0, 3)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    return spawn(two_rank_measurements, 2, folder, timeout_s=240.0)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_one_rank_resumes_bit_for_bit(
    tmp_path: Path, stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_setup, "PERSISTENT_ELEMENTS", 0)
    found = measure_resume(tmp_path, stage, precision)
    assert found["equal"]
    assert found["moved"]
    assert found["state"] == {"step": 2, "generation": 3}
    assert found["loader"] == ([0, 1, 2, 3, 4], 2)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS_OF_TWO)
def test_two_ranks_resume_bit_for_bit(two_ranks: list[dict[str, Any]], stage: int, precision: str) -> None:
    found = [measured[f"{stage}-{precision}"] for measured in two_ranks]
    assert [measured["equal"] for measured in found] == [True, True]
    assert found[0]["moved"]
    assert [measured["loader"] for measured in found] == [([0, 1, 2, 3, 4], 2), ([1, 2, 3, 4, 5], 2)]


def test_a_full_disk_on_any_rank_leaves_what_was_saved(two_ranks: list[dict[str, Any]], folder: Path) -> None:
    for position, stage in enumerate((0, 3)):
        for found in two_ranks:
            measured, directory = found["full disk"][position], folder / f"full-{stage}" / "checkpoints"
            for rank, error in enumerate(measured["errors"]):
                assert error.startswith(f"could not write checkpoint {directory / 'step-2'} (rank {rank}: ")
                assert error.endswith("earlier checkpoints are whole")
            assert measured["left"] == ["latest", "step-1"]
            assert measured["newest"] == directory / "step-3"


@pytest.mark.parametrize("stage", [0, 3])
def test_another_number_of_ranks_is_refused(two_ranks: list[dict[str, Any]], folder: Path, stage: int) -> None:
    path = newest_checkpoint(folder / f"{stage}-fp32", pytest.fail)
    assert path is not None
    with pytest.raises(ValueError, match=r"step-2/engine was written with number of ranks 2, this run has 1: resume"):
        load_checkpoint(path, new_engine(stage))


def test_other_engine_settings_are_refused(saved: Path) -> None:
    path = saved / "checkpoints" / "step-2"
    with pytest.raises(ValueError, match=r"engine.zero_stage 2, this run has 3"):
        load_checkpoint(path, new_engine(3))
    with pytest.raises(ValueError, match=r"engine.precision fp32, this run has bf16"):
        load_checkpoint(path, new_engine(2, "bf16"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints step-1 and step-2, never changed by a test."""
    run_dir = tmp_path_factory.mktemp("saved")
    (run_dir / "config.yaml").write_text("a: 1\n")
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "vocabulary.txt").write_text("word\n")
    engine = new_engine(2)
    for step in (1, 2):
        train_steps(engine, DATA[step : step + 1])
        files = {"config.yaml": run_dir / "config.yaml", "tokenizers/generator": run_dir / "tokenizer"}
        save(engine, run_dir, step, files=files)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_what_a_checkpoint_holds(saved: Path) -> None:
    path = saved / "checkpoints" / "step-2"
    assert newest_checkpoint(saved, pytest.fail) == path
    assert (saved / "checkpoints" / "latest").read_text() == "step-2\n"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.yaml",
        "engine",
        "manifest.json",
        "model.safetensors",
        "rank-0.pt",
        "state.json",
        "tokenizers",
    ]
    assert (path / "tokenizers" / "generator" / "vocabulary.txt").read_text() == "word\n"
    assert not list(path.rglob("*.py"))
    assert json.loads((path / "state.json").read_text()) == {"step": 2, "generation": 3}


def test_weights_load_without_an_engine(saved: Path) -> None:
    weights = load_weights(saved / "checkpoints" / "step-2")
    separate = ToySystem(seed=5, shared=False)
    load_weights_into(separate, weights)  # a shared tensor is there under both names
    for module in (separate.retriever.query_encoder, separate.retriever.passage_encoder):
        assert torch.equal(module.layer.weight, weights["retriever.query_encoder.layer.weight"])
    engine = new_engine(3, seed=6)
    engine.load_consolidated(weights)
    assert torch.equal(engine.consolidated_state()["generator.layer.bias"], weights["generator.layer.bias"])


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGED = (
    "manifest.json",
    "model.safetensors",
    "rank-0.pt",
    "state.json",
    "config.yaml",
    "engine/layout.json",
    "engine/state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "engine/state/mp_rank_00_model_states.pt",
)


@pytest.mark.parametrize("damage", [flip_bit, cut, Path.unlink])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_name(run_dir: Path, name: str, damage: Callable[[Path], None]) -> None:
    newest, warnings = run_dir / "checkpoints" / "step-2", []
    damage(newest / name)
    assert newest_checkpoint(run_dir, warnings.append) == run_dir / "checkpoints" / "step-1"
    assert len(warnings) == 1
    assert f"{newest} is incomplete or damaged" in warnings[0]
    with pytest.raises(TornSnapshot):
        load_weights(newest)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    (tmp_path / "checkpoints" / "step-7" / "engine").mkdir(parents=True)
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) is None
    assert "step-7 is incomplete or damaged: no manifest.json" in warnings[0]


def test_a_whole_checkpoint_of_the_same_step_is_left_alone_and_a_damaged_one_written_anew(run_dir: Path) -> None:
    newest, engine = run_dir / "checkpoints" / "step-2", new_engine(2)
    before = (newest / "manifest.json").read_bytes()
    save(engine, run_dir, 2)
    assert (newest / "manifest.json").read_bytes() == before
    flip_bit(newest / "model.safetensors")
    save(engine, run_dir, 2)
    assert newest_checkpoint(run_dir, pytest.fail) == newest
    assert (newest / "manifest.json").read_bytes() != before


def test_old_checkpoints_go_and_damaged_later_ones_too(run_dir: Path) -> None:
    flip_bit(run_dir / "checkpoints" / "step-2" / "state.json")
    engine = new_engine(2)
    save(engine, run_dir, 1)  # whole: nothing happens
    shutil.rmtree(run_dir / "checkpoints" / "step-1")
    for step in (1, 3, 4, 5):
        save(engine, run_dir, step, protected=[1])
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step-1", "step-4", "step-5"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-5\n"


def test_a_state_that_is_no_json_is_an_error_that_leaves_nothing(run_dir: Path) -> None:
    with pytest.raises(OSError, match=r"step-3 .rank 0: TypeError: .*; earlier checkpoints are whole"):
        save_checkpoint(run_dir, 3, engine=new_engine(2), state={"bad": {1, 2}}, rank_state={}, keep=2)
    assert newest_checkpoint(run_dir, pytest.fail) == run_dir / "checkpoints" / "step-2"


def test_random_states_go_back() -> None:
    states = rng_state()
    drawn = random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()
    set_rng_state(states)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


def test_state_that_an_earlier_version_pickled_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), (present, present_name) in checkpoint.MOVED.items():
        kind = getattr(importlib.import_module(present), present_name)
        earlier = type(name, (), {"__module__": module})
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, ModuleType(module))
            patch.setattr(sys.modules[module], name, earlier, raising=False)
            torch.save({"state": [earlier()]}, tmp_path / "rank-0.pt")
        read = torch.load(tmp_path / "rank-0.pt", weights_only=False, pickle_module=checkpoint._Pickles)
        assert type(read["state"][0]) is kind
