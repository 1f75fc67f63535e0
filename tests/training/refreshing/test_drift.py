"""Drift of an index against the encoders as they are: nothing where they stand still, brute-force numbers where not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_world import TinyWorld
from training.make_source import make_probe
from training.refreshing.drift import DriftProbe, shift, spearman
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import RetrievalConfig

K, FACTOR, QUESTIONS = 3, 4, 7


def probed(world: TinyWorld, folder: Path, **options: Any) -> tuple[Stage, DriftProbe]:
    """A stage with a fresh index, and the probe of its settings."""
    plan = RefreshPlan(probe_questions=QUESTIONS)
    stage = Stage(world.job(folder, evaluate_questions="", refresh=plan), world.index(**options))
    stage.serve_index(fresh=True)
    return stage, make_probe(stage.parts, None)


def move(stage: Stage, size: float = 0.1) -> None:
    with torch.no_grad():
        for weight in stage.system.retriever.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))


def test_a_fresh_index_has_not_drifted(world, tmp_path):
    _, probe = probed(world, tmp_path)
    first = probe.measure()
    assert (first.overlap, first.weights_version) == (1.0, 0)
    assert first.rank_correlation == pytest.approx(1)
    assert first.passage_shift == pytest.approx(0, abs=1e-6)
    assert set(first.metrics()) == {"drift/overlap", "drift/rank_correlation", "drift/passage_shift"}
    probe.remember()
    assert probe.measure().query_shift == pytest.approx(0, abs=1e-9)


def test_the_numbers_are_those_of_a_recount(world, tmp_path):
    """From vectors of all passages, made one way before the weights moved and another way after."""
    stage, probe = probed(world, tmp_path)
    probe.measure()
    probe.remember()
    everything = np.arange(180)
    old_passages, old_queries = probe.fresh.passages(everything), probe.fresh.questions(probe.numbers)
    move(stage)
    measured = probe.measure()
    passages, queries = probe.fresh.passages(everything), probe.fresh.questions(probe.numbers)
    stale, fresh = queries @ old_passages.T, queries @ passages.T
    candidates = np.argsort(-stale, axis=1)[:, : K * FACTOR]
    overlaps, correlations = [], []
    for row, (old, new) in enumerate(zip(stale, fresh, strict=True)):
        mine = candidates[row]
        best = mine[np.argsort(-new[mine])][:K]
        overlaps.append(len(set(mine[:K]) & set(best)) / K)
        ranks = [np.argsort(np.argsort(values[mine])) for values in (old, new)]
        correlations.append(np.corrcoef(ranks[0], ranks[1])[0, 1])
    assert measured.overlap == pytest.approx(np.mean(overlaps))
    assert measured.overlap < 1
    assert measured.rank_correlation == pytest.approx(np.mean(correlations), abs=1e-4)

    def moved(before: np.ndarray, after: np.ndarray) -> float:  # vectors have length 1
        return float(np.mean(1 - (before * after).sum(axis=1)))

    flat = candidates.reshape(-1)
    assert measured.passage_shift == pytest.approx(moved(old_passages[flat], passages[flat]), abs=1e-5)
    assert measured.query_shift == pytest.approx(moved(old_queries, queries), abs=1e-5)
    assert measured.passage_shift > 0.001


def test_without_indexed_vectors_the_shift_is_from_the_last_publish(world, tmp_path):
    stage, probe = probed(world, tmp_path, keeps_vectors=False)
    assert np.isnan(probe.measure().passage_shift)  # nothing is known yet
    probe.remember()
    known = probe.measure()
    assert known.passage_shift == pytest.approx(0, abs=1e-9)
    move(stage, 0.02)
    drifted = probe.measure()
    assert 1e-5 < drifted.passage_shift < 0.5
    again = probe.measure()  # not published since: from the same vectors
    assert again.passage_shift == pytest.approx(drifted.passage_shift)
    probe.remember()
    assert probe.measure().passage_shift == pytest.approx(0, abs=1e-9)


def test_the_probe_is_a_fixed_sample(world, tmp_path):
    stage, probe = probed(world, tmp_path)
    assert np.array_equal(make_probe(stage.parts, None).numbers, probe.numbers)
    assert len(set(probe.numbers)) == QUESTIONS
    stage.job.seed += 1
    assert not np.array_equal(make_probe(stage.parts, None).numbers, probe.numbers)


def test_the_probe_asks_for_as_many_candidates_as_are_scored_again(world, tmp_path):
    stage, probe = probed(world, tmp_path)
    assert (probe.k, probe.depth) == (K, K * FACTOR)
    stage.job.settings.retrieval = RetrievalConfig(k=K, rescore=9)
    assert make_probe(stage.parts, None).depth == 9 * K
    stage.job.settings.retrieval = RetrievalConfig(k=K, rescore=500)
    assert make_probe(stage.parts, None).depth == 180


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([4, 3, 2, 1], [40, 30, 20, 10], 1),
        ([4, 3, 2, 1], [1, 2, 3, 4], -1),
        ([4, 3, 2, 1], [3, 4, 2, 1], 0.8),  # 1 - 6 * (1 + 1) / (4 * 15)
        ([3, 2, 2, 1], [4, 3, 2, 1], 0.9486833),  # ties share rank 2.5: 4.5 / sqrt(4.5 * 5)
        ([1, 1, 1], [3, 2, 1], np.nan),
    ],
)
def test_rank_correlation_by_hand(first, second, expected):
    a, b = np.array(first, float), np.array(second, float)
    assert spearman(a, b, np.ones(len(a), bool)) == pytest.approx(expected, nan_ok=True)
    a, b = np.append(a, 99.0), np.append(b, 99.0)  # a column that no passage stands in
    assert spearman(a, b, np.arange(len(a)) < len(first)) == pytest.approx(expected, nan_ok=True)


def test_shift_by_hand():
    before = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    after = np.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    assert shift(before, after) == pytest.approx([0, 1, 2, 1 - 2**-0.5])
