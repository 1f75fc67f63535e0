"""What a stage takes over: the index, only where its vectors are those of the stage's own passage encoder; and both
towers, where those of the run before have parted."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from cluster.commands.ask import answer_question
from cluster.commands.measure import without_training
from cluster.config.settings import Settings
from cluster.refresh.snapshots import IndexIdentity
from cluster.stage.inherit import inherit_index
from indexing.corpus.snapshot import write_once
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard
from tests.cluster.prepare.test_finetuning_formats import TOWNS, corpus, plain, predictions, settings_for, stage_of
from training.checkpoint import newest_checkpoint, saved_names
from training.models.parts.weights import to_numpy
from training.stage import Stage
from training.training_settings import TrainingConfig

IDENTITY = IndexIdentity(
    encoder_fingerprint="encoder", corpus_fingerprint="corpus", factory="Flat", ranges=((0, 5), (5, 9))
)
FIXED = Settings(training=TrainingConfig(train="query_only"))
VECTORS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def write_run(folder: Path, current: bool = True) -> Path:
    """A run whose checkpoint names generation 3, as shards and coordinator write it; returns the checkpoint."""
    extra = {**asdict(IDENTITY), "generation": 3, "weights_version": 40}
    with write_once(folder / "index" / "generation-3", extra) as directory:
        for number, (start, stop) in enumerate(IDENTITY.ranges):
            shard = Shard(number, start, stop=stop, config=IndexConfig())
            shard.stage(3, 40, start, VECTORS[start:stop])
            shard.prepare(3)
            shard.commit(3)
            shard.save(3, directory)
    checkpoint = folder / "checkpoints" / "step-40"
    checkpoint.mkdir(parents=True)
    state = {"generation": 3, "index_is_current": current}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return checkpoint


def test_a_fitting_index_is_linked_and_answers(tmp_path: Path) -> None:
    checkpoint, run_dir = write_run(tmp_path / "before"), tmp_path / "run"
    (run_dir / "index").mkdir(parents=True)
    expected = run_dir / "index" / "generation-3"
    for _ in range(2):  # harmless when repeated
        assert inherit_index(FIXED, str(checkpoint), run_dir=run_dir, identity=IDENTITY) == expected
    assert [path.name for path in (run_dir / "index").iterdir()] == ["generation-3"]
    shard = Shard(1, 5, stop=9, config=IndexConfig())
    assert shard.load(3, expected) == 40
    hits = shard.search(VECTORS[:2], 4, num_vectors=2)
    np.testing.assert_array_equal(hits.ids, 5 + np.argsort(-(VECTORS[:2] @ VECTORS[5:].T), axis=1))
    assert hits.vectors is not None
    np.testing.assert_array_equal(hits.vectors, VECTORS[hits.ids[:, :2]])


@pytest.mark.parametrize(
    "settings",
    [
        Settings(training=TrainingConfig(train="both")),
        Settings(training=TrainingConfig(train="retriever_only")),
        replace(FIXED, refresh=replace(FIXED.refresh, precision="bfloat16")),
    ],
    ids=["both", "retriever_only", "bfloat16"],
)
def test_an_encoder_that_changes_takes_none(settings: Settings, tmp_path: Path) -> None:
    assert (
        inherit_index(settings, str(write_run(tmp_path / "before")), run_dir=tmp_path / "run", identity=IDENTITY)
        is None
    )


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, encoder_fingerprint="another"),
        replace(IDENTITY, corpus_fingerprint="another"),
        replace(IDENTITY, factory="SQfp16"),
    ],
)
def test_another_index_is_left_alone(identity: IndexIdentity, tmp_path: Path) -> None:
    assert (
        inherit_index(FIXED, str(write_run(tmp_path / "before")), run_dir=tmp_path / "run", identity=identity) is None
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranges", [((0, 4), (4, 9)), ((0, 9),), ((0, 2), (2, 5), (5, 9))])
def test_another_number_of_shards_takes_over_too(ranges: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    (tmp_path / "run" / "index").mkdir(parents=True)
    start, identity = str(write_run(tmp_path / "before")), replace(IDENTITY, ranges=ranges)
    directory = inherit_index(FIXED, start, run_dir=tmp_path / "run", identity=identity)
    assert directory is not None
    for number, (first, last) in enumerate(ranges):
        shard = Shard(number, first, stop=last, config=IndexConfig())
        assert shard.load(3, directory) == 40
        best = shard.search(VECTORS, 1).ids[:, 0]
        np.testing.assert_array_equal(best, first + np.argmax(VECTORS @ VECTORS[first:last].T, axis=1))


def test_an_index_without_vectors_to_score_again_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "index").mkdir(parents=True)
    settings = replace(FIXED, index=replace(FIXED.index, rescore_candidates=30))
    assert (
        inherit_index(settings, str(write_run(tmp_path / "before")), run_dir=tmp_path / "run", identity=IDENTITY)
        is None
    )


def test_stale_missing_and_damaged_indexes_are_left_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert inherit_index(FIXED, "", run_dir=run_dir, identity=IDENTITY) is None
    assert inherit_index(FIXED, str(tmp_path / "checkpoints" / "step-1"), run_dir=run_dir, identity=IDENTITY) is None
    assert (
        inherit_index(FIXED, str(write_run(tmp_path / "stale", current=False)), run_dir=run_dir, identity=IDENTITY)
        is None
    )
    checkpoint = write_run(tmp_path / "before")
    damaged = next((tmp_path / "before").rglob("*.faiss"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # a wrong bit is found by the shard that loads it
    assert inherit_index(FIXED, str(checkpoint), run_dir=run_dir, identity=IDENTITY) is None


def towers(stage: Stage) -> list[dict[str, np.ndarray]]:
    """The weights of the query tower and of the passage tower."""
    retriever = stage.system.retriever
    return [to_numpy(tower.state_dict()) for tower in (retriever.query_encoder, retriever.passage_encoder)]


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_towers_that_have_parted_go_on_as_two(tmp_path: Path) -> None:
    """Whatever trains next, and where nothing does: to evaluate, to encode an index, to answer a question."""
    corpus(tmp_path / "corpus", plain)
    rate = "training.lr_retriever=0.01"
    start = stage_of(settings_for(tmp_path, "training.train=query_only", rate), tmp_path)
    start.run()
    query, passage = towers(start)
    assert not equal(query, passage)
    found = predictions(tmp_path)
    checkpoint = newest_checkpoint(tmp_path / "run", print)
    assert checkpoint is not None
    settings = settings_for(tmp_path, rate)
    for train, changes in (("both", True), ("retriever_only", True), ("generator_only", False), ("none", False)):
        asked = replace(settings, training=replace(settings.training, train=train))
        asked = without_training(asked, "asked", str(checkpoint)) if train == "none" else asked
        stage = stage_of(asked, tmp_path / train, str(checkpoint))
        stage.run()
        assert [equal(*pair) for pair in zip(towers(stage), (query, passage), strict=True)] == [not changes] * 2
        assert not equal(*towers(stage))
    assert predictions(tmp_path / "none") == found
    question = plain(TOWNS[20])["text"]
    answer = answer_question(settings, tmp_path / "runs" / settings.run.name, str(checkpoint), [question])
    read = [line.split()[2] for line in answer.splitlines() if line.startswith("  ") and line.split()[2] in TOWNS]
    assert read == next(row["hits"][:2] for row in found if row["id"] == f"q-{TOWNS[20]}")


def test_shared_towers_stay_shared(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", plain)
    stage_of(settings_for(tmp_path), tmp_path).run()
    checkpoint = newest_checkpoint(tmp_path / "run", print)
    assert checkpoint is not None
    assert not any(".passage_encoder." in name for name in saved_names(checkpoint))
    after = stage_of(settings_for(tmp_path), tmp_path / "after", str(checkpoint))
    after.run()
    assert after.system.retriever.shared
