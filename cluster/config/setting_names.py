"""Lists the names of all settings, and finds the nearest ones to a name that does not exist."""

import re
from collections.abc import Collection
from difflib import SequenceMatcher
from fnmatch import fnmatch
from textwrap import fill

from cluster.config.settings import CompareConfig, Settings, UpdateConfig
from indexing.declare import Declaration, declarations, suggestion

DECLARED: dict[str, tuple[object, Declaration]] = {
    name: (default, declaration)
    for section, prefix in ((Settings(), ""), (UpdateConfig(), "update."), (CompareConfig(), "compare."))
    for name, default, declaration in declarations(section, prefix)
}
SETTING_NAMES = list(DECLARED)


def declared_settings() -> list[tuple[str, str, str, str, str]]:
    """Return (name, default, unit, allowed values, meaning) of every setting, as text, in the order of the sections."""
    return [
        (name, shown(default), declared.unit, allowed_values(default, declared), declared.meaning)
        for name, (default, declared) in DECLARED.items()
    ]


def shown(value: object) -> str:
    """Return a value as YAML has it on one line; text with line breaks or spaces at its ends is quoted."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    quoted = isinstance(value, str) and (not value or value != value.strip() or "\n" in value)
    return '"' + str(value).replace("\n", "\\n") + '"' if quoted else str(value)


def allowed_values(default: object, declared: Declaration) -> str:
    """Return the values that a setting allows, in a few words; empty where its type allows all."""
    if isinstance(default, bool):
        return "true, false"
    if declared.choices and not declared.allowed:
        return ", ".join(map(str, declared.choices))
    return declared.values


def unknown(source: str, prefix: str, entry: str, known: list[str]) -> ValueError:
    """Return the refusal of a key that no section has. It suggests the same field of another section, a name that
    looks alike, names that share words with it, or settings whose meaning begins with its words. `prefix` is the
    section with a dot at its end, `known` are the keys that it has."""
    section = re.sub(r"^((stages|compare\.cells)\.[^.]+|compare\.axes\.[^.]+\.[^.]+)\.", "", prefix)
    elsewhere = [name for name in SETTING_NAMES if name.rpartition(".")[2] == entry]
    alike = suggestion(section + entry, SETTING_NAMES)
    hint = alike if "." in entry else ""
    hint = hint or suggestion(section + entry, elsewhere, cutoff=0.0) or suggestion(entry, known, prefix=section)
    hint = hint or _related(section, entry) or alike or f" Known here: {', '.join(known)}."
    return ValueError(f"{source}: unknown setting {prefix}{entry}.{hint}")


def _related(section: str, entry: str) -> str:
    """Return " Did you mean ...?" with at most two settings, of `section` where it has some: those whose name has every
    word of `entry`, or only words of it, and those whose meaning begins with its words."""
    words = set(re.split(r"[._]", entry.lower()))
    phrase = entry.lower().replace("_", " ")

    def relation(name: str) -> int:
        field = set(name.rpartition(".")[2].split("_"))
        meaning = DECLARED[name][1].meaning.lower().removeprefix("number of ")
        return 3 * (words <= field) + 2 * meaning.startswith(phrase) + (field <= words)

    def nearest(names: list[str]) -> list[str]:
        alike = {name: (relation(name), SequenceMatcher(None, name, section + entry).ratio()) for name in names}
        return sorted((name for name in names if alike[name][0]), key=alike.__getitem__, reverse=True)[:2]

    inside = nearest([name for name in SETTING_NAMES if section and name.startswith(section)])
    found = inside or nearest(SETTING_NAMES)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def find_settings(pattern: str) -> list[str]:
    """Return the names that contain `pattern` or match it as a pattern like refresh.*; where there is none, those of
    settings whose meaning or allowed values have it as a word. Raises ValueError, with a suggestion, for none."""
    named = [name for name in SETTING_NAMES if pattern in name or fnmatch(name, pattern)]
    word = re.compile(rf"\b{re.escape(pattern)}", re.IGNORECASE)
    meant = [name for name, (_, declared) in DECLARED.items() if word.search(f"{declared.meaning} {declared.values}")]
    if not named and not meant:
        hint = suggestion(pattern, SETTING_NAMES) or _related("", pattern.rpartition(".")[2])
        raise ValueError(f"settings: no setting has {pattern} in its name or meaning.{hint}")
    return named or meant


def describe_settings(names: Collection[str]) -> str:
    """Return a block of text for each setting: name and default, unit and allowed values, meaning."""
    blocks: list[str] = []
    for name, default, unit, allowed, meaning in declared_settings():
        if name in names:
            facts = "; ".join(filter(None, (unit, f"allowed: {allowed}" if allowed else "")))
            text = fill(meaning, 116, initial_indent="    ", subsequent_indent="    ")
            blocks.append(f"{name}={default}{f'  ({facts})' if facts else ''}\n{text}")
    return "\n".join(blocks)
