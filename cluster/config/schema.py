"""Reads YAML and refuses names that no dataclass has, with a suggestion.

Values stay text here; the type of the setting converts them later (`cluster/config/experiment.py`).
"""

from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from cluster.config.setting_names import unknown
from indexing.declare import refuse

COMMAND_LINE = "command line"


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar as its text: the type of the setting says what it is, not the look of the value
    (`wandb: off`, `normalize: true`, `name: 007`). Duplicate keys are refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> Any:
    """Return the content of a YAML text, every scalar as a string. Raises ValueError with `source` and line."""
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and source != COMMAND_LINE else ""
        raise ValueError(f"{source}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def checked(value: Any, kind: Any, key: str, source: str) -> Any:
    """Return `value` if `kind` (a dataclass, list[str] or scalar type) has every key below it. `key` is the dotted name
    of the value, with a dot at its end unless empty. Raises ValueError."""
    name = key.rstrip(".")
    if is_dataclass(kind):
        if value in ("", None):
            return {}
        if not isinstance(value, dict):
            raise refuse(f"{source}: {name}", value, "must be a section with settings, not a value")
        hints = get_type_hints(kind)
        for entry in value:
            if entry not in hints:
                raise unknown(source, key, str(entry), list(hints))
        return {entry: checked(below, hints[entry], f"{key}{entry}.", source) for entry, below in value.items()}
    if get_origin(kind) is list:
        if value in ("", None):
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise refuse(f"{source}: {name}", value, "must be a list like [first, second]")
        return value
    if get_origin(kind) is dict:
        if value in ("", None):
            return {}
        if not isinstance(value, dict):
            raise refuse(f"{source}: {name}", value, "must map names to values, like {name: value}")
        return value
    if kind is Any:
        return "" if value is None else value
    if isinstance(value, (dict, list)):
        raise refuse(f"{source}: {name}", value, "must be one value")
    if NoneType in get_args(kind) and value in (None, "", "null", "~"):
        return None
    return "" if value is None or (kind is str and value in ("null", "~")) else value


def kind_of(parts: list[str], kind: Any, prefix: str, known: list[str] | None = None) -> Any:
    """Return the type of the setting that `parts` name below `kind`; a number names an item of a list. A refusal of the
    first part suggests `known`, else the fields of `kind`. Raises ValueError."""
    for position, part in enumerate(parts):
        if get_origin(kind) is dict:
            return Any
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            if part not in hints:
                raise unknown(COMMAND_LINE, prefix, ".".join(parts[position:]), known or list(hints))
            kind, known = hints[part], None
        elif get_origin(kind) is list and part.isdigit():
            kind = kind.__args__[0]
        else:
            above = prefix.rstrip(".")
            raise ValueError(f"{COMMAND_LINE}: {prefix}{part}: {above} is one value and has nothing below it")
        prefix = f"{prefix}{part}."
    return kind
