"""The order of the loop, what it publishes and waits for, and what it does with numbers that are not finite."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.dense.probe import UNKNOWN, Figures
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld
from training.loop import (
    Fetched,
    Hooks,
    LoopState,
    Source,
    Window,
    index_metrics,
    learning_rates,
    retriever_delay,
    step_metrics,
    train,
)
from training.models.model_inputs import ContrastBatch
from training.models.parts.weights import from_numpy, to_numpy
from training.models.retriever.encoder import passage_state
from training.refreshing.freshness import Freshness
from training.refreshing.policy import RefreshPlan
from training.retrieving.retrieve import IndexStatus
from training.stage import Stage
from training.stopped import Stopped
from training.training_settings import EngineConfig, ObjectiveConfig, RetrievalConfig, TrainingConfig

# ---------------------------------------------------------------- pure parts


def test_rates_warm_up_and_fall_to_zero():
    config = TrainingConfig(steps=10, warmup_steps=4, lr_retriever=1.0, lr_generator=20.0)
    rates = [learning_rates(config, step) for step in range(10)]
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [rate["retriever"] for rate in rates] == pytest.approx(expected)
    assert [rate["generator"] for rate in rates] == pytest.approx([20 * factor for factor in expected])


def test_a_delayed_retriever_warms_up_later_and_ends_with_the_generator():
    config = TrainingConfig(steps=10, warmup_steps=2, lr_retriever=1.0, lr_generator=1.0, retriever_delay_steps=4)
    rates = [learning_rates(config, step) for step in range(10)]
    assert [rate["retriever"] for rate in rates] == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])
    alone = [learning_rates(replace(config, retriever_delay_steps=0), step) for step in range(10)]
    assert [rate["generator"] for rate in rates] == [rate["generator"] for rate in alone]
    only = replace(config, train="retriever_only")
    assert [learning_rates(only, step)["retriever"] for step in range(10)] == [rate["retriever"] for rate in alone]


def test_constant_rates_and_odd_lengths():
    config = TrainingConfig(steps=4, warmup_steps=1, schedule="constant", lr_retriever=1.0)
    assert [learning_rates(config, step)["retriever"] for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    config = TrainingConfig(steps=3, warmup_steps=0, lr_retriever=1.0)
    assert [learning_rates(config, step)["retriever"] for step in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    config = TrainingConfig(steps=2, warmup_steps=5, lr_retriever=1.0)
    assert [learning_rates(config, step)["retriever"] for step in range(2)] == pytest.approx([1 / 6, 2 / 6])


def contrast_batch() -> ContrastBatch:
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    return ContrastBatch(
        query_ids=ids, query_mask=mask, passage_ids=ids, passage_token_mask=mask, passage_numbers=torch.arange(2)
    )


def test_metrics_of_a_step_with_two_micro_batches():
    window = Window()
    for loss, version, wait_s, found in ((2.0, 5, 0.1, 0.5), (4.0, 3, 0.2, 1.0)):
        fetched = Fetched(
            batch=contrast_batch(),
            num_questions=2,
            search_wait_s=wait_s,
            generation=version // 2,
            weights_version=version,
            gold_in_k=found,
        )
        window.add(fetched, {"loss/total": torch.tensor(loss)})
    figures = Figures(80.5, 0.25, 0.9)
    status = IndexStatus(
        generation=4,
        weights_version=8,
        generations_committed=5,
        refresh_seconds=1.5,
        refresh_passages_per_s=120.0,
        failures=1,
        slow=7,
        hedged=6,
        refused=2,
        figures=figures,
    )
    metrics = step_metrics(
        window, LoopState(step=9, skipped_steps=2, blocked_steps=3), times={"time/step_s": 0.5}, status=status
    )
    expected = {
        "loss/total": 3.0,
        "perf/questions_per_s": 8.0,
        "perf/tokens_per_s": 80.0,
        "time/search_wait_s": 0.3,
        "time/search_wait_share": 0.6,
        "retrieval/gold_in_k": 0.75,
        "index/generation": 2,
        "index/staleness_steps": 4,  # step 9 computed with weights of step 8, on hits of steps 5 and 3
        "index/staleness_max_steps": 5,
        "index/blocked_steps": 3,
        "index/generations_committed": 5,
        "index/refresh_failures": 1,
        "index/slow": 7,
        "index/hedged": 6,
        "index/refused": 2,
        "index/bytes_per_passage": 80.5,
        "index/build_s": 0.25,
        "index/recall": 0.9,
        "optim/skipped_steps": 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_figures_that_are_not_known_are_no_metrics():
    assert index_metrics(UNKNOWN) == {}
    assert set(index_metrics(Figures(80.5, 0.25))) == {"index/bytes_per_passage", "index/build_s"}


def test_a_step_without_an_index_has_no_index_metrics():
    window = Window()
    window.add(Fetched(batch=contrast_batch(), num_questions=2), {"loss/total": torch.tensor(1.0)})
    metrics = step_metrics(window, LoopState(step=1), times={"time/step_s": 0.5}, status=None)
    assert not [name for name in metrics if name.startswith("index/")]


# ---------------------------------------------------------------- the loop on a small system


@dataclass
class Run:
    """A stage that is ready to train, and what happened in it."""

    stage: Stage
    index: LocalIndex
    log: list[str] = field(default_factory=list)

    def every(self, steps: int, precision: str = "float32") -> Callable[..., dict[str, float]]:
        """A refresh every so many steps."""
        plan, fixed_until = (
            RefreshPlan(every_steps=steps, precision=precision),
            retriever_delay(self.stage.job.settings.training),
        )
        return Freshness(
            plan, self.stage.engine, service=self.index, monitor=self.stage.monitor, fixed_until=fixed_until
        ).after_step

    def train(self, hooks: Hooks, source: Source | None = None) -> LoopState:
        stage, job = self.stage, self.stage.job
        taken = source or stage.source
        assert taken is not None
        return train(
            job.settings.training,
            job.settings.objective,
            engine=stage.engine,
            source=taken,
            service=self.index,
            monitor=stage.monitor,
            state=stage.state,
            hooks=hooks,
        )

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.stage.run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.stage.system.state_dict().items()}


@pytest.fixture
def make_run(world: TinyWorld, tmp_path: Path) -> Callable[..., Run]:
    def make(index_options: dict[str, Any] | None = None, **changes: Any) -> Run:
        index = world.index(**(index_options or {}))
        stage = Stage(world.job(tmp_path / "run", evaluate_questions="", **changes), index)
        stage.restore()
        stage.serve_index(fresh=True)
        stage.source = stage.make_source(None)
        index.waited_for.clear()
        return Run(stage, index)

    return make


@dataclass
class Noted:
    """A source that writes down every batch that is taken."""

    source: Source
    log: list[str]

    def next(self) -> Fetched:
        self.log.append("take")
        return self.source.next()

    def state(self) -> dict[str, Any]:
        return self.source.state()


def noting(log: list[str], **options: Any) -> Hooks:
    return Hooks(
        evaluate=lambda step: log.append(f"evaluate {step}"),
        save=lambda state: log.append(f"save {state.step}"),
        **options,
    )


def test_evaluate_then_save_then_take(make_run):
    run = make_run(engine=EngineConfig(gradient_accumulation=2), training=TrainingConfig(steps=4, batch_size=2))
    assert run.stage.source is not None
    log: list[str] = []
    run.train(noting(log, evaluate_every=2, save_every=2), Noted(run.stage.source, log))
    step = ["take", "take"]
    assert log == ["evaluate 0", *step, *step, "evaluate 2", "save 2", *step, *step]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]


@pytest.mark.parametrize(("evaluated", "first"), [(2, []), (1, ["evaluate 2"])])
def test_what_was_done_before_an_interruption_is_not_done_again(make_run, evaluated, first):
    """An evaluation that the interruption cut short is made again; the checkpoint of the interruption is there."""
    run = make_run(training=TrainingConfig(steps=4, batch_size=2))
    run.stage.state.step, run.stage.state.evaluated = 2, evaluated
    log: list[str] = []
    run.train(noting(log, evaluate_every=1, save_every=1))
    assert log == [*first, "evaluate 3", "save 3"]


def test_a_stop_ends_the_loop_between_two_steps(make_run):
    run = make_run(training=TrainingConfig(steps=4, batch_size=2))
    log: list[str] = []

    def stop_point() -> None:
        if run.stage.state.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run.train(replace(noting(log, evaluate_every=1, save_every=1), stop_point=stop_point))
    assert run.stage.state.step == 2
    assert log == ["evaluate 0", "evaluate 1", "save 1"]


@pytest.mark.parametrize(("depth", "staleness"), [(0, [0, 1, 0, 1, 0, 1]), (1, [0, 1, 2, 1, 2, 1])])
def test_staleness_is_that_of_the_hits_in_use(make_run, depth, staleness):
    run = make_run(retrieval=RetrievalConfig(k=3, prefetch_depth=depth))
    run.train(Hooks(refresh=run.every(2)))
    rows = run.rows()
    assert [row["index/staleness_steps"] for row in rows] == staleness
    assert [row["index/generations_committed"] for row in rows] == [1, 2, 2, 3, 3, 4]
    assert run.index.published == [0, 2, 4, 6]
    assert run.stage.state.published == 6
    assert run.index.waited_for == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_weights_handed_out_are_those_after_the_step(make_run, precision):
    run = make_run({"manual": True}, training=TrainingConfig(steps=2, batch_size=2))
    run.train(Hooks(refresh=run.every(2, precision)))
    run.index.refresh()
    wanted = from_numpy(to_numpy(passage_state(run.stage.system.retriever), precision))
    found = run.index._encoder.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert run.index.weights_version == 2


def test_training_waits_for_a_refresh_only_when_staleness_is_bounded(make_run):
    steps = TrainingConfig(steps=8, batch_size=2)
    free = make_run({"manual": True}, training=steps)
    free.train(Hooks(refresh=free.every(2)))
    assert (free.index.waited_for, free.stage.state.blocked_steps) == ([], 0)
    assert free.rows()[-1]["index/staleness_steps"] == 7
    bounded = make_run({"manual": True}, training=steps)
    (bounded.stage.run_dir / "metrics.jsonl").unlink()
    bounded.train(Hooks(refresh=bounded.every(2), max_staleness_steps=3))
    # After step 4 the index of step 0 is too old: the one of step 4 is built. It lasts until step 8.
    assert bounded.index.waited_for == [1, 5]
    assert bounded.stage.state.blocked_steps == 2
    assert bounded.rows()[-1]["index/blocked_steps"] == 2
    # Batches searched ahead (one here) are older by as many steps.
    assert max(row["index/staleness_steps"] for row in bounded.rows()) <= 3 + 1


def test_while_the_retriever_waits_for_its_reader_nothing_is_encoded_again(make_run):
    """The index is what the encoders would make of the corpus, so that it is neither stale nor waited for."""
    run = make_run({"manual": True}, training=TrainingConfig(steps=8, batch_size=2, retriever_delay_steps=5))
    before = {name: weight for name, weight in run.weights().items() if name.startswith("retriever.")}
    checked = list[int]()

    def unchanged(step: int) -> None:
        weights = run.weights()
        if 0 < step < 8:
            assert all(torch.equal(weights[name], weight) for name, weight in before.items())
            checked.append(step)

    run.train(Hooks(refresh=run.every(2), max_staleness_steps=2, evaluate=unchanged, evaluate_every=5))
    assert checked == [5]
    assert run.index.published == [0, 6, 8]
    assert [row["index/staleness_steps"] for row in run.rows()] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert run.index.waited_for == [6]


def test_a_wait_that_cannot_end_is_an_error(make_run):
    run = make_run({"manual": True}, training=TrainingConfig(steps=8, batch_size=2))
    with pytest.raises(TimeoutError, match="version 1"):
        run.train(Hooks(max_staleness_steps=3, wait_timeout_s=0.1))


# ---------------------------------------------------------------- not finite


def spoil(run: Run, steps: set[int]) -> Hooks:
    """The loss of the step after each of `steps` is NaN."""

    def before(step: int) -> None:
        run.stage.job.settings.objective.scale = math.nan if step in steps else 1.0

    return Hooks(evaluate=before, evaluate_every=1)


def test_steps_that_are_not_finite_are_left_out_and_counted(make_run):
    config = TrainingConfig(steps=6, batch_size=2, stop_after_nonfinite=3, log_every=100)
    run = make_run(training=config, objective=ObjectiveConfig())
    snapshots: list[dict[str, torch.Tensor]] = []
    hooks = spoil(run, {1, 2, 4})
    before = hooks.evaluate
    assert before is not None

    def note(step: int) -> None:
        before(step)
        snapshots.append(run.weights())

    hooks.evaluate = note
    state = run.train(hooks)
    assert (state.step, state.skipped_steps) == (6, 3)
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(snapshots)]
    assert moved == [True, False, False, True, False]
    rows = run.rows()
    assert [row["step"] for row in rows] == [2, 3, 5, 6]  # a step left out is always logged
    assert rows[0]["loss/total"] is None
    assert rows[-1]["optim/skipped_steps"] == 3
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_too_many_of_them_in_a_row_stop_the_run(make_run):
    config = TrainingConfig(steps=9, batch_size=2, stop_after_nonfinite=3)
    run = make_run(training=config, objective=ObjectiveConfig())
    with pytest.raises(FloatingPointError, match=r"3 steps in a row \(step 5\)"):
        run.train(spoil(run, {2, 3, 4, 5}))
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_one_micro_batch_that_is_not_finite_spoils_its_whole_step(make_run):
    run = make_run(
        engine=EngineConfig(gradient_accumulation=2),
        training=TrainingConfig(steps=1, batch_size=2),
        objective=ObjectiveConfig(),
    )
    assert run.stage.source is not None
    before = run.weights()

    @dataclass
    class Spoiled(Noted):
        def next(self) -> Fetched:
            run.stage.job.settings.objective.scale = math.nan if self.log else 1.0  # the second of the two
            return super().next()

    state = run.train(Hooks(), Spoiled(run.stage.source, []))
    assert state.skipped_steps == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in run.weights().items())


def test_times_add_up(make_run):
    run = make_run()
    state = run.train(Hooks(refresh=run.every(3)))
    rows = run.rows()
    for row in rows:
        parts = [value for name, value in row.items() if name.startswith("time/") and name.endswith("_s")]
        inside = sum(row[f"time/{name}_s"] for name in ("fetch", "forward", "backward", "optimizer"))
        assert inside <= row["time/step_s"]
        assert min(parts) >= 0
    assert np.sum([row["time/step_s"] for row in rows]) == pytest.approx(state.seconds)
