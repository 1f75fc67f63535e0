"""The engine on one rank: offload, bf16, groups that do not train, settings and groups that are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.toy import (
    PLAIN,
    RATES,
    Scored,
    ToySystem,
    arrays,
    batches,
    close,
    groups_of,
    loss_of,
    part,
    reference,
    toy_engine,
    train_steps,
)
from training.engine import engine_setup
from training.engine.engine import Engine

STAGES = (0, 1, 2, 3)
DATA = batches(3, 8)
CLIP = 0.05  # below every norm of the toy


@pytest.fixture(autouse=True)
def nothing_persistent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, ZeRO 3 would keep the toy whole on every rank."""
    monkeypatch.setattr(engine_setup, "PERSISTENT_ELEMENTS", 0)


@pytest.mark.parametrize(
    ("hidden", "has_products", "expected"),
    [(256, True, "fp32"), (384, True, "bf16_autocast"), (768, True, "bf16_autocast"), (768, False, "fp32")],
)
def test_automatic_precision_goes_by_the_processor_and_the_width(
    hidden: int, has_products: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding and the narrow head do not decide: it is the matrix in the middle that does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine_setup, "processor_multiplies_bf16", lambda: has_products)
    layers = [nn.Embedding(3000, hidden), nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)]
    module = nn.Sequential(*layers, nn.Linear(hidden, 1))
    assert engine_setup.concrete_precision("auto", module) == expected
    assert engine_setup.concrete_precision("bf16", module) == "bf16"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_equals_plain_autograd(stage: int) -> None:
    config = replace(PLAIN, zero_stage=stage, clip_norm=CLIP, offload_optimizer=True)
    engine = toy_engine(config)
    results = train_steps(engine, DATA)
    expected = reference(DATA, config)
    close(arrays(engine.consolidated_state()), expected.weights)
    assert results[-1].grad_norm == pytest.approx(expected.grad_norms[-1], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_group_without_gradient_gets_none_of_an_earlier_step(stage: int) -> None:
    engine = toy_engine(replace(PLAIN, zero_stage=stage, weight_decay=0.0, beta1=0.0))
    train_steps(engine, DATA[:1])
    before = engine.consolidated_state("retriever")
    scored = engine(ToySystem.score, *DATA[1])
    assert isinstance(scored, Scored)
    engine.backward(scored.log_probs.mean())
    assert engine.step(RATES).grad_norm["retriever"] == 0.0
    after = engine.consolidated_state("retriever")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_steps_and_master_weights(stage: int) -> None:
    engine = toy_engine(replace(PLAIN, zero_stage=stage, precision="bf16", gradient_accumulation=2))
    engine.load_consolidated(ToySystem(seed=7).state_dict())
    rounded = {name: value.bfloat16().float() for name, value in ToySystem(seed=7).state_dict().items()}
    close(arrays(engine.consolidated_state()), rounded, atol=0.0)
    first = loss_of(engine(ToySystem.score, *DATA[0])).item()
    small = {name: rate / 1000 for name, rate in RATES.items()}  # each below the resolution of bf16
    for _ in range(40):
        for index in range(2):
            engine.backward(loss_of(engine(ToySystem.score, *part(DATA[0], index, 2))))
            engine.step(small)
    moved = engine.consolidated_state()["generator.layer.weight"] != rounded["generator.layer.weight"]
    assert 0 < moved.sum() < moved.numel()  # only a master copy adds up steps that bf16 would lose
    for _ in range(10):
        train_steps(engine, DATA[:1], accumulation=2)
    assert loss_of(engine(ToySystem.score, *DATA[0])).item() < first - 0.3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_bf16_is_near_full_precision(stage: int, accumulation: int) -> None:
    engine = toy_engine(replace(PLAIN, zero_stage=stage, precision="bf16", gradient_accumulation=accumulation))
    results, expected = train_steps(engine, DATA, accumulation), reference(DATA, PLAIN)
    for result, norms in zip(results, expected.grad_norms, strict=True):
        assert result.grad_norm == pytest.approx(norms, rel=0.02)
    layers = {name: value for name, value in engine.consolidated_state().items() if ".layer." in name}
    close(arrays(layers), expected.weights, atol=3e-3)  # they are below 0.5, where bf16 is good to 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_a_group_that_does_not_train_is_left_alone(stage: int) -> None:
    system = ToySystem()
    engine = Engine(system, replace(PLAIN, zero_stage=stage), groups_of(system, ["generator"]))
    before = engine.consolidated_state()
    result = train_steps(engine, DATA[:1])[0]
    after = engine.consolidated_state()
    assert result.updated
    assert result.grad_norm["retriever"] == 0.0 < result.grad_norm["generator"]
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("retriever"), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_trains(stage: int, precision: str) -> None:
    system = ToySystem()
    engine = Engine(system, replace(PLAIN, zero_stage=stage, precision=precision), groups_of(system, []))
    engine.load_consolidated(ToySystem(seed=7).state_dict())
    with torch.no_grad():
        scored, expected = engine(ToySystem.score, *DATA[0]), ToySystem(seed=7).score(*DATA[0])
    assert isinstance(scored, Scored)
    assert isinstance(expected, Scored)
    torch.testing.assert_close(scored.scores, expected.scores, atol=0.1 if "bf16" in precision else 1e-6, rtol=1e-5)
    kept = engine.consolidated_state()["generator.layer.weight"]
    torch.testing.assert_close(kept, ToySystem(seed=7).generator.layer.weight.detach(), atol=2e-3, rtol=0)


def test_one_backward_then_one_step() -> None:
    engine = toy_engine(PLAIN)
    with pytest.raises(AssertionError, match="step without"):
        engine.step(RATES)
    engine.backward(loss_of(engine(ToySystem.score, *DATA[0])))
    with pytest.raises(AssertionError, match="two backward passes"):
        engine.backward(loss_of(engine(ToySystem.score, *DATA[0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 4}, "engine.zero_stage=4: must be 0, 1, 2 or 3"),
        ({"precision": "fp16"}, "engine.precision=fp16: must be one of fp32, bf16, bf16_autocast, auto"),
        ({"gradient_accumulation": 0}, "engine.gradient_accumulation=0: must be at least 1"),
        ({"clip_norm": -1.0}, "engine.clip_norm=-1.0: must not be negative"),
        ({"timeout_s": 0.0}, "engine.timeout_s=0.0: must be above 0"),
        ({"offload_optimizer": True}, "engine.offload_optimizer=true: must be false with engine.zero_stage=0"),
    ],
)
def test_refused_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_engine(replace(PLAIN, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU can do")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs the processor's flags of Linux")
def test_products_of_16_bits_are_those_of_the_processors_flags() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert engine_setup.processor_multiplies_bf16() == bool({"avx512_bf16", "amx_bf16"} & flags)
    assert toy_engine(replace(PLAIN, precision="auto")).config.precision == "fp32"  # a toy is narrow


def test_refused_groups() -> None:
    system = ToySystem()
    groups = groups_of(system)
    for bad, message in [
        ({"retriever": groups["retriever"]}, "generator.embedding.weight requires a gradient and is in no parameter"),
        (groups | {"more": groups["generator"][:1]}, "generator.embedding.weight stands twice"),
        ({"retriever": list(ToySystem().parameters())}, "retriever has a parameter that is not of this module"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine(system, PLAIN, bad)
    with pytest.raises(ValueError, match=r"retriever.query_encoder.embedding.weight of .* requires no gradient"):
        Engine(system.requires_grad_(False), PLAIN, groups)


def test_a_parameter_without_dimension_is_refused() -> None:
    system = ToySystem()
    system.generator.register_parameter("gate", torch.nn.Parameter(torch.tensor(0.5)))
    with pytest.raises(ValueError, match=r"generator.gate has no dimension.* give it shape \(1,\)"):
        toy_engine(PLAIN, system)
