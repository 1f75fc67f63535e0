"""Turns YAML files and dotted overrides into typed settings; all other code takes dataclasses.

A file holds sections of `Settings`. Two more top-level keys describe several runs in one file:

    stages:                      # in order; each is a run in runs/<run.name>/<stage>
      pretrain: {objective: {name: inverse_cloze}, training: {train: retriever_only}}
      joint: {run: {init_from: pretrain}}
    update: {as_of: end, stages: [joint]}
    compare: {base_stage: joint, ...}      # see cluster/config/matrix.py

Who wins, weakest first: defaults, earlier file, later file, the stage's own sections, `section.field=value` of the
command line (for every stage; `run.init_from` for those that start from no other stage of the file),
`stages.joint.section.field=value`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.config.config_files import DEFAULT_FILE, find_file, shown
from cluster.config.matrix import Matrix, check_matrix, check_start, combined, folder_of, read_matrix
from cluster.config.moved import relocated
from cluster.config.schema import COMMAND_LINE, checked, kind_of, read_yaml
from cluster.config.setting_names import unknown
from cluster.config.settings import CompareConfig, Settings, UpdateConfig
from cluster.config.validate import validate
from indexing.declare import check_values, differences, refuse, suggestion


@dataclass(frozen=True)
class Experiment:
    """Holds the runs that a configuration asks for. `stages` maps names to complete settings, in order; a file
    without stages has one, named ""."""

    settings: Settings  # what all stages share
    stages: dict[str, Settings]
    update: UpdateConfig  # its `stages` are keys of `stages`
    matrix: Matrix | None = None  # of a file with a `compare` section

    @property
    def directory(self) -> Path:
        """Return the run folder that holds the stages; that of the only run in a file without stages."""
        return Path(self.settings.run.directory) / self.settings.run.name

    @property
    def last_name(self) -> str:
        """Return the name of the last stage."""
        return list(self.stages)[-1]

    @property
    def last(self) -> Settings:
        """Return the settings of the last stage, which commands that take one stage are about."""
        return self.stages[self.last_name]


@cache
def _schema() -> DictConfig:
    """Return the defaults. They are made once, which takes a tenth of a second, and never change: `merge` copies."""
    return OmegaConf.structured(Settings)


@dataclass(kw_only=True)
class _Files:
    """Holds the content of all files, merged, before the command line changes it."""

    base: DictConfig = field(default_factory=lambda: _schema())
    update: DictConfig = field(default_factory=lambda: OmegaConf.structured(UpdateConfig))
    stages: dict[str, DictConfig] = field(default_factory=dict)  # sections of each stage
    compare: DictConfig = field(default_factory=lambda: OmegaConf.structured(CompareConfig))
    cells: dict[str, DictConfig] = field(default_factory=dict)  # sections of each cell
    axes: dict[str, dict[str, DictConfig]] = field(default_factory=dict)  # those of each choice of each axis


SECTIONS = [entry.name for entry in fields(Settings)]
RUN_FOLDERS = ("data", "tokenizers", "world", "compare")  # beside those of stages (`cluster/prepare/stores.py`)
TOP_LEVEL = [*SECTIONS, "stages", "update", "compare"]


def load(paths: list[str], overrides: list[str]) -> Experiment:
    """Read, merge and check. `paths` are YAML files or run folders with a config.yaml (none: the quickstart), later
    ones over earlier ones; `overrides` are "section.field=value". Raises ValueError with one clear sentence."""
    files = _Files()
    for path in paths or [str(DEFAULT_FILE)]:
        _read_file(find_file(path), files, Path(path) if Path(path).is_dir() else None)
    changes = [_parse_override(text, list(files.stages)) for text in overrides]
    for key, value in changes:
        if key.startswith("update."):
            _assign(files.update, key.removeprefix("update."), value, "update.")
        if key.startswith("compare."):
            _assign(files.compare, key.removeprefix("compare."), value, "compare.")
    settings = _resolve(files.base, "", changes, files)
    stages = {n: _resolve(OmegaConf.merge(files.base, part), n, changes, files) for n, part in files.stages.items()}
    update, matrix = _to_object(files.update, "update."), _matrix(files, changes)
    experiment = Experiment(settings, stages or {"": settings}, update, matrix)
    _name_stages(stages)
    _check_update(experiment)
    for name, stage in experiment.stages.items():
        try:
            validate(stage)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}" if name else str(error)) from None
    for name, cell in matrix.cells.items() if matrix is not None else ():
        try:
            validate(cell)
        except ValueError as error:
            raise ValueError(f"compare cell {name}: {error}") from None
    return experiment


def to_yaml(section: Settings | UpdateConfig | CompareConfig) -> str:
    """Return settings as YAML; `load` reads those of a run back."""
    return OmegaConf.to_yaml(OmegaConf.structured(section))


def experiment_to_yaml(experiment: Experiment) -> str:
    """Return the whole experiment as YAML that `load` reads back, for the folder that holds the stages."""
    content: dict[str, Any] = asdict(experiment.settings)
    stages = {name: asdict(part) for name, part in experiment.stages.items() if name}
    for part in stages.values():
        del part["run"]["name"], part["run"]["directory"]
    if stages:
        content |= {"stages": stages, "update": asdict(experiment.update)}
    return OmegaConf.to_yaml(content)


def changes_to_yaml(experiment: Experiment) -> str:
    """Return what differs from the defaults as YAML that `load` reads back: the shared settings, then each stage's
    and each cell's differences from them."""
    shared, stages, matrix = experiment.settings, experiment.stages, experiment.matrix
    content = differences(shared, Settings())
    names = {str(Path(part.run.directory) / part.run.name): name for name, part in stages.items() if name}

    def changes(part: Settings, base: Settings) -> dict[str, Any]:
        start = names.get(part.run.init_from, part.run.init_from)
        return differences(replace(part, run=replace(base.run, init_from=start)), base)

    if names:
        content["stages"] = {name: changes(part, shared) for name, part in stages.items()}
    if experiment.update.as_of:
        update = experiment.update if names else replace(experiment.update, stages=[])
        content["update"] = differences(update, UpdateConfig())
    if matrix is not None:
        base = stages.get(matrix.base_stage, shared)
        cells = {name: changes(cell, base) for name, cell in matrix.cells.items()}
        given = CompareConfig(matrix.base_stage, matrix.baseline, list(matrix.seeds))
        content["compare"] = differences(given, CompareConfig()) | {"cells": cells}
    return OmegaConf.to_yaml(content) if content else "{}\n"


def _read_file(file: Path, files: _Files, folder: Path | None = None) -> None:
    """Merge one file over what the earlier ones said, after checking it by itself. `folder` is the run folder that it
    is the config.yaml of."""
    source = shown(file)
    try:
        content = read_yaml(file.read_text(encoding="utf-8"), source) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("stages") or {}, dict):
        raise ValueError(f"{source}: must hold sections like `training:`, and `stages:` sections by name")
    for key in content:
        if key not in TOP_LEVEL:
            raise unknown(source, "", str(key), TOP_LEVEL)
    content = content if folder is None else relocated(content, folder)
    sections = checked({key: content[key] for key in SECTIONS if key in content}, Settings, "", source)
    files.base = _merge(files.base, sections, source)
    files.update = _merge(files.update, checked(content.get("update"), UpdateConfig, "update.", source), source)
    _merge_compare(content.get("compare"), source, files)
    for name, stage in (content.get("stages") or {}).items():
        if not str(name).replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{source}: stages.{name}: a stage's name is letters, digits, _ and -")
        if name in RUN_FOLDERS:
            raise ValueError(f"{source}: stages.{name}: a run keeps its {name} in a folder of that name; take another")
        part = checked(stage, Settings, f"stages.{name}.", source)
        for fixed in {"name", "directory"} & set(part.get("run", {})):
            raise ValueError(f"{source}: stages.{name}.run.{fixed}: set run.{fixed} once, for all stages")
        _merge(_schema(), part, source, f"stages.{name}.")  # refuses wrong types, by file
        files.stages[name] = cast(DictConfig, OmegaConf.merge(files.stages.get(name, {}), part))


def _merge_compare(section: Any, source: str, files: _Files) -> None:
    """Merge a `compare` section over what the earlier files said."""
    given, cells, axes = read_matrix(section, source)
    files.compare = _merge(files.compare, given, source, "compare.")
    for name, part in cells.items():
        _merge(_schema(), part, source, f"compare.cells.{name}.")  # refuses wrong types, by file
        files.cells[name] = cast(DictConfig, OmegaConf.merge(files.cells.get(name, {}), part))
    for axis, choices in axes.items():
        known = files.axes.setdefault(axis, {})
        for name, part in choices.items():
            _merge(_schema(), part, source, f"compare.axes.{axis}.{name}.")
            known[name] = cast(DictConfig, OmegaConf.merge(known.get(name, {}), part))


def _matrix(files: _Files, changes: list[tuple[str, Any]]) -> Matrix | None:
    """Return the cells as complete settings; None without any. A cell is the base stage as the command line has it,
    with the sections of the cell on top."""
    config: CompareConfig = _to_object(files.compare, "compare.")
    if not files.cells and not files.axes and config == CompareConfig():
        return None
    owns, stages = combined(files.cells, files.axes), list(files.stages)
    check_matrix(config, list(owns), stages)
    base = OmegaConf.merge(files.base, files.stages.get(config.base_stage, {}))
    base = _changed(base, config.base_stage, changes, stages)
    cells: dict[str, Settings] = {}
    for name, part in owns.items():
        cell: Settings = _to_object(cast(DictConfig, OmegaConf.merge(base, *part)), f"compare cell {name}: ")
        check_start(name, cell.run.init_from, stages, config.base_stage)
        cell.run.name = f"{cell.run.name}/compare/{folder_of(name)}"
        cells[name] = cell
    return Matrix(config.base_stage, config.baseline, tuple(config.seeds), cells)


def _parse_override(text: str, stages: list[str]) -> tuple[str, Any]:
    """Return (dotted name, value) of "section.field=value". Raises ValueError for a name that does not exist."""
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"{COMMAND_LINE}: {text}: an override is section.field=value")
    if parts[0] == "stages":
        if len(parts) < 4 or parts[1] not in stages:
            hint = suggestion(parts[1], stages) if len(parts) > 1 else ""
            known = f"stages of this file: {', '.join(stages) or 'none'}."
            raise ValueError(f"{COMMAND_LINE}: {key}: must be stages.<stage>.section.field=value; {known}{hint}")
        if parts[2:] in (["run", "name"], ["run", "directory"]):
            raise ValueError(f"{COMMAND_LINE}: {key}: set {'.'.join(parts[2:])} once, for all stages")
        kind = kind_of(parts[2:], Settings, f"stages.{parts[1]}.")
    elif parts[0] == "update":
        kind = kind_of(parts[1:], UpdateConfig, "update.")
    elif parts[0] == "compare":
        kind = kind_of(parts[1:], CompareConfig, "compare.")
    else:
        kind = kind_of(parts, Settings, "", TOP_LEVEL)
    return key, checked(raw if kind is str else read_yaml(raw, COMMAND_LINE), kind, f"{key}.", COMMAND_LINE)


def _resolve(config: Any, stage: str, changes: list[tuple[str, Any]], files: _Files) -> Settings:
    return _to_object(_changed(config, stage, changes, list(files.stages)), f"stages.{stage}." if stage else "")


def _changed(config: Any, stage: str, changes: list[tuple[str, Any]], stages: Sequence[str]) -> DictConfig:
    """Return a copy of `config` with the command line over it: plain overrides first, those of the stage last. A plain
    run.init_from is for the first stages: it does not change one that starts from another of `stages`."""
    config, part = config.copy(), f"stages.{stage}."
    inner = OmegaConf.select(config, "run.init_from") in stages
    for key, value in changes:
        if not key.startswith(("stages.", "update.", "compare.")) and not (inner and key == "run.init_from"):
            _assign(config, key, value, "")
    for key, value in changes:
        if key.startswith(part):
            _assign(config, key.removeprefix(part), value, part)
    return config


def _assign(config: DictConfig, key: str, value: Any, prefix: str) -> None:
    try:
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException as error:
        raise _explain(error, f"{COMMAND_LINE}: {prefix}") from None


def _merge(base: DictConfig, more: dict[str, Any], source: str, prefix: str = "") -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, more))
    except OmegaConfBaseException as error:
        raise _explain(error, f"{source}: {prefix}") from None


def _to_object(config: DictConfig, prefix: str) -> Any:
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _explain(error, prefix) from None


def _explain(error: OmegaConfBaseException, prefix: str) -> ValueError:
    """Return one sentence for OmegaConf's several lines."""
    sentence = str(error).splitlines()[0]
    for theirs, ours in (
        ("could not be converted to Integer", "must be a whole number"),
        ("could not be converted to Float", "must be a number"),
        ("is not a valid bool", "must be true or false"),
        (" of type 'str'", ""),
        (" (type str)", ""),
    ):
        sentence = sentence.replace(theirs, ours)
    return ValueError(f"{prefix}{error.full_key or ''}: {sentence[:1].lower()}{sentence[1:]}")


def _name_stages(stages: dict[str, Settings]) -> None:
    """Give each stage its run name, and turn `init_from` of an earlier stage into that stage's run folder."""
    earlier: dict[str, str] = {}
    for name, stage in stages.items():
        source = stage.run.init_from
        if source in earlier:
            stage.run.init_from = earlier[source]
        elif source in stages:
            raise refuse(f"stages.{name}.run.init_from", source, "must name an earlier stage")
        elif source and "/" not in source and not Path(source).exists():
            allowed = f"must be an earlier stage ({', '.join(earlier) or 'none here'}) or a folder that exists."
            raise refuse(f"stages.{name}.run.init_from", source, allowed + suggestion(source, list(earlier)))
        stage.run.name = f"{stage.run.name}/{name}"
        earlier[name] = str(Path(stage.run.directory) / stage.run.name)


def _check_update(experiment: Experiment) -> None:
    """Refuse an update that names no date or no stage; a file without stages means its only run."""
    update, stages = experiment.update, experiment.stages
    check_values(update, "update.")
    if update.stages and not update.as_of:
        raise refuse("update.as_of", "", "must be end or a date where update.stages names stages")
    if update.as_of and list(stages) == [""] and not update.stages:
        update.stages.append("")
    known = f"must name stages of this file: {', '.join(filter(None, stages)) or 'there are none'}."
    if update.as_of and not update.stages:
        raise refuse("update.stages", "[]", known)
    for name in update.stages:
        if name not in stages:
            raise refuse("update.stages", name, known + suggestion(name, list(stages)))
