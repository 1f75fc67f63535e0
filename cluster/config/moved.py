"""Mends the paths of a run folder that was moved, renamed or copied: files inside the run are looked for where the
folder lies now."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config.settings import Settings

PATHS = {  # settings that may name a file or folder, by section
    "run": ("init_from",),
    "corpus": ("path", "updates"),
    "questions": ("path",),
    "preferences": ("path",),
    "encoder": ("name",),
    "generator": ("name",),
    "reranker": ("name",),
}


def relocated(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `content`, the config.yaml of the run folder `folder`, with `run.name` and `run.directory` of the place
    where the folder lies, and with every path inside the run (or inside the run that it is a stage of) below it."""
    run = content.get("run")
    if not isinstance(run, dict) or not all(
        isinstance(run.get(key), str) and run[key] for key in ("name", "directory")
    ):
        return content
    recorded = Path(run["directory"]) / run["name"]
    if recorded.resolve() == folder.resolve():
        return content
    depth = len(Path(run["name"]).parts)
    if len(folder.parts) <= depth or ".." in folder.parts:
        folder = Path(os.path.abspath(folder))
    depth = min(depth, len(folder.parts) - 1)
    before, now = recorded.parents[depth - 1] / recorded.parts[-depth], folder.parents[depth - 1] / folder.parts[-depth]
    moved = {
        section: _moved(values, PATHS.get(section, ()), before, now) if isinstance(values, dict) else values
        for section, values in content.items()
    }
    place = {"directory": str(folder.parents[depth - 1]), "name": "/".join(folder.parts[-depth:])}
    return {**moved, "run": {**moved["run"], **place}}


def with_absolute_paths(settings: Settings) -> Settings:
    """Return `settings` with every file or folder that exists by its absolute path."""
    sections: dict[str, Any] = {}
    for section, names in PATHS.items():
        values = vars(settings)[section]
        found = {name: vars(values)[name] for name in names if vars(values)[name]}
        sections[section] = replace(
            values, **{name: str(Path(path).resolve()) for name, path in found.items() if Path(path).exists()}
        )
    return replace(settings, **sections)


def _moved(values: dict[str, Any], names: tuple[str, ...], before: Path, now: Path) -> dict[str, Any]:
    """Return a section with the paths below `before` put below `now`."""
    found = {name: Path(values[name]) for name in names if isinstance(values.get(name), str) and values[name]}
    inside = {name: path.relative_to(before) for name, path in found.items() if path.is_relative_to(before)}
    return {**values, **{name: str(now / path) for name, path in inside.items()}}
