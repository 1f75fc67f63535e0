"""From a preference file to write-once stores beside those of the questions, `<run>/data/<key>/preferences-<key>-USE/`.

USE is `pairs` or `judged` with the split; the key covers the settings and the file, so that a changed file has another.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cluster.config.settings import Settings
from indexing.corpus.files.preferences import is_paired, preferences_path, read_preferences, sampled_pairs
from indexing.corpus.snapshot import is_complete
from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import write_questions
from indexing.indexing_settings import PreferencesConfig
from training.run_text import RunText
from training.training_settings import PREFERENCE

Say = Callable[[str], None]


def prepare_preferences(
    settings: Settings, folder: Path, *, store: Store, text: RunText, train: bool, say: Say
) -> dict[str, Path]:
    """Return the stores by what they are for, `train` (only where wanted and the objective learns from preferences) and
    `evaluate`; writes what is not there yet. Raises ValueError for bad settings and, with `on_bad: error`, lines."""
    config, wanted = settings.preferences, {}
    if settings.objective.name not in PREFERENCE and not config.path:
        return {}
    if config.path and not Path(config.path).exists():
        return _prepared_before(settings, folder, train)
    if train and settings.objective.name in PREFERENCE:
        wanted["train"] = (config.train, settings.objective.name == "dpo")
    if config.evaluate and is_paired(config):
        wanted["evaluate"] = (config.evaluate, True)
    elif config.evaluate:
        say(f"{config.path}: judged answers are no pairs; preference accuracy is not measured")
    paths = {}
    for use, (split, as_pairs) in wanted.items():
        kind = "pairs" if as_pairs else "judged"
        paths[use] = folder / f"preferences-{_key(config)}-{kind}-{split}"
        if is_complete(paths[use]):
            continue
        found = read_preferences(config, split, as_pairs)
        questions = sampled_pairs(config, found.questions) if use == "evaluate" else found.questions
        written = write_questions(
            paths[use],
            questions,
            sides=text.question_sides,
            answer_side=text.answer_side,
            store=store,
            render=text.render,
            labels=found.labels,
        )
        say(f"{len(written)} {kind} of preferences, split {split}, tokenised into {paths[use]}")
        if found.num_too_unequal:
            say(f"{found.num_too_unequal} pairs left out by preferences.max_length_ratio={config.max_length_ratio}")
        if found.report.bad:
            say(f"{config.path}: {found.report.summary()}")
    return paths


def _prepared_before(settings: Settings, folder: Path, train: bool) -> dict[str, Path]:
    """Return the stores that are left of a file that is gone. Raises ValueError where one lacks."""
    config, dpo = settings.preferences, settings.objective.name == "dpo"
    wanted = {"evaluate": ("pairs", config.evaluate)} if config.evaluate else {}
    if train and settings.objective.name in PREFERENCE:
        wanted["train"] = ("pairs" if dpo else "judged", config.train)
    found = {use: sorted(folder.glob(f"preferences-*-{kind}-{split}")) for use, (kind, split) in wanted.items()}
    for paths in found.values():
        if len(paths) != 1 or not is_complete(paths[0]):
            preferences_path(config)  # raises: the file is gone
    return {use: paths[0] for use, paths in found.items()}


def _key(config: PreferencesConfig) -> str:
    path = preferences_path(config)
    parts = [asdict(config), str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
