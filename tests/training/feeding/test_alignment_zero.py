"""Preferences under ZeRO 0 to 3 on two gloo ranks: DPO and KTO, with their reference, equal one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.distributed import spawn
from tests.helpers.preference_files import preference_store
from tests.helpers.tiny_world import TinyWorld
from tests.training.test_stage import final_weights, rows_by_step
from training.engine import engine_setup
from training.models.build import build_system
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.stage import Stage
from training.training_settings import EngineConfig, ObjectiveConfig, RetrievalConfig, TrainingConfig

pytestmark = pytest.mark.long

STAGES = (0, 1, 2, 3)
CASES = {"dpo, copy": ("dpo", "copy"), "kto, fusion": ("kto", "fusion")}
SAMPLED = ("grpo", "reinforce")


def train(
    rank: int, world_size: int, world: TinyWorld, folder: str, stores: dict[str, str], case: tuple[str, str], zero: int
) -> dict[str, Any]:
    """Three steps of eight preferences; every rank has the same index, of the weights that all start with."""
    name, kind = case
    sampled = name in SAMPLED
    job = world.job(
        Path(folder),
        generator=replace(world.generator, kind=kind),
        # A large beta, so that z and the reference count.
        objective=ObjectiveConfig(
            name=name, beta=1.0, reward="tests.helpers.preference_files:variety", group_size=3, kl_weight=0.1
        ),
        train_questions=str(world.questions("train")) if sampled else stores[name],
        evaluate_questions="" if sampled else str(world.questions("test")),
        evaluate_preferences="" if sampled else stores["test"],
        training=TrainingConfig(steps=3, batch_size=8 // world_size, warmup_steps=0),
        engine=EngineConfig(zero_stage=zero, epsilon=1e-3),
        retrieval=RetrievalConfig(k=3),
    )
    index = world.index(max_generations=1)
    stage = Stage(job, index)
    # Under ZeRO 3 the stage's own weights are whole only inside its engine; fresh ones depend on the seed alone.
    fresh = build_system(
        job.settings.encoder,
        job.settings.generator,
        train="both",
        tokenizers=(world.tokenizer, world.tokenizer),
        seed=job.seed,
    )
    index.publish(0, to_numpy(passage_state(fresh.retriever)))
    result = stage.run()
    rows = rows_by_step(job)
    return {
        "losses": [row["loss/total"] for row in rows.values()],
        "norms": [[row[f"optim/grad_norm_{group}"] for group in ("retriever", "generator")] for row in rows.values()],
        "weights": to_numpy(final_weights(job)),
        "metrics": {key: value for key, value in result["metrics"].items() if key.startswith("preference_")},
    }


def on_ranks(rank: int, world_size: int, world: TinyWorld, folder: str, stores: dict[str, str]) -> dict[str, Any]:
    """Everything that the tests compare, all in one start."""
    engine_setup.PERSISTENT_ELEMENTS = 0  # otherwise ZeRO 3 would keep models of this size whole
    found: dict[str, Any] = {}
    for zero in STAGES:
        for name, case in CASES.items():
            found[f"{name}, {zero}"] = train(rank, world_size, world, f"{folder}/{name}-{zero}", stores, case, zero)
    for name in SAMPLED:
        found[name] = train(rank, world_size, world, f"{folder}/{name}", stores, (name, "fusion"), 3)
    return found


@pytest.fixture(scope="module")
def stores(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("preferences")
    wanted = {"dpo": ("train", True), "kto": ("train", False), "test": ("test", True)}
    return {name: str(preference_store(world, folder, *which)) for name, which in wanted.items()}


@pytest.fixture(scope="module")
def ranks(world: TinyWorld, stores: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(on_ranks, 2, world, str(tmp_path_factory.mktemp("ranks")), stores, timeout_s=280)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(
    name: str, world: TinyWorld, stores: dict[str, str], ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = train(0, 1, world, str(tmp_path / "alone"), stores, CASES[name], 0)
    assert alone["losses"][0] != alone["losses"][1]
    for zero in STAGES:
        found = ranks[0][f"{name}, {zero}"]
        np.testing.assert_allclose(found["norms"], alone["norms"], rtol=2e-3, err_msg=f"stage {zero}")
        for key, weights in alone["weights"].items():
            np.testing.assert_allclose(found["weights"][key], weights, rtol=1e-2, atol=1e-4, err_msg=f"{key}, {zero}")
        assert found["metrics"] == ranks[1][f"{name}, {zero}"]["metrics"]
        for key, value in alone["metrics"].items():
            assert found["metrics"][key] == pytest.approx(value, rel=1e-2, abs=1e-2), (key, zero)


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_drawn_and_learned_from_under_zero_3(name: str, ranks: list[dict[str, Any]]) -> None:
    """Ranks draw answers of different lengths, and every step of writing is a collective."""
    assert np.isfinite(ranks[0][name]["losses"]).all()
    assert (np.array(ranks[0][name]["norms"]) > 0).all()
