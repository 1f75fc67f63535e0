"""Parses the conditions on metadata that decide which passages a search may return, for instance

    {"lang": "en", "year": {">=": 2019, "<": 2024}, "kind": ["news", "blog"]}

A condition is a value (equal to it), a list (one of them), or bounds (`>=`, `>`, `<=`, `<`); all conditions must hold.
Values compare as they are written, so that `year=2019` of a command line finds both 2019 and "2019"; a bound that reads
as a number compares with numbers, another one with text (dates as YYYY-MM-DD order as they should). A passage whose
field is a list passes if one of its items does. `null` finds passages without the field; an empty value removes a
condition that was set elsewhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BOUNDS = (">=", ">", "<=", "<")
ALLOWED = "allowed are a value, a list of values, or bounds like {'>=': 2019, '<': 2024}"
NULL = "null"


@dataclass(frozen=True)
class Condition:
    """The condition on one field: one of `values`, or within `bounds`."""

    field: str
    values: tuple[str, ...] = ()
    bounds: tuple[tuple[str, float | str], ...] = ()

    def holds(self, value: Any) -> bool:
        """Return True if a passage with this value of the field passes; None: the passage has no value."""
        if isinstance(value, list):
            return any(self.holds(item) for item in value)
        if self.values:
            return written(value) in self.values
        return value is not None and all(_within(value, how, bound) for how, bound in self.bounds)

    def __str__(self) -> str:
        if self.values:
            return f"{self.field}={'|'.join(self.values)}"
        return " and ".join(f"{self.field}{how}{bound}" for how, bound in self.bounds)


@dataclass(frozen=True)
class Filter:
    """The conditions that a passage's metadata must all meet."""

    conditions: tuple[Condition, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that the conditions name."""
        return tuple(condition.field for condition in self.conditions)

    def passes(self, metadata: Mapping[str, Any]) -> bool:
        """Return True if a passage with this metadata may be returned."""
        return all(condition.holds(metadata.get(condition.field)) for condition in self.conditions)

    def __str__(self) -> str:
        return ", ".join(map(str, self.conditions))


def parse_filter(where: Mapping[str, Any], setting: str = "retrieval.where") -> Filter | None:
    """Return the filter that `where` describes; None for no condition. Raises ValueError that names `setting`."""
    if not isinstance(where, Mapping):
        raise ValueError(f"{setting}={where!r}: must map fields of the passages' metadata to conditions")
    conditions = [_parse(str(field), asked, f"{setting}.{field}") for field, asked in where.items() if asked != ""]
    return Filter(tuple(sorted(conditions, key=lambda condition: condition.field))) if conditions else None


def written(value: Any) -> str:
    """Return a value as text that equal values share: 2019, 2019.0 and "2019"; true and "true"; null and no value."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _parse(field: str, asked: Any, setting: str) -> Condition:
    if not field:
        raise ValueError(f"{setting}: the name of a field is empty")
    if isinstance(asked, Mapping):
        if not asked:
            raise ValueError(f"{setting}={{}}: {ALLOWED}")
        return Condition(field, bounds=tuple(_parse_bound(how, bound, setting) for how, bound in asked.items()))
    values = list(asked) if isinstance(asked, list | tuple | set | frozenset) else [asked]
    if not values:
        raise ValueError(f"{setting}=[]: no passage could pass; {ALLOWED}")
    for value in values:
        if not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and value != value):
            raise ValueError(f"{setting}={asked!r}: {value!r} is no text, number, true, false or null; {ALLOWED}")
    return Condition(field, values=tuple(sorted({written(value) for value in values})))


def _parse_bound(how: Any, bound: Any, setting: str) -> tuple[str, float | str]:
    if how not in BOUNDS:
        raise ValueError(f"{setting}={{{how!r}: {bound!r}}}: bounds are {', '.join(BOUNDS)}; {ALLOWED}")
    if isinstance(bound, bool) or not isinstance(bound, str | int | float) or bound == "":
        raise ValueError(f"{setting}={{{how!r}: {bound!r}}}: a bound is a number or a text")
    number = _number(bound)
    if number is None and not isinstance(bound, str):
        raise ValueError(f"{setting}={{{how!r}: {bound!r}}}: a bound must be finite")
    return str(how), str(bound) if number is None else number


def _number(value: Any) -> float | None:
    """Return `value`, or the number that it reads as; None for any other text, truth values and numbers that are not
    finite."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _within(value: Any, how: str, bound: Any) -> bool:
    """Return True if a value lies on the right side of a bound; one of another type does not."""
    compared: Any = value if isinstance(bound, str) else _number(value)
    if compared is None or (isinstance(bound, str) and not isinstance(compared, str)):
        return False
    match how:
        case ">=":
            return compared >= bound
        case ">":
            return compared > bound
        case "<=":
            return compared <= bound
        case _:
            return compared < bound
