"""Declares settings: default, meaning, unit, choices and bounds of a setting stand together in its dataclass field.

The checks, the suggestions, the command line's help and the documentation all read them from there.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import date
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")
_KEY = "declaration"
POINT_VALUES = 'empty, "end" or a date YYYY-MM-DD'


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Everything that a field declares beside its type and its default."""

    meaning: str  # one or more sentences
    unit: str = ""
    choices: Sequence[str | int] = ()
    least: float | None = None  # smallest number allowed
    above: float | None = None  # every number allowed is larger
    most: float | None = None  # largest number allowed
    below: float | None = None  # every number allowed is smaller
    holds: Callable[[Any], object] | None = None  # a further condition; `allowed` says it in words
    allowed: str = ""  # completes "must be ..."; empty: made from choices and bounds

    @property
    def values(self) -> str:
        """Return the allowed values in words that complete "must be ..."; empty where everything of the type is
        allowed."""
        if self.allowed:
            return self.allowed
        if self.choices:
            words = [str(choice) for choice in self.choices]
            texts = isinstance(self.choices[0], str)
            return f"one of {', '.join(words)}" if texts else f"{', '.join(words[:-1])} or {words[-1]}"
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        parts = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in parts if bound is not None)

    def refusal(self, value: Any) -> str:
        """Return why `value` is not allowed, as "must be ..."; empty if it is allowed. Items of a list count alone."""
        if value is None:
            return ""
        if isinstance(value, list):
            return next(filter(None, map(self.refusal, value)), "")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not math.isfinite(value):
            return "must be a finite number"
        if self.choices and value not in self.choices:
            near = suggestion(value, [str(choice) for choice in self.choices]) if isinstance(value, str) else ""
            return f"must be {self.values}{'.' if isinstance(value, str) else ''}{near}"
        if number and not self._within(value):
            negative_only = self.least == 0 and self.most is None and self.below is None and not self.allowed
            return "must not be negative" if negative_only else f"must be {self.values}"
        return "" if self.holds is None or self.holds(value) else f"must be {self.values}"

    def _within(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )


def setting(default: T, meaning: str, **declared: Any) -> T:
    """Return the dataclass field of one setting. `declared` are fields of `Declaration`: unit, choices, least, above,
    most, below, holds, allowed. A number that declares no bound must not be negative. Lists and dictionaries are
    copied for every instance."""
    bounded = {"choices", "least", "above", "holds"} & set(declared)
    if not bounded and (default is None or isinstance(default, (int, float))) and not isinstance(default, bool):
        declared["least"] = 0
    metadata = {_KEY: Declaration(meaning=meaning, **declared)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: Callable[[], T]) -> T:
    """Return the dataclass field of a section of settings; the docstring of its class is its meaning."""
    return field(default_factory=kind, metadata={_KEY: Declaration(meaning=" ".join((kind.__doc__ or "").split()))})


def declarations(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Declaration]]:
    """Yield (dotted name, value, declaration) of every setting below `settings`, a dataclass instance."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from declarations(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value, entry.metadata[_KEY]


def values_of(settings: object, prefix: str = "") -> dict[str, object]:
    """Return dotted name -> value of every setting below `settings`, a dataclass instance."""
    return {name: value for name, value, _ in declarations(settings, prefix)}


def check_values(settings: object, prefix: str = "") -> None:
    """Check every setting below `settings` by itself, against its own declaration. Raises ValueError."""
    for name, value, declaration in declarations(settings, prefix):
        if why := declaration.refusal(value):
            wrong = (
                next((item for item in value if declaration.refusal(item)), value) if isinstance(value, list) else value
            )
            raise refuse(name, wrong, why)


def refuse(name: str, value: object, why: str) -> ValueError:
    """Return the error that refuses the value of one setting, in the form that all refusals share."""
    return ValueError(f"{name}={value}: {why}")


def suggestion(word: str, known: Sequence[str], cutoff: float = 0.6, prefix: str = "") -> str:
    """Return " Did you mean ...?" with the nearest of `known`, at most two, each after `prefix`; empty if none is."""
    near = get_close_matches(word, known, n=2, cutoff=cutoff)
    return f" Did you mean {' or '.join(prefix + name for name in near)}?" if near else ""


def looked_at(path: str) -> str:
    """Return "; looked at ..." with the absolute path that a relative one, or one with `~`, stands for."""
    if path.startswith("~"):
        return f"; looked at {os.path.abspath(path)}, since ~ is not replaced: write {os.path.expanduser(path)}"
    return "" if not path or os.path.isabs(path) else f"; looked at {os.path.abspath(path)}"


def is_date(text: str) -> bool:
    """Return True for a date like 2024-05-31."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_point(text: str) -> bool:
    """Return True for a state of a corpus that changes: empty, "end" or a date."""
    return text in ("", "end") or is_date(text)


def differences(settings: Any, base: Any) -> dict[str, Any]:
    """Return the values of `settings` that differ from those of `base`, of the same class, as nested dictionaries."""
    found: dict[str, Any] = {}
    for entry in fields(settings):
        mine, other = getattr(settings, entry.name), getattr(base, entry.name)
        if mine != other:
            found[entry.name] = differences(mine, other) if is_dataclass(mine) else mine
    return found
