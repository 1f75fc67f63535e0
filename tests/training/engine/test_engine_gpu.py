"""The engine on one CUDA device: bf16 under ZeRO 2 and 3 learns, publishes, and resumes bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.toy import RATES, ToySystem, batches, loss_of, reference, toy_engine, train_steps
from training.checkpoint import load_checkpoint, load_weights, rng_state, save_checkpoint, set_rng_state
from training.engine import engine_setup
from training.engine.engine import Engine
from training.training_settings import EngineConfig

pytestmark = pytest.mark.gpu

DATA = batches(1, 32) * 60
CONFIG = EngineConfig(precision="bf16", clip_norm=1.0, timeout_s=120.0)


@pytest.fixture(autouse=True)
def nothing_persistent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, ZeRO 3 would keep the toy whole."""
    monkeypatch.setattr(engine_setup, "PERSISTENT_ELEMENTS", 0)


def loss(engine: Engine) -> float:
    with torch.no_grad():
        return loss_of(engine(ToySystem.score, *(t.to(engine.device) for t in DATA[0]))).item()


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_reduces_the_loss(stage: int, precision: str) -> None:
    engine = toy_engine(replace(CONFIG, zero_stage=stage, precision=precision))
    assert engine.device.type == "cuda"
    before, results = loss(engine), train_steps(engine, DATA)
    assert all(result.updated for result in results)
    assert loss(engine) < before - 1.0
    published = engine.consolidated_state("retriever.passage_encoder")
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in published.values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp32_equals_the_cpu(stage: int) -> None:
    config = replace(CONFIG, zero_stage=stage, precision="fp32", epsilon=0.05)
    engine = toy_engine(config)
    results, expected = train_steps(engine, DATA[:3]), reference(DATA[:3], config)
    assert results[-1].grad_norm == pytest.approx(expected.grad_norms[-1], rel=1e-2)
    for name, value in engine.consolidated_state().items():
        torch.testing.assert_close(value, expected.weights[name], rtol=0, atol=2e-3)  # TF32 may round products


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_not_finite_changes_nothing(stage: int) -> None:
    engine = toy_engine(replace(CONFIG, zero_stage=stage))
    train_steps(engine, DATA[:2])
    before = engine.consolidated_state()
    engine.backward(loss_of(engine(ToySystem.score, *(t.to(engine.device) for t in DATA[0]))) * float("nan"))
    assert not engine.step(RATES).updated
    after = engine.consolidated_state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert train_steps(engine, DATA[:1])[0].updated


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bit_for_bit(tmp_path: Path, stage: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        engine = toy_engine(replace(CONFIG, zero_stage=stage), ToySystem(dropout=0.3))
        train_steps(engine, DATA[:3])
        path = save_checkpoint(tmp_path, 3, engine=engine, state={"step": 3}, rank_state={"rng": rng_state()}, keep=1)
        train_steps(engine, DATA[:3])

        resumed = toy_engine(replace(CONFIG, zero_stage=stage), ToySystem(seed=9, dropout=0.3))
        state, own = load_checkpoint(path, resumed)
        set_rng_state(own["rng"])
        train_steps(resumed, DATA[:3])
    finally:
        torch.use_deterministic_algorithms(False)
    assert state == {"step": 3}
    weights = engine.consolidated_state()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.consolidated_state().items())
    assert all(value.dtype == torch.bfloat16 for value in load_weights(path).values() if value.dim() > 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_optimizer_learns(stage: int) -> None:
    engine = toy_engine(replace(CONFIG, zero_stage=stage, offload_optimizer=True))
    before = loss(engine)
    train_steps(engine, DATA)
    assert loss(engine) < before - 1.0
