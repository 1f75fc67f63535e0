"""Reads the `compare` section: a matrix of runs that differ from one stage in the settings of a cell alone.

compare:
  base_stage: joint            # a cell is this stage, with the changes of the command line, then those of the cell
  baseline: frozen             # the cell that the others are compared with
  seeds: [0, 1, 2]
  cells:
    frozen: {training: {train: generator_only}, retrieval: {source: fixed}}
  axes:                        # every combination of one choice of each: "both, emdr2"
    train: {both: {training: {train: both}}, query_only: {training: {train: query_only}}}
    objective: {rag_sequence: {objective: {name: rag_sequence}}, emdr2: {objective: {name: emdr2}}}
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config.schema import checked
from cluster.config.setting_names import unknown
from cluster.config.settings import CompareConfig, Settings
from indexing.declare import refuse, suggestion

KEYS = ("base_stage", "baseline", "seeds", "cells", "axes")
SAME_FOR_ALL = ("training.steps", "training.batch_size", "engine.gradient_accumulation")  # the budget


@dataclass(frozen=True)
class Matrix:
    """Runs that are compared. `cells`: complete settings by name, in order; `run.init_from` of each is the name of a
    stage or a folder, `run.name` its folder below the experiment's."""

    base_stage: str
    baseline: str
    seeds: tuple[int, ...]
    cells: dict[str, Settings]


def read_matrix(section: Any, source: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings, the sections of each cell and those of each axis' choices in a `compare` section of a file.
    Raises ValueError for a wrong key."""
    content = _named(section, "compare", source)
    for key in content:
        if key not in KEYS:
            raise unknown(source, "compare.", key, list(KEYS))
    given = {key: value for key, value in content.items() if key not in ("cells", "axes")}
    cells = _sections(content.get("cells"), "compare.cells", source)
    axes = {
        axis: _sections(choices, f"compare.axes.{axis}", source)
        for axis, choices in _named(content.get("axes"), "compare.axes", source).items()
    }
    return checked(given, CompareConfig, "compare.", source), cells, axes


def _sections(section: Any, key: str, source: str) -> dict[str, Any]:
    """Return the settings by the names that they stand under."""
    found = {}
    for name, part in _named(section, key, source).items():
        found[name] = checked(part, Settings, f"{key}.{name}.", source)
        check_own(found[name], f"{key}.{name}.", source)
    return found


def _named(section: Any, key: str, source: str) -> dict[str, Any]:
    if section in ("", None):
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{source}: {key}={section}: must hold settings by name")
    return {str(name): below for name, below in section.items()}


def check_own(part: Mapping[str, Any], prefix: str, source: str) -> None:
    """Refuse what cells may not set: their place, and the budget, which is the same for all. Raises ValueError."""
    for entry in part.get("run", {}):
        if entry != "init_from":
            raise ValueError(f"{source}: {prefix}run.{entry}: cells only set run.init_from; seeds are compare.seeds")
    for setting in SAME_FOR_ALL:
        section, _, name = setting.partition(".")
        if name in part.get(section, {}):
            raise ValueError(f"{source}: {prefix}{setting}: set it once, for all cells: they have the same budget")


def combined(cells: Mapping[str, Any], axes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the sections that each cell sets, by name: the named cells, then every combination of the axes. Raises
    ValueError for two
    cells of one name or one folder."""
    found: dict[str, list[Any]] = {name: [part] for name, part in cells.items()}
    for choices in itertools.product(*(axis.items() for axis in axes.values())) if axes else ():
        name = ", ".join(choice for choice, _ in choices)
        if name in found:
            raise ValueError(f"compare.cells.{name}: is a combination of compare.axes too; give it another name")
        found[name] = [part for _, part in choices]
    folders: dict[str, str] = {}
    for name in found:
        other = folders.setdefault(folder_of(name), name)
        if other != name:
            raise ValueError(f"compare.cells.{name}: would share the folder {folder_of(name)} with the cell {other!r}")
    return found


def folder_of(cell: str) -> str:
    """Return the folder of a cell's runs: its name, with one hyphen for all but letters, digits, _ and a full stop."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", cell).strip("-.")


def check_matrix(config: CompareConfig, cells: Sequence[str], stages: Sequence[str]) -> None:
    """Refuse a stage or a baseline that does not exist, and wrong seeds. Raises ValueError."""
    if not cells:
        raise ValueError("compare.cells: needs cells, or axes whose combinations are cells")
    known = f"must name a stage of this file: {', '.join(stages) or 'there are none'}."
    if config.base_stage not in (stages or [""]):
        raise refuse("compare.base_stage", config.base_stage, known + suggestion(config.base_stage, list(stages)))
    if config.baseline not in cells:
        allowed = f"must name a cell: {'; '.join(cells)}."
        raise refuse("compare.baseline", config.baseline, allowed + suggestion(config.baseline, list(cells)))
    if not config.seeds or min(config.seeds) < 0 or len(set(config.seeds)) < len(config.seeds):
        raise refuse("compare.seeds", config.seeds, "must be one or more whole numbers of 0 or above, each once")
    for cell in cells:
        if not folder_of(cell) or folder_of(cell) in stages:
            raise refuse("compare.cells", cell, "must have a name of letters or digits, and not that of a stage")


def check_start(cell: str, init_from: str, stages: Sequence[str], base_stage: str) -> None:
    """Refuse a cell that starts from the stage that it stands for, or from a later one. Raises ValueError."""
    earlier = list(stages[: stages.index(base_stage)]) if base_stage in stages else []
    if init_from in stages and init_from not in earlier:
        allowed = f"must be a stage before {base_stage}: {', '.join(earlier) or 'there is none'}"
        raise refuse(f"compare cell {cell}: run.init_from", init_from, allowed)
