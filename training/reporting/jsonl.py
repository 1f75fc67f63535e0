"""Append-only files of one JSON object a line, which several processes may write and a crash may tear.

A line is appended by one `write` to a descriptor opened with O_APPEND, so lines of several processes never mix.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Return `value` as strict JSON can hold it: NaN and infinities become None, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if callable(item := getattr(value, "item", None)):  # a number of numpy or torch
        return plain(item())
    return str(value)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row`. Raises OSError naming the file when the disk takes less than the whole line."""
    line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if written < len(line):
        raise OSError(f"{path}: {written} of {len(line)} bytes written; is the disk full?")


def drop_torn_line(path: Path) -> int:
    """Cut what follows the last line feed, as a crash leaves it, and return how many bytes were cut.

    Only for a file with one writer, when that writer opens it.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return len(content) - whole


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of `path`; lines that are no JSON object are skipped, and an absent file has none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
