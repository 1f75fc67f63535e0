"""The negative control: both towers train, and the index is never refreshed. Recall of that index collapses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from indexing.indexing_settings import WorldConfig
from tests.helpers.tiny_world import TinyWorld, make_world, tiny_encoder, tiny_generator
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import (
    DecodingConfig,
    EvaluationConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

pytestmark = pytest.mark.long

WARM_STEPS, STEPS, REFRESH_EVERY = 40, 300, 10


def warm_start(world: TinyWorld, folder: Path) -> dict[str, Any]:
    """Inverse cloze, as before every joint training."""
    job = world.job(
        folder,
        objective=ObjectiveConfig(name="inverse_cloze"),
        training=TrainingConfig(
            train="retriever_only", steps=WARM_STEPS, batch_size=96, lr_retriever=2e-3, warmup_steps=10
        ),
    )
    return Stage(job, world.index()).run()


def joint(world: TinyWorld, folder: Path, start: Path, refreshed: bool) -> dict[str, Any]:
    """Train both towers and the reader by RAG-sequence; measured on the index that training ended with."""
    decoding = DecodingConfig(max_tokens=8)
    job = world.job(
        folder,
        init_from=str(start),
        training=TrainingConfig(steps=STEPS, batch_size=16, lr_retriever=3e-3, lr_generator=2e-3),
        retrieval=RetrievalConfig(k=4),
        evaluation=EvaluationConfig(k=20, batch_size=60, decoding=decoding, also=["closed_book"]),
        refresh=RefreshPlan(every_steps=REFRESH_EVERY),
    )
    return Stage(job, world.index(max_generations=0 if refreshed else 1)).run()


@pytest.mark.timeout(900)
def test_an_index_that_is_never_refreshed_loses_the_passages(tmp_path):
    encoder, generator = tiny_encoder(hidden=64, vocabulary=1500), tiny_generator(hidden=64)
    encoder.fresh, generator.fresh = replace(encoder.fresh, num_heads=4), replace(generator.fresh, num_heads=4)
    world = make_world(tmp_path / "world", WorldConfig(num_people=150), encoder, generator)
    start = warm_start(world, tmp_path / "warm")["metrics"]
    checkpoint = tmp_path / "warm" / "checkpoints" / f"step-{WARM_STEPS}"
    refreshed = joint(world, tmp_path / "refreshed", checkpoint, refreshed=True)
    stale = joint(world, tmp_path / "stale", checkpoint, refreshed=False)
    assert (refreshed["generations_committed"], refreshed["weights_version"]) == (1 + STEPS // REFRESH_EVERY, STEPS)
    assert (stale["generations_committed"], stale["weights_version"]) == (1, 0)
    # Recall@1 of held-out people: about .1 after the warm start.
    assert start["recall@1"] <= 0.25
    assert refreshed["metrics"]["recall@1"] >= 0.6
    # Vocabularies differ from run to run, so the bounds leave room: the two are far apart in each.
    assert stale["metrics"]["recall@1"] <= 0.25
    assert refreshed["metrics"]["recall@1"] - stale["metrics"]["recall@1"] >= 0.4
    # And the answers follow: the reader copies names that it has never seen, and knows nothing by heart.
    assert refreshed["metrics"]["exact_match"] >= 0.3
    assert stale["metrics"]["exact_match"] <= refreshed["metrics"]["exact_match"] - 0.2
    assert refreshed["metrics"]["closed_book/exact_match"] <= 0.02
