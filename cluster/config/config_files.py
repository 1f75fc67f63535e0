"""Finds the configuration files that a command line names."""

from pathlib import Path

from indexing.declare import looked_at, suggestion

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FILE = ROOT / "configs" / "quickstart.yaml"


def find_file(path: str) -> Path:
    """Return the YAML file that `path` names, the config.yaml of a run folder. Raises ValueError with a suggestion."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        if (file / "config.yaml").is_file():
            return file / "config.yaml"
        raise ValueError(f"no config.yaml in the folder {path}")
    near = {other.name: shown(other) for folder in (ROOT / "configs", file.parent) for other in folder.glob("*.yaml")}
    hint = suggestion(file.name, list(near)) or suggestion(f"{file.name}.yaml", list(near))
    for name, relative in near.items():
        hint = hint.replace(f" {name}", f" {relative}")
    raise ValueError(f"no configuration file {path}{looked_at(path)}.{hint}")


def shown(file: Path) -> str:
    """Return `file` relative to the working directory if it lies below it."""
    absolute, here = file.resolve(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else file)
