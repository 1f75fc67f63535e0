"""Whole stages on a small world: resuming, what trains and what does not, and what is measured at the end."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.distributed import spawn
from tests.helpers.local_index import LocalHits, LocalIndex
from tests.helpers.tiny_world import TinyWorld, with_changes
from training.checkpoint import load_weights, newest_checkpoint
from training.job import StageJob
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

Weights = dict[str, torch.Tensor]


def run_stage(job: StageJob, index: LocalIndex | None) -> tuple[Stage, dict[str, Any]]:
    stage = Stage(job, index)
    return stage, stage.run()


def final_weights(job: StageJob) -> Weights:
    """Of the newest checkpoint."""
    path = newest_checkpoint(Path(job.run_dir), print)
    assert path is not None
    return load_weights(path)


def rows_by_step(job: StageJob) -> dict[int, dict[str, Any]]:
    """The last row of each step, without what a clock or the system measured."""
    lines = (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()
    found: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        if "loss/total" in row:
            kept = ("loss/", "retrieval/", "optim/", "index/generation", "index/staleness_steps")
            found[row["step"]] = {name: value for name, value in row.items() if name.startswith(kept)}
            found[row["step"]].pop("index/generations_committed", None)
    return found


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


class Failure(Exception):
    """What interrupts a run."""


class FailingIndex(LocalIndex):
    """Fails at search number `fails_at`."""

    fails_at = 0

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> LocalHits:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise Failure("interrupted")
        return super().submit(queries, k, num_vectors)


def failing(world: TinyWorld, fails_at: int, **options: Any) -> FailingIndex:
    index = FailingIndex(world.store(), world.encoder, len(world.tokenizer), **options)
    index.fails_at = fails_at
    return index


# ---------------------------------------------------------------- resume


def resumable(world: TinyWorld, run_dir: Path, **changes: Any) -> StageJob:
    """12 steps with dropout everywhere, so that the random state counts; a checkpoint after step 6."""
    encoder = replace(world.encoder, fresh=replace(world.encoder.fresh, dropout=0.1))
    generator = replace(world.generator, fresh=replace(world.generator.fresh, dropout=0.1))
    assert isinstance(encoder.fresh, FreshEncoderConfig)
    assert isinstance(generator.fresh, FreshGeneratorConfig)
    job = world.job(
        run_dir,
        encoder=encoder,
        generator=generator,
        evaluate_questions="",
        training=TrainingConfig(steps=12, batch_size=3, warmup_steps=3),
        engine=EngineConfig(gradient_accumulation=2),
        checkpoint=CheckpointConfig(every_steps=6, index=False),
    )
    return with_changes(job, **changes)


def frozen_index(world: TinyWorld, job: StageJob, tmp_path: Path) -> LocalIndex:
    """The index of step 0 for ever; a new one would be built from the weights that the run resumes with."""
    index = world.index(max_generations=1)
    Stage(replace(job, run_dir=str(tmp_path / "first")), index).serve_index(fresh=True)
    return index


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(world, tmp_path, depth):
    changes = {"retrieval": RetrievalConfig(k=3, prefetch_depth=depth)}
    whole = resumable(world, tmp_path / "whole", **changes)
    run_stage(whole, world.index(max_generations=1))
    parts = resumable(world, tmp_path / "parts", **changes)
    with pytest.raises(Failure):
        run_stage(parts, failing(world, fails_at=2 * 8 + depth, max_generations=1))
    assert newest_checkpoint(Path(parts.run_dir), print) == Path(parts.run_dir) / "checkpoints" / "step-6"
    stage, result = run_stage(parts, frozen_index(world, parts, tmp_path))
    assert (result["step"], stage.state.step) == (12, 12)
    assert rows_by_step(parts) == rows_by_step(whole)
    assert sorted(rows_by_step(parts)) == list(range(1, 13))
    assert same(final_weights(parts), final_weights(whole))


def test_a_resume_with_the_saved_index_is_exact_while_the_index_is_refreshed(world, tmp_path):
    changes = {"refresh": RefreshPlan(every_steps=4), "checkpoint": CheckpointConfig(every_steps=6, index=True)}
    whole = resumable(world, tmp_path / "whole", **changes)
    _, expected = run_stage(whole, world.index(folder=tmp_path / "index-whole"))
    parts = resumable(world, tmp_path / "parts", **changes)
    folder = tmp_path / "index-parts"
    with pytest.raises(Failure):
        run_stage(parts, failing(world, fails_at=2 * 8, folder=folder))
    saved = json.loads((Path(parts.run_dir) / "checkpoints" / "step-6" / "state.json").read_text())
    assert saved["generation"] == 1  # of step 4
    index = world.index(folder=folder)
    index.load(saved["generation"])
    assert index.weights_version == 4
    _, result = run_stage(replace(parts, index_from_snapshot=True), index)
    assert rows_by_step(parts) == rows_by_step(whole)
    assert same(final_weights(parts), final_weights(whole))
    assert index.weights_version == 12
    assert result["step"] == expected["step"] == 12


def test_a_finished_run_is_measured_again_and_not_trained(world, tmp_path):
    job = world.job(tmp_path / "run", training=TrainingConfig(steps=3, batch_size=2))
    _, first = run_stage(job, world.index())
    before = final_weights(job)
    stage, again = run_stage(job, world.index())
    assert stage.source is None
    assert again["metrics"] == pytest.approx(first["metrics"])
    assert again["weights_version"] == first["weights_version"] == 3
    assert same(final_weights(job), before)
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events == ["checkpoint", "resumed"]


def test_a_resume_with_an_older_saved_index_is_measured_with_a_new_one(world, tmp_path):
    job = world.job(
        tmp_path / "run", training=TrainingConfig(steps=3, batch_size=2), refresh=RefreshPlan(every_steps=3)
    )
    _, first = run_stage(job, world.index())
    older = world.index()
    Stage(replace(job, run_dir=str(tmp_path / "first")), older).serve_index(fresh=True)
    _, again = run_stage(replace(job, index_from_snapshot=True), older)
    assert older.published == [0, 3]
    assert again["weights_version"] == 3
    assert again["metrics"] == pytest.approx(first["metrics"])


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(world, tmp_path):
    checkpoints = CheckpointConfig(every_steps=2, index=False, keep=3)
    job = resumable(world, tmp_path / "run", checkpoint=checkpoints, training=TrainingConfig(steps=4, batch_size=2))
    run_stage(job, world.index(max_generations=1))
    wanted = rows_by_step(job)
    torn = Path(job.run_dir) / "checkpoints" / "step-4" / "model.safetensors"
    content = bytearray(torn.read_bytes())
    content[len(content) // 2] ^= 1
    torn.write_bytes(content)
    run_stage(job, frozen_index(world, job, tmp_path))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [2]
    assert rows_by_step(job) == wanted
    assert load_file(torn)


# ---------------------------------------------------------------- what trains


def recalls(result: dict[str, Any]) -> list[float]:
    return [result["metrics"][name] for name in ("recall@1", "recall@5", "recall@20", "mrr", "ndcg@10")]


def initial(world: TinyWorld, job: StageJob, tmp_path: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights and measurements before any training."""
    untrained = with_changes(job, run_dir=str(tmp_path / "untrained"), training=replace(job.settings.training, steps=0))
    stage, result = run_stage(untrained, world.index())
    return {name: tensor.clone() for name, tensor in stage.system.state_dict().items()}, result


def test_generator_only_leaves_retrieval_exactly_where_it_was(world, tmp_path):
    job = world.job(tmp_path / "run", training=TrainingConfig(train="generator_only", steps=6, batch_size=4))
    before, untrained = initial(world, job, tmp_path)
    index = world.index()
    _, result = run_stage(with_changes(job, refresh=RefreshPlan(every_steps=2)), index)
    after = final_weights(job)
    assert same(part(after, "retriever."), part(before, "retriever."))
    assert not same(part(after, "generator."), part(before, "generator."))
    assert recalls(result) == recalls(untrained)
    assert index.published == [0]
    assert result["generations_committed"] == 1
    assert rows_by_step(job)[6]["optim/grad_norm_retriever"] == 0


@pytest.mark.parametrize("towers", ["shared", "separate"])
def test_query_only_leaves_the_passage_tower_bit_for_bit(world, tmp_path, towers):
    job = world.job(
        tmp_path / "run",
        encoder=replace(world.encoder, towers=towers),
        training=TrainingConfig(train="query_only", steps=4, batch_size=4),
        refresh=RefreshPlan(every_steps=2),
    )
    before, _ = initial(world, job, tmp_path)
    index = world.index()
    run_stage(job, index)
    after = final_weights(job)
    assert same(part(after, "retriever.passage_encoder."), part(before, "retriever.passage_encoder."))
    assert not same(part(after, "retriever.query_encoder."), part(before, "retriever.query_encoder."))
    assert not same(part(after, "generator."), part(before, "generator."))
    assert index.published == [0]


class WithoutVectors(LocalIndex):
    """An index of a kind that does not keep its vectors at hand."""

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> LocalHits:
        return super().submit(queries, k)


@pytest.mark.parametrize("train", ["query_only", "generator_only"])
def test_a_fixed_passage_encoder_is_not_called_where_hits_bring_their_vectors(world, tmp_path, train):
    """Losses and measurements are those of encoding the passages again, without a call of the passage encoder."""
    found, calls = [], []
    for name, kind in (("again", WithoutVectors), ("known", LocalIndex)):
        job = world.job(tmp_path / name, training=TrainingConfig(train=train, steps=4, batch_size=4))
        stage = Stage(job, kind(world.store(), world.encoder, len(world.tokenizer)))
        calls.append(0)
        tower = stage.system.retriever.passage_encoder
        if train == "generator_only":  # one tower, which encodes the questions too
            stage.system.retriever.encode_passages = count(stage.system.retriever.encode_passages, calls)
        else:
            tower.forward = count(tower.forward, calls)
        found.append((stage.run(), {step: row["loss/total"] for step, row in rows_by_step(job).items()}))
    assert calls[0] > 0
    assert calls[1] == 0
    (expected, expected_losses), (measured, losses) = found
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert measured["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)


def count(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """`function`, whose calls are counted in the last item of `calls`."""

    def counted(*arguments: Any) -> Any:
        calls[-1] += 1
        return function(*arguments)

    return counted


def test_training_both_moves_the_encoder_and_the_index_follows(world, tmp_path):
    job = world.job(tmp_path / "run", refresh=RefreshPlan(every_steps=2))
    before, untrained = initial(world, job, tmp_path)
    index = world.index()
    stage, result = run_stage(job, index)
    after = final_weights(job)
    for name in ("retriever.query_encoder.", "retriever.passage_encoder.", "generator."):
        assert not same(part(after, name), part(before, name))
    assert index.published == [0, 2, 4, 6]
    assert (result["generations_committed"], result["weights_version"]) == (4, 6)
    encoder = {name: tensor.detach() for name, tensor in index._encoder.state_dict().items()}
    assert same(encoder, part(after, "retriever.passage_encoder."))
    assert recalls(result) != recalls(untrained)
    assert [row["index/staleness_steps"] for row in rows_by_step(job).values()] == [0, 1, 2, 1, 2, 1]
    assert stage.state.blocked_steps == 0


def test_the_last_measurement_waits_for_the_index_of_the_last_step(world, tmp_path):
    index = world.index(manual=True)  # nothing is refreshed until someone waits for it
    _, result = run_stage(world.job(tmp_path / "run", refresh=RefreshPlan(every_steps=3)), index)
    assert index.published == [0, 3, 6]
    assert index.waited_for == [0, 6]
    assert result["weights_version"] == 6


def test_retriever_only_starts_warm_without_an_index(world, tmp_path):
    job = world.job(
        tmp_path / "run",
        objective=ObjectiveConfig(name="inverse_cloze"),
        training=TrainingConfig(train="retriever_only", steps=25, batch_size=24, lr_retriever=2e-3, warmup_steps=5),
    )
    before, untrained = initial(world, job, tmp_path)
    _, result = run_stage(job, world.index())
    after = final_weights(job)
    assert same(part(after, "generator."), part(before, "generator."))
    rows = rows_by_step(job)
    assert rows[25]["loss/total"] < 0.9 * rows[1]["loss/total"]
    assert result["metrics"]["recall@20"] > untrained["metrics"]["recall@20"] + 0.1


# ---------------------------------------------------------------- from one stage to the next


@pytest.mark.parametrize("train", ["none", "both"])
def test_a_stage_without_steps_measures_a_checkpoint(world, tmp_path, train):
    trained = world.job(tmp_path / "trained")
    _, expected = run_stage(trained, world.index())
    start = newest_checkpoint(tmp_path / "trained", print)
    job = world.job(tmp_path / "measured", init_from=str(start), training=TrainingConfig(train=train, steps=0))
    stage, result = run_stage(job, world.index())
    assert result["metrics"] == pytest.approx(expected["metrics"])
    assert result["step"] == 0
    assert same(part(dict(stage.system.state_dict()), "generator."), part(final_weights(trained), "generator."))
    assert not (tmp_path / "measured" / "checkpoints").exists()
    written = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert written["metrics"] == pytest.approx(result["metrics"])


def test_query_training_starts_from_shared_towers(world, tmp_path):
    trained = world.job(tmp_path / "trained", training=TrainingConfig(steps=2, batch_size=2), evaluate_questions="")
    run_stage(trained, world.index())
    start = newest_checkpoint(tmp_path / "trained", print)
    job = world.job(
        tmp_path / "next", init_from=str(start), training=TrainingConfig(train="query_only", steps=2, batch_size=2)
    )
    run_stage(job, world.index())
    before, after = final_weights(trained), final_weights(job)
    assert same(part(after, "retriever.passage_encoder."), part(before, "retriever.passage_encoder."))
    assert not same(part(after, "retriever.query_encoder."), part(before, "retriever.query_encoder."))


# ---------------------------------------------------------------- invariances


def test_accumulating_eight_batches_of_one_equals_one_of_eight(world, tmp_path):
    rows, weights = [], []
    for name, size, accumulation in (("one", 8, 1), ("eight", 1, 8)):
        job = world.job(
            tmp_path / name,
            evaluate_questions="",
            training=TrainingConfig(steps=4, batch_size=size, warmup_steps=2),
            engine=EngineConfig(gradient_accumulation=accumulation),
            retrieval=RetrievalConfig(k=3, prefetch_depth=0),
        )
        run_stage(job, world.index(max_generations=1))
        rows.append(rows_by_step(job))
        weights.append(final_weights(job))
    for step in range(1, 5):
        assert rows[0][step]["loss/total"] == pytest.approx(rows[1][step]["loss/total"], rel=2e-4)
        assert rows[0][step]["optim/grad_norm_generator"] == pytest.approx(
            rows[1][step]["optim/grad_norm_generator"], rel=2e-3
        )


def test_shards_and_prefetching_change_nothing_while_the_index_stands_still(world, tmp_path):
    found = []
    for shards, depth in ((1, 0), (4, 2)):
        job = world.job(
            tmp_path / f"run-{shards}",
            training=TrainingConfig(train="generator_only", steps=4, batch_size=4),
            retrieval=RetrievalConfig(k=3, prefetch_depth=depth),
        )
        _, result = run_stage(job, world.index(num_shards=shards))
        found.append((rows_by_step(job), final_weights(job), result["metrics"]))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def train_on_ranks(rank: int, world_size: int, world: TinyWorld, folder: str) -> dict[str, Any]:
    """Four steps of eight questions; every rank has the same index, of the weights that all start with."""
    job = world.job(
        Path(folder),
        training=TrainingConfig(steps=4, batch_size=8 // world_size, warmup_steps=2),
        retrieval=RetrievalConfig(k=3, source="gold"),
    )
    index = world.index(max_generations=1)
    stage = Stage(job, index)
    index.publish(0, to_numpy(passage_state(stage.system.retriever)))
    result = stage.run()
    norms = [
        [row[f"optim/grad_norm_{name}"] for name in ("retriever", "generator")] for row in rows_by_step(job).values()
    ]
    return {"metrics": result["metrics"], "norms": norms, "weights": to_numpy(final_weights(job))}


def test_one_rank_and_two_ranks_train_alike(world, tmp_path):
    alone = train_on_ranks(0, 1, world, str(tmp_path / "one"))
    pair = spawn(train_on_ranks, 2, world, str(tmp_path / "two"))
    assert pair[0]["metrics"] == pair[1]["metrics"]
    np.testing.assert_allclose(pair[0]["norms"], alone["norms"], rtol=2e-3)
    for name, weights in alone["weights"].items():
        assert np.abs(pair[0]["weights"][name] - weights).mean() < 1e-5, name
    for name in ("recall@5", "recall@20", "mrr", "log_likelihood", "f1"):
        assert pair[0]["metrics"][name] == pytest.approx(alone["metrics"][name], rel=0.02, abs=0.03)


# ---------------------------------------------------------------- what it writes


def test_a_stage_without_an_index_trains_closed_book(world, tmp_path):
    job = world.job(
        tmp_path / "run",
        objective=ObjectiveConfig(name="fused", score_bias=False),
        retrieval=RetrievalConfig(source="none"),
        training=TrainingConfig(train="generator_only", steps=3, batch_size=4),
    )
    _, result = run_stage(job, None)
    assert "recall@1" not in result["metrics"]
    assert "exact_match" in result["metrics"]
    assert "index/generation" not in rows_by_step(job)[3]


def test_what_a_run_leaves_behind(world, tmp_path):
    evaluation = EvaluationConfig(every_steps=2, max_questions=10, k=20, batch_size=16, also=["closed_book", "gold"])
    job = world.job(
        tmp_path / "run", evaluation=evaluation, checkpoint=CheckpointConfig(every_steps=2, index=False, keep=2)
    )
    _, result = run_stage(job, world.index())
    folder = tmp_path / "run"
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-4", "step-6"]
    assert (folder / "checkpoints" / "step-6" / "tokenizers" / "retriever" / "tokenizer.json").is_file()
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == result["num_questions"] == 36
    questions = world.question_store("test")
    assert [row["id"] for row in predictions] == [questions.question(number).id for number in range(36)]
    assert all(row["hits"][0].startswith("person-") for row in predictions)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(row["step"], row["eval/test/index_version"]) for row in rows if "eval/test/exact_match" in row]
    assert evaluated == [(0, 0), (2, 0), (4, 0), (6, 6)]
    assert json.loads((folder / "evaluation.json").read_text())["metrics"].keys() >= {"gold/f1", "closed_book/f1"}
