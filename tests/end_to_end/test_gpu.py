"""One CUDA device: joint stages under ZeRO 2 and 3, FAISS on the GPU, and the real command with a refresh beside it.

The engine alone is tested in tests/training/engine/test_engine_gpu.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.dense.exact import search_exactly
from indexing.dense.faiss_build import Index, build_index
from indexing.indexing_settings import IndexConfig, WorldConfig
from tests.end_to_end.command import Command, rows
from tests.helpers.tiny_world import TinyWorld, make_world, with_changes
from training.job import StageJob
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import CheckpointConfig, EngineConfig, ObjectiveConfig, TrainingConfig

pytestmark = pytest.mark.gpu

LISTS = 16
CONFIG = """
run: {name: gpu, directory: "DIRECTORY"}
corpus: {world: {num_people: 40, num_values: 40}}
encoder: {fresh: {num_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}, tokenizer: {vocabulary: 600}}
generator: {fresh: {num_encoder_layers: 1, num_decoder_layers: 1, hidden: 32, num_heads: 2, intermediate: 64}}
retrieval: {k: 3}
refresh: {every_steps: 10, precision: bfloat16}
training: {steps: 60, batch_size: 4}
engine: {precision: bf16, zero_stage: 2}
checkpoint: {every_steps: 30}
evaluation: {k: 20, decoding: {max_tokens: 4}}
monitor: {wandb: off}
index: {num_shards: 1}
cluster: {trainer_gpus: 0.5, refresh_gpus: 0.25}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("gpu"), WorldConfig(num_people=30, num_values=20))


# ---------------------------------------------------------------- joint training


def make_job(world: TinyWorld, run_dir: Path, stage: int, objective: str, steps: int, **changes: Any) -> StageJob:
    """Joint steps in 16 bits, the index following every 20."""
    kind = "copy" if objective == "rag_sequence" else "fusion"
    return world.job(
        run_dir,
        evaluate_questions="",
        generator=replace(world.generator, kind=kind),
        objective=ObjectiveConfig(name=objective),
        training=TrainingConfig(steps=steps, batch_size=8, warmup_steps=5, schedule="constant"),
        engine=EngineConfig(zero_stage=stage, precision="bf16", timeout_s=120.0),
        refresh=RefreshPlan(every_steps=20),
        **changes,
    )


def losses(run_dir: Path) -> dict[int, float]:
    """By step; of a step that was done twice, the last."""
    return {row["step"]: row["loss/total"] for row in rows(run_dir / "metrics.jsonl") if "loss/total" in row}


@pytest.mark.parametrize("objective", ["rag_sequence", "pdist"])
@pytest.mark.parametrize("stage", [2, 3])
def test_joint_steps_reduce_the_loss(world: TinyWorld, tmp_path: Path, stage: int, objective: str) -> None:
    job = make_job(world, tmp_path, stage, objective, steps=40)
    index = world.index()
    trained = Stage(job, index)
    assert trained.engine.device.type == "cuda"
    before = trained.engine.consolidated_state()
    trained.run()
    assert trained.state.skipped_steps == 0
    assert index.published == [0, 20, 40]
    found = losses(tmp_path)
    assert np.mean([found[step] for step in range(31, 41)]) < 0.9 * np.mean([found[step] for step in range(1, 11)])
    after = trained.engine.consolidated_state()
    for part in ("retriever.", "generator."):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(part))
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_resumes(world: TinyWorld, tmp_path: Path, stage: int) -> None:
    """The second half from the checkpoint is the second half without an interruption, up to the order of sums."""
    keep = {"checkpoint": CheckpointConfig(every_steps=20, index=True)}
    whole = make_job(world, tmp_path / "whole", stage, "rag_sequence", steps=40, **keep)
    Stage(whole, world.index(folder=tmp_path / "index-whole")).run()
    folder = tmp_path / "index-parts"
    parts = make_job(world, tmp_path / "parts", stage, "rag_sequence", steps=20, **keep)
    Stage(parts, world.index(folder=folder)).run()
    saved = json.loads((tmp_path / "parts" / "checkpoints" / "step-20" / "state.json").read_text())
    index = world.index(folder=folder)
    index.load(saved["generation"])
    longer = with_changes(parts, training=replace(parts.settings.training, steps=40), index_from_snapshot=True)
    resumed = Stage(longer, index)
    resumed.run()
    assert resumed.state.step == 40
    assert [row["step"] for row in rows(tmp_path / "parts" / "events.jsonl", "resumed")] == [20]
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(found) == list(range(1, 41))
    assert [found[step] for step in (21, 22)] == pytest.approx([expected[step] for step in (21, 22)], rel=0.02)
    late = range(31, 41)
    assert np.mean([found[step] for step in late]) == pytest.approx(np.mean([expected[s] for s in late]), rel=0.1)


# ---------------------------------------------------------------- FAISS


def gpu_config(factory: str) -> IndexConfig:
    """IVF kinds visit all of their lists."""
    return IndexConfig(factory=factory, device="gpu", nprobe=LISTS)


def check_hits(index: Index, stored: np.ndarray, queries: np.ndarray, k: int, tolerance: float) -> None:
    """Scores are those of brute force over `stored`; rows too, but for neighbours closer than the tolerance."""
    expected, _ = search_exactly(stored, queries, k)
    scores, found = index.search(queries, k)
    np.testing.assert_allclose(scores, expected, atol=tolerance)
    own = np.einsum("bd,bkd->bk", queries, stored[found])
    np.testing.assert_allclose(own, expected, atol=2 * tolerance)
    assert all(len(set(row)) == k for row in found.tolist())


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", f"IVF{LISTS},Flat"])
def test_an_index_on_the_gpu_equals_brute_force(factory: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(5000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = random.normal(size=(33, 64)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    half = factory == "SQfp16"
    stored = vectors.astype(np.float16).astype(np.float32) if half else vectors
    tolerance = 2e-3 if half else 1e-5
    index = build_index(vectors, gpu_config(factory))
    for k in (1, 20, 300):
        check_hits(index, stored, queries, k, tolerance)
    scores, found = build_index(vectors[:LISTS], gpu_config(factory)).search(queries, LISTS + 4)
    assert (found[:, LISTS:] == -1).all()
    assert np.isneginf(scores[:, LISTS:]).all()
    assert (np.sort(found[:, :LISTS]) == np.arange(LISTS)).all()

    index.write(tmp_path / "index")  # a snapshot is read on either device
    for device in ("gpu", "cpu"):
        again = Index.read(tmp_path / "index", replace(gpu_config(factory), device=device))
        check_hits(again, stored, queries, 20, tolerance)


# ---------------------------------------------------------------- the command


@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_refresh_commits_during_training_and_a_second_call_resumes(tmp_path: Path, device: str) -> None:
    """Trainer, refresh worker and, with `device` gpu, the shard share one GPU."""
    config, folder = tmp_path / "gpu.yaml", tmp_path / "runs" / "gpu"
    config.write_text(CONFIG.replace("DIRECTORY", str(tmp_path / "runs")), encoding="utf-8")
    shard = [f"index.device={device}", f"cluster.shard_gpus={0.25 if device == 'gpu' else 0}"]
    for number, steps in enumerate((60, 90)):
        with Command("train", str(config), f"training.steps={steps}", *shard, log=tmp_path / "log") as command:
            assert command.wait(280) == 0, command.printed
        commits = rows(folder / "events.jsonl", "refresh_committed")
        during = [row for row in rows(folder / "metrics.jsonl") if row.get("index/generations_committed", 0) > 1]
        assert len(commits) >= 2 * (number + 1)
        assert during, "no refresh was committed while training ran"
        assert all(row["index/blocked_steps"] == 0 for row in during)
        assert json.loads((folder / "evaluation.json").read_text())["step"] == steps
    assert [row["step"] for row in rows(folder / "events.jsonl", "resumed")] == [60]
    assert sorted(losses(folder)) == list(range(1, 91))
