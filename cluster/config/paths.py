"""Refuses folders and files that a configuration names and that are not there, before anything heavy is imported."""

import os
from collections.abc import Collection
from pathlib import Path

from cluster.config.settings import Settings
from indexing.corpus.files.corpus import corpus_path, updates_path
from indexing.corpus.files.preferences import preferences_path
from indexing.declare import looked_at, refuse


def check_paths(settings: Settings, root: Path, starts: Collection[str] = ()) -> None:
    """Refuse data, model folders and a start that are not there. Raises ValueError with the path that was looked at.
    Data may be gone where a store of it may stand: in the run folder `root`, or beside the start. `starts` are stages
    and run folders that will be there when they are needed."""
    start = settings.run.init_from
    if not (root / "data").is_dir() and (not start or start in starts):
        _check_data(settings)
    check_model_folders(settings)
    if start and start not in starts and not Path(start).is_dir():
        raise refuse("run.init_from", start, f"must be a checkpoint or run folder that exists{looked_at(start)}")


def check_trained(settings: Settings, root: Path) -> None:
    """Refuse a stage that was not trained, and what a trained stage reads that is not there: model folders, and data of
    which neither the stage nor the run folder `root` keeps a store. Raises ValueError."""
    folder = Path(settings.run.directory) / settings.run.name
    if not folder.is_dir():
        raise ValueError(f"{folder} has no complete checkpoint yet: train it first (tandem train)")
    if not any((place / kept).exists() for place in (folder, root, root.parent) for kept in ("data", "corpus")):
        _check_data(settings)
    check_model_folders(settings)


def _check_data(settings: Settings) -> None:
    if settings.corpus.path:
        corpus_path(settings.corpus)
        updates_path(settings.corpus)
    questions = settings.questions.path
    if questions and not Path(questions).is_dir():
        raise refuse("questions.path", questions, f"must be a folder that exists{looked_at(questions)}")
    if settings.preferences.path:
        preferences_path(settings.preferences)


def check_model_folders(settings: Settings) -> None:
    """Refuse the name of a model that looks like a folder and is none. Raises ValueError."""
    for section in ("encoder", "generator", "reranker"):
        name = vars(settings)[section].name
        is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
        if is_path and not Path(name).is_dir():
            allowed = "must be a folder that exists, or a name of the Hugging Face hub"
            raise refuse(f"{section}.name", name, allowed + looked_at(name))
