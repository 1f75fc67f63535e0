"""The engine against plain autograd, on one and on two gloo ranks, under every ZeRO stage."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import spawn
from tests.helpers.toy import (
    PLAIN,
    RATES,
    ToySystem,
    arrays,
    batches,
    close,
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


def poisoned_step(engine: Engine, where: str, rank: int) -> Any:
    """A step in which one rank's loss, or only its gradient, is not finite."""
    batch = part(DATA[0], engine.rank, engine.world_size)
    loss = loss_of(engine(ToySystem.score, *batch))
    if engine.rank == rank and where == "loss":
        loss = loss * float("nan")
    if engine.rank == rank and where == "gradient":
        loss = loss + torch.sqrt((loss * 0.0).abs())  # 0, with gradient 0 * inf
    engine.backward(loss)
    return engine.step(RATES)


def measure(rank: int, world_size: int) -> dict[str, Any]:
    """Everything that the tests compare, for every stage."""
    engine_setup.PERSISTENT_ELEMENTS = 0
    found: dict[str, Any] = {f"{name}-{stage}": run(stage) for stage in STAGES for name, run in MEASUREMENTS.items()}
    found["ranks"] = measure_ranks(rank)
    if world_size > 1:
        found["timeout_s"] = measure_timeout(rank)
    return found


def measure_plain(stage: int) -> dict[str, Any]:
    engine = toy_engine(replace(PLAIN, zero_stage=stage))
    results = train_steps(engine, DATA)
    return {
        "weights": arrays(engine.consolidated_state()),
        "passage_encoder": arrays(engine.consolidated_state("retriever.passage_encoder")),
        "norms": [result.grad_norm for result in results],
        "updated": [result.updated for result in results],
    }


def measure_clipped(stage: int) -> dict[str, Any]:
    config = replace(PLAIN, zero_stage=stage, clip_norm=CLIP, gradient_accumulation=2)
    engine = toy_engine(config)
    norms = []
    for batch in DATA:
        norms.append(train_steps(engine, [batch], accumulation=2)[-1].grad_norm)
        with torch.no_grad():  # a search between two steps
            engine(ToySystem.encode, batch[0])
    return {"weights": arrays(engine.consolidated_state()), "norms": norms}


def measure_poisoned(stage: int) -> dict[str, Any]:
    engine = toy_engine(replace(PLAIN, zero_stage=stage))
    results = [poisoned_step(engine, "loss", engine.world_size - 1)]  # before Adam has any state
    results += train_steps(engine, DATA[:2])
    before = arrays(engine.consolidated_state())
    results += [poisoned_step(engine, "loss", engine.world_size - 1), poisoned_step(engine, "gradient", 0)]
    held = arrays(engine.consolidated_state())
    results += train_steps(engine, DATA[2:])
    return {
        "before": before,
        "held": held,
        "weights": arrays(engine.consolidated_state()),
        "updated": [result.updated for result in results],
        "in_a_row": [result.skipped_in_a_row for result in results],
        "num_skipped": results[-1].num_skipped,
    }


def measure_loaded(stage: int) -> dict[str, Any]:
    """Weights that arrive after the engine: computed with, published, and stepped from."""
    engine = toy_engine(replace(PLAIN, zero_stage=stage))
    engine.load_consolidated(ToySystem(seed=7).state_dict() if engine.rank == 0 else {})
    loaded = arrays(engine.consolidated_state())
    train_steps(engine, DATA)
    return {"loaded": loaded, "weights": arrays(engine.consolidated_state())}


def measure_autocast(stage: int) -> dict[str, Any]:
    engine = toy_engine(replace(PLAIN, zero_stage=stage, precision="bf16_autocast"))
    train_steps(engine, DATA)
    return {"weights": arrays(engine.consolidated_state())}


MEASUREMENTS = {
    "plain": measure_plain,
    "clipped": measure_clipped,
    "poisoned": measure_poisoned,
    "loaded": measure_loaded,
    "autocast": measure_autocast,
}


def measure_ranks(rank: int) -> dict[str, Any]:
    engine = toy_engine(PLAIN)
    engine.barrier()
    with pytest.raises(ValueError, match="unknown x"):  # found on rank 0, raised on all
        engine.load_consolidated(ToySystem().state_dict() | {"x": torch.zeros(1)} if rank == 0 else {})
    return {
        "any": (engine.any_rank(rank == 0), engine.any_rank(False)),
        "sum": engine.all_reduce_sum([1.0, rank]),
        "broadcast": engine.broadcast_object({"rank": rank}),
        "gathered": engine.gather_objects(rank),
    }


def measure_timeout(rank: int) -> float:
    """Last, since it breaks the group: rank 1 stays away, and rank 0 is told in time."""
    engine = toy_engine(replace(PLAIN, zero_stage=2, timeout_s=2.0))
    loss = loss_of(engine(ToySystem.score, *DATA[0]))
    if rank == 1:
        time.sleep(8.0)
        return 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        engine.backward(loss)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return spawn(measure, 2, timeout_s=240.0)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[dict[str, Any]]:
    before = engine_setup.PERSISTENT_ELEMENTS
    yield measure(0, 1)
    engine_setup.PERSISTENT_ELEMENTS = before


@pytest.fixture(params=["one rank", "two ranks"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What rank 0 measured."""
    if request.param == "one rank":
        return request.getfixturevalue("one_rank")
    return request.getfixturevalue("two_ranks")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_plain_autograd_on_the_whole_batch(found: dict[str, Any], stage: int) -> None:
    measured, expected = found[f"plain-{stage}"], reference(DATA, PLAIN)
    close(measured["weights"], expected.weights)
    assert measured["updated"] == [True] * len(DATA)
    for norms, expected_norms in zip(measured["norms"], expected.grad_norms, strict=True):
        assert norms == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_each_group_is_clipped_on_its_own_after_an_accumulation(found: dict[str, Any], stage: int) -> None:
    measured, expected = found[f"clipped-{stage}"], reference(DATA, replace(PLAIN, clip_norm=CLIP))
    assert all(norm > 2 * CLIP for norms in expected.grad_norms for norm in norms.values())
    close(measured["weights"], expected.weights)
    for norms, expected_norms in zip(measured["norms"], expected.grad_norms, strict=True):
        assert norms == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_not_finite_on_one_rank_changes_nothing_anywhere(found: dict[str, Any], stage: int) -> None:
    measured = found[f"poisoned-{stage}"]
    assert measured["updated"] == [False, True, True, False, False, True]
    assert measured["in_a_row"] == [1, 0, 0, 1, 2, 0]
    assert measured["num_skipped"] == 3
    for name, value in measured["before"].items():
        assert np.array_equal(measured["held"][name], value), name
    close(measured["weights"], reference(DATA, PLAIN).weights)  # Adam's state never saw the three


@pytest.mark.parametrize("stage", STAGES)
def test_published_weights_are_the_trained_ones(found: dict[str, Any], stage: int) -> None:
    measured = found[f"plain-{stage}"]
    assert set(measured["passage_encoder"]) == {"embedding.weight", "layer.weight", "layer.bias", "scale"}
    for name, value in measured["passage_encoder"].items():
        assert np.array_equal(value, measured["weights"][f"retriever.query_encoder.{name}"])
    assert not any("passage_encoder" in name for name in measured["weights"])  # a shared tensor once


@pytest.mark.parametrize("stage", STAGES)
def test_loaded_weights_reach_every_rank_and_the_master_copy(found: dict[str, Any], stage: int) -> None:
    measured = found[f"loaded-{stage}"]
    close(measured["loaded"], ToySystem(seed=7).state_dict(), atol=0.0)
    close(measured["weights"], reference(DATA, PLAIN, ToySystem(seed=7)).weights)


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_is_near_full_precision_under_every_stage(found: dict[str, Any], stage: int) -> None:
    exact, autocast = found[f"plain-{stage}"]["weights"], found[f"autocast-{stage}"]["weights"]
    close(autocast, exact, atol=2e-3)
    close(autocast, found["autocast-0"]["weights"], atol=5e-4)
    assert any(not np.array_equal(autocast[name], exact[name]) for name in exact)


def test_only_rank_0_gets_the_weights(two_ranks: list[dict[str, Any]]) -> None:
    assert all(two_ranks[1][f"plain-{stage}"]["weights"] == {} for stage in STAGES)


def test_ranks_tell_each_other(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    alone = {"any": (True, False), "sum": [1.0, 0.0], "broadcast": {"rank": 0}, "gathered": [0]}
    both = {"any": (True, False), "sum": [2.0, 1.0], "broadcast": {"rank": 0}, "gathered": [0, 1]}
    assert one_rank["ranks"] == alone
    assert [found["ranks"] for found in two_ranks] == [both, both]


def test_a_rank_that_stays_away_is_found_in_time(two_ranks: list[dict[str, Any]]) -> None:
    assert 1.5 < two_ranks[0]["timeout_s"] < 7.0
