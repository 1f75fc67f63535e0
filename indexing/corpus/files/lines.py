"""Reads JSONL, gzipped JSONL and Parquet files row by row. A bad row is yielded as such and does not end the
reading."""

import datetime
import decimal
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadLine(Exception):
    """The reason why a line is refused; `kind` is one of `indexing.corpus.files.corpus.BAD_KINDS`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(kind, why)
        self.kind, self.why = kind, why


# Number of the line or row, counted from 1, and its fields or what is wrong with it.
Lines = Iterator[tuple[int, dict[str, Any] | BadLine]]


def read_lines(path: Path) -> Lines:
    """Return the rows of a .jsonl, .jsonl.gz or .parquet file. Raises ValueError with the path for any other ending."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    raise ValueError(f"{path} has an unknown ending: allowed are .jsonl, .jsonl.gz and .parquet")


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of `name` or `name`.gz in `folder`, or None if neither exists."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def id_field(fields: dict[str, Any]) -> str:
    """Return the id of a row, from `_id` or `id`; whole numbers become strings. Raises BadLine."""
    value = fields.get("_id", fields.get("id"))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise BadLine("missing_field", f"_id is {value!r}: needed is a string")
    return _encodable("_id", value)


def text_field(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    """Return a text field of a row; `default`, if given, replaces one that is missing or null. Raises BadLine."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadLine("missing_field", f"{name} is {str(value)[:40]!r}: needed is a string")
    return _encodable(name, value)


def metadata_field(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the object `metadata` of a row; empty if the row has none. Raises BadLine."""
    value = fields.get("metadata")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadLine("missing_field", f"metadata is {str(value)[:40]!r}: needed is an object")
    return value


def strings(value: Any) -> list[str]:
    """Return answers as a list of strings; one string becomes a list of one. Raises BadLine."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise BadLine("missing_field", f"answers are {str(value)[:40]!r}: needed is a list of strings")
    return [_encodable("answers", item) for item in values]


def _encodable(name: str, value: str) -> str:
    r"""Return `value`. Raises BadLine if JSON's \u escapes left half a surrogate pair in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadLine("broken_utf8", f"{name} has half a surrogate pair") from None
    return value


def _read_jsonl(path: Path) -> Lines:
    """Yield the objects of a JSONL file and skip blank lines. Raises ValueError for a damaged gzip file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, _parse(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file, after line {number}: {error}") from error


def _parse(raw: bytes) -> dict[str, Any] | BadLine:
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return BadLine("broken_utf8", f"byte {error.start + 1} of the line is no UTF-8")
    except (ValueError, RecursionError) as error:
        return BadLine("not_json", str(error))
    return fields if isinstance(fields, dict) else BadLine("not_json", f"a {type(fields).__name__}, not an object")


def _read_parquet(path: Path) -> Lines:
    """Yield the rows of a Parquet file as dictionaries, numbered from 1; columns other than id, title and text become
    `metadata`. Raises ValueError for a file that is not Parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    with file:
        wanted = [name for name in file.schema_arrow.names if name in ("_id", "id", "title", "text")]
        if "text" not in wanted or not {"_id", "id"} & set(wanted):
            raise ValueError(f"{path} has columns {file.schema_arrow.names}: needed are _id (or id) and text")
        more = [field.name for field in file.schema_arrow if field.name not in wanted and _is_plain(field.type)]
        number = 0
        for batch in file.iter_batches(batch_size=4096, columns=[*wanted, *more]):
            columns = [batch.column(name) for name in wanted]
            described = [batch.column(name) for name in more]
            for index in range(batch.num_rows):
                number += 1
                try:
                    values = [column[index].as_py() for column in columns]
                    metadata = {n: plain(c[index].as_py()) for n, c in zip(more, described, strict=True)}
                except UnicodeDecodeError as error:
                    yield number, BadLine("broken_utf8", f"byte {error.start + 1} of a field is no UTF-8")
                else:
                    row: dict[str, Any] = dict(zip(wanted, values, strict=True))
                    given = {name: value for name, value in metadata.items() if value is not None}
                    yield number, row | ({"metadata": given} if given else {})


def _is_plain(kind: Any) -> bool:
    """Return True if a Parquet column holds texts, numbers, truth values or dates, or lists of texts or whole numbers;
    False for vectors, bytes and records."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_string(kind.value_type) or types.is_integer(kind.value_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    known = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(one(kind) for one in (*known, types.is_date, types.is_timestamp, types.is_decimal))


def plain(value: Any) -> Any:
    """Return a Parquet value as JSON has it: dates as YYYY-MM-DD, decimals as numbers, numbers that are not finite as
    null."""
    if isinstance(value, datetime.date):  # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        value = float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
