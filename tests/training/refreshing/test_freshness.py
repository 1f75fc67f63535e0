"""What a stage asks of its index, when, and what it says about it; across an interruption too."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.local_index import LocalIndex
from tests.training.test_stage import Failure, failing, final_weights, resumable, rows_by_step, run_stage, same
from training.loop import LoopState, Window, step_metrics
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.refreshing.policy import RefreshPlan
from training.retrieving.retrieve import IndexStatus
from training.stage import Stage
from training.training_settings import CheckpointConfig, RetrievalConfig, TrainingConfig

STEPS = 12
DRIFT = RefreshPlan(policy="on_drift", drift_threshold=1.0, check_every_steps=3, probe_questions=6)


def job_of(world: Any, folder: Path, plan: RefreshPlan, **changes: Any) -> Any:
    """Steps so large that drift is certain."""
    training = TrainingConfig(steps=STEPS, batch_size=4, warmup_steps=0, schedule="constant", lr_retriever=0.01)
    values = {"evaluate_questions": "", "training": training, "refresh": plan, **changes}
    return world.job(folder, **values)


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] in kinds]


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "loss/total" in row}


class Building(LocalIndex):
    """A refresh that was asked for never ends, until `fails` says that it failed."""

    fails = False

    def status(self) -> IndexStatus:
        return replace(super().status(), failures=len(self.published) if self.fails else 0)


def building(world: Any, fails: bool) -> Building:
    index = Building(world.store(), world.encoder, len(world.tokenizer), manual=True)
    index.fails = fails
    return index


def test_drift_is_measured_at_every_publish_and_timed(world, tmp_path):
    plan = RefreshPlan(probe_questions=6)
    run_stage(job_of(world, tmp_path, replace(plan, every_steps=4)), world.index())
    rows = metrics(tmp_path)
    for step, row in rows.items():
        names = {name for name in row if name.startswith("drift/")}
        expected = {f"drift/{name}" for name in ("overlap", "rank_correlation", "passage_shift", "query_shift")}
        assert names == (expected if step % 4 == 0 else set())
        assert ("time/drift_s" in row) == (step % 4 == 0)
    assert 0 < rows[4]["drift/passage_shift"] < 2
    assert 0 < rows[4]["time/drift_s"] < rows[4]["time/step_s"]
    triggered = events(tmp_path, "refresh_triggered")
    assert [(row["step"], row["why"]) for row in triggered] == [(s, "refresh.every_steps=4") for s in (4, 8, 12)]
    assert [row["overlap"] for row in triggered] == [round(rows[s]["drift/overlap"], 4) for s in (4, 8, 12)]


def test_without_a_probe_nothing_is_measured(world, tmp_path):
    run_stage(job_of(world, tmp_path, RefreshPlan(every_steps=4)), world.index())
    assert not [name for row in metrics(tmp_path).values() for name in row if name.startswith("drift/")]


def test_measuring_changes_no_training(world, tmp_path):
    found = []
    for questions in (0, 6):
        folder = tmp_path / str(questions)
        job = resumable(world, folder, refresh=RefreshPlan(probe_questions=questions, every_steps=4))
        run_stage(job, world.index())
        found.append(final_weights(job))
    assert same(*found)


def test_drift_below_the_threshold_triggers(world, tmp_path):
    index = world.index()
    run_stage(job_of(world, tmp_path, replace(DRIFT, every_steps=5)), index)  # every_steps is not read
    rows = metrics(tmp_path)
    low = [step for step in (3, 6, 9, 12) if rows[step]["drift/overlap"] < 1]
    assert low
    triggered = events(tmp_path, "refresh_triggered")
    assert [row["step"] for row in triggered] == low
    assert all("is below refresh.drift_threshold=1" in row["why"] for row in triggered)
    final = [] if low[-1] == STEPS else [STEPS]  # the stage's last measurement wants a fresh index
    assert index.published == [0, *low, *final]
    assert rows[low[-1]]["index/refreshed_share"] == len(low)


def test_drift_above_the_threshold_does_not(world, tmp_path):
    """Steps so small that the hits drift, and more than half of them stay."""
    index = world.index()
    small = TrainingConfig(steps=STEPS, batch_size=4, warmup_steps=0, schedule="constant", lr_retriever=1e-4)
    run_stage(job_of(world, tmp_path, replace(DRIFT, drift_threshold=0.5), training=small), index)
    rows = metrics(tmp_path)
    assert 0.5 < min(rows[step]["drift/overlap"] for step in (3, 6, 9, 12)) < 1
    assert index.published == [0, STEPS]
    assert not events(tmp_path, "refresh_triggered", "refresh_withheld")


def test_beyond_the_budget_a_refresh_waits(world, tmp_path):
    index = world.index()
    run_stage(job_of(world, tmp_path, replace(DRIFT, max_share=1 / 6)), index)
    by_step = {row["step"]: row for row in events(tmp_path, "refresh_triggered", "refresh_withheld")}
    measured = metrics(tmp_path)
    assert list(by_step) == [step for step in (3, 6, 9, 12) if measured[step]["drift/overlap"] < 1]
    assert by_step[3]["event"] == "refresh_withheld"
    assert by_step[3]["why"].endswith("refresh.max_share=0.166667 has room from step 6 on")
    last = 0
    for step, row in by_step.items():
        assert row["event"] == ("refresh_triggered" if step - last >= 6 else "refresh_withheld")
        last = step if row["event"] == "refresh_triggered" else last
    assert last
    assert index.published[:2] == [0, next(step for step in by_step if step >= 6)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_refresh_under_way_is_waited_for_unless_it_has_failed(world, tmp_path, fails):
    index = building(world, fails)
    run_stage(job_of(world, tmp_path, DRIFT), index)
    rows = events(tmp_path, "refresh_triggered", "refresh_withheld")
    later = {row["event"] for row in rows[1:]}
    assert rows[0]["event"] == "refresh_triggered"
    assert later == ({"refresh_triggered"} if fails else {"refresh_withheld"})
    if not fails:
        assert rows[1]["why"].endswith("an earlier refresh is under way")


class PartsFirst(LocalIndex):
    """Partial refreshes are there at once, a whole one only when it is waited for."""

    whole: tuple[int, dict[str, np.ndarray]] | None = None

    def publish(self, weights_version: int, weights: dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
        if weights_version and only is None:
            self.whole = (weights_version, weights)
        else:
            super().publish(weights_version, weights, only)

    def wait_for_version(
        self,
        weights_version: int,
        timeout_s: float,
        report: Callable[[int, str], None] = lambda encoded, doing: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if self.whole is not None and self.weights_version < weights_version:
            super().publish(*self.whole)
            self.whole = None
        super().wait_for_version(weights_version, timeout_s, report)


# ---------------------------------------------------------------- partial


PARTIAL = RefreshPlan(partial=0.2, whole_every=3)


def test_partial_refreshes_encode_what_was_read_and_a_whole_one_comes_in_turn(world, tmp_path):
    index = world.index()
    stage, _ = run_stage(job_of(world, tmp_path, replace(PARTIAL, every_steps=2)), index)
    sizes = [180 if only is None else len(only) for only in index.partial]
    assert sizes == [180, 36, 36, 180, 36, 36, 180]
    triggered = events(tmp_path, "refresh_triggered")
    assert [row["share"] for row in triggered] == [0.2, 0.2, 1.0, 0.2, 0.2, 1.0]
    assert stage.state.refreshed_share == pytest.approx(2.8)
    assert (stage.state.published_whole, stage.state.partial_refreshes) == (12, 0)
    first = index.partial[1]
    assert first is not None
    job = job_of(world, tmp_path / "again", replace(PARTIAL, every_steps=2))
    again = Stage(job, world.index())
    again.serve_index(fresh=True)
    source = again.make_source(None)
    read = source.next().passages  # in step 1: the same weights, the same hits
    assert read is not None
    assert np.isin(read, first).all()


def test_staleness_is_that_of_each_hits_own_vector(world, tmp_path):
    index = world.index()
    job = job_of(world, tmp_path, replace(PARTIAL, every_steps=2), retrieval=RetrievalConfig(k=3, prefetch_depth=0))
    run_stage(job, index)
    rows = metrics(tmp_path)
    # Step 3 searches the index of step 2, in which a fifth is of step 2 and the rest of step 0.
    assert 0 <= rows[3]["index/staleness_steps"] <= rows[3]["index/staleness_max_steps"] <= 2
    assert rows[7]["index/staleness_steps"] == rows[7]["index/staleness_max_steps"] == 0  # the whole one of step 6
    assert all(row["index/staleness_steps"] <= row["index/staleness_max_steps"] for row in rows.values())
    # Any batch with all passages as hits: 36 of the newest weights, the others of the whole refresh before.
    job = job_of(world, tmp_path / "all", PARTIAL, retrieval=RetrievalConfig(k=180, prefetch_depth=0))
    stage = Stage(job, fresh := world.index())
    stage.serve_index(fresh=True)
    only = np.arange(0, 180, 5)
    fresh.publish(2, to_numpy(passage_state(stage.system.retriever)), only)
    fetched = stage.make_source(None).next()
    assert fetched.hit_versions is not None
    assert fetched.passages is not None
    assert np.array_equal(fetched.hit_versions.reshape(-1) == 2, np.isin(fetched.passages, only))
    window = Window(fetched=[fetched])
    measured = step_metrics(window, LoopState(step=4), times={"time/step_s": 1.0}, status=None)
    assert measured["index/staleness_steps"] == pytest.approx((36 * 1 + 144 * 3) / 180)
    assert measured["index/staleness_max_steps"] == 3


def test_the_last_measurement_has_a_whole_index(world, tmp_path):
    index = world.index()
    run_stage(job_of(world, tmp_path, replace(PARTIAL, whole_every=0, every_steps=4)), index)
    assert index.published == [0, 4, 8, 12, 12]
    assert [only is None for only in index.partial] == [True, False, False, False, True]
    assert index.status().oldest == 12


def test_a_bound_on_staleness_is_one_on_the_passage_encoded_longest_ago(world, tmp_path):
    index = PartsFirst(world.store(), world.encoder, len(world.tokenizer))
    job = job_of(world, tmp_path, replace(PARTIAL, every_steps=2, max_staleness_steps=6))
    stage, _ = run_stage(job, index)
    # After step 7 all passages must be of step 1 or newer. The index is of step 4, but most of it of step 0: the whole
    # refresh of step 6 is waited for. After step 12, so is that of step 12: the last measurement needs it.
    assert index.waited_for == [0, 1, 6, 12]
    assert stage.state.blocked_steps == 1
    assert max(row["index/staleness_max_steps"] for row in metrics(tmp_path).values()) <= 6 + 1


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("plan", [replace(DRIFT, max_share=0.25), replace(DRIFT, partial=0.1, whole_every=0)])
def test_a_resume_decides_as_the_uninterrupted_run(world, tmp_path, plan):
    changes = {"refresh": plan, "checkpoint": CheckpointConfig(every_steps=6, index=True)}
    changes["training"] = TrainingConfig(steps=12, batch_size=3, warmup_steps=0, lr_retriever=0.01)
    whole = resumable(world, tmp_path / "whole", **changes)
    run_stage(whole, world.index(folder=tmp_path / "index-whole"))
    parts = resumable(world, tmp_path / "parts", **changes)
    folder = tmp_path / "index-parts"
    probes = 1 + 2  # searches of drift: at the start, after steps 3 and 6
    with pytest.raises(Failure):
        run_stage(parts, failing(world, fails_at=2 * 8 + probes, folder=folder))
    saved = json.loads((Path(parts.run_dir) / "checkpoints" / "step-6" / "state.json").read_text())
    index = world.index(folder=folder)
    index.load(saved["generation"])
    run_stage(replace(parts, index_from_snapshot=True), index)
    assert rows_by_step(parts) == rows_by_step(whole)
    assert same(final_weights(parts), final_weights(whole))
    decisions = [
        {row["step"]: (row["event"], row["why"]) for row in events(Path(job.run_dir), *KINDS)} for job in (whole, parts)
    ]
    assert decisions[0] == decisions[1]
    assert len(decisions[0]) >= 2


KINDS = ("refresh_triggered", "refresh_withheld")
