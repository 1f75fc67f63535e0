"""A run folder as the training leaves it, made in seconds and without Ray."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tandem
from cluster.config.experiment import to_yaml
from cluster.config.moved import with_absolute_paths
from cluster.config.settings import RunConfig
from cluster.machines.events import EventLog
from cluster.prepare.recorded_stores import record_stores
from cluster.prepare.stores import prepare_data
from cluster.stage.run_stage import make_job
from indexing.corpus.stores.passages import Store
from indexing.indexing_settings import CorpusConfig, IndexConfig, QuestionsConfig, WorldConfig
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import tiny_encoder, tiny_generator
from training.models.text.tokenizers import load_tokenizer
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    DecodingConfig,
    EvaluationConfig,
    MonitorConfig,
    RetrievalConfig,
    TrainingConfig,
)


def train_tiny(directory: Path, corpus: CorpusConfig, **sections: Any) -> Path:
    """Train the stage `tiny/joint` for two steps below `directory`; returns its run folder. `sections` replace those of
    its settings."""
    settings = tandem.Settings(
        run=RunConfig(name="tiny/joint", directory=str(directory)),
        corpus=corpus,
        questions=QuestionsConfig(max_questions=24),
        encoder=tiny_encoder(),
        generator=tiny_generator(),
        retrieval=RetrievalConfig(k=3, hybrid="learned", candidates=20),
        index=IndexConfig(num_shards=2),
        training=TrainingConfig(steps=2, batch_size=2),
        checkpoint=CheckpointConfig(index=False),
        evaluation=EvaluationConfig(decoding=DecodingConfig(max_tokens=4)),
        monitor=MonitorConfig(console=False, wandb="off"),
    )
    settings = replace(settings, **sections)
    root, folder = directory / "tiny", directory / "tiny" / "joint"
    prepared = prepare_data(settings, root, lambda _: None)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(with_absolute_paths(settings)), encoding="utf-8")
    record_stores(folder, prepared.passages, prepared.tokenizers)
    events = EventLog(folder / "events.jsonl")
    events("stage_started", step=0)
    vocabulary = len(load_tokenizer(prepared.tokenizers / "retriever"))
    index = LocalIndex(Store.open(prepared.passages), settings.encoder, vocabulary, lexical=settings.lexical)
    Stage(replace(make_job(settings, prepared, "", folder), corpus=str(folder / "corpus")), index).run()
    events("stage_finished")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder; never changed."""
    return train_tiny(tmp_path_factory.mktemp("first"), CorpusConfig(world=WorldConfig(num_people=30, num_values=20)))


@pytest.fixture
def moved(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run under another name in another place, without the times of its files; the first one is hidden
    by nothing, and must not be touched."""
    shutil.copytree(trained.parent, tmp_path / "elsewhere" / "renamed", copy_function=shutil.copyfile)
    return tmp_path / "elsewhere" / "renamed" / "joint"


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tandem.Run:
    """The run, loaded from a copy."""
    place = tmp_path_factory.mktemp("copy") / "tiny"
    shutil.copytree(trained.parent, place)
    return tandem.load(place / "joint")
