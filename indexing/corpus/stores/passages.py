"""Stores the corpus as a write-once directory: text and token rows by passage number.

Passages are numbered 0, 1, ... in the order in which they are written. `ids.*`, `titles.*`, `texts.*` are ragged UTF-8
bytes, `metadata.*` JSON objects (if any passage has one), `tokens-SIDE.*` ragged int32 token ids of one tokeniser,
`lookup.*` maps ids back to numbers; `manifest.json` is written last. Everything is memory-mapped, so that processes on
one machine share one copy.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.files.corpus import Passage
from indexing.corpus.snapshot import verify, write_file, write_once
from indexing.corpus.stores.table import Ragged, RaggedWriter, TokenTable, map_array

KIND = "passage store"
BATCH_PASSAGES = 1024  # Number of passages tokenised and written together


@dataclass(frozen=True)
class TokenSide:
    """One way of making token ids from text, and the fingerprint of its tokeniser.

    `tokenize` maps (title, text) pairs to token ids, already cut to their largest length; a question or an answer is
    the pair ("", text).
    """

    name: str
    tokenize: Callable[[Sequence[tuple[str, str]]], list[list[int]]]
    fingerprint: str


class Store:
    """The passages and their tokens. Open one per process; reading is safe from several threads."""

    def __init__(self, path: Path, extra: dict[str, Any]) -> None:
        self.path = path
        self.extra: dict[str, Any] = extra["extra"]  # further values that the writer put into the manifest
        # fingerprint of ids, titles and texts, in order; vectors depend on it
        self.fingerprint: str = extra["fingerprint"]
        self._sides: dict[str, str] = extra["sides"]
        self._ids, self._titles, self._texts = (Ragged(path, name, "uint8") for name in ("ids", "titles", "texts"))
        # names of all fields that any passage has
        self.metadata_fields: tuple[str, ...] = tuple(extra.get("metadata", ()))
        self._metadata = Ragged(path, "metadata", "uint8") if self.metadata_fields else None
        self._tokens = {name: TokenTable(path, f"tokens-{name}") for name in self._sides}
        self._hashes = map_array(path / "lookup.hashes", "uint64")
        self._rows = map_array(path / "lookup.rows", "int64")

    @staticmethod
    def open(path: str | Path, verify: bool = True) -> "Store":
        """Open a store; `verify` compares every byte with its checksum, otherwise only the sizes of the files.

        Raises TornSnapshot if something is missing or altered, ValueError if the directory is no store.
        """
        return Store(Path(path), open_extra(path, KIND, verify))

    def __len__(self) -> int:
        return len(self._ids)

    def passage(self, row: int) -> Passage:
        """Return the passage with number `row`. Raises IndexError."""
        return Passage(self._ids.text(row), self._titles.text(row), self._texts.text(row), self.metadata(row))

    def metadata(self, row: int) -> dict[str, Any]:
        """Return the metadata of the passage with number `row`; empty if it has none. Raises IndexError."""
        return json.loads(self._metadata.text(row) or "{}") if self._metadata is not None else {}

    def row_of(self, passage_id: str) -> int | None:
        """Return the number of the passage with this id, or None."""
        wanted = np.uint64(_hash(passage_id))
        position = int(np.searchsorted(self._hashes, wanted))
        while position < len(self._hashes) and self._hashes[position] == wanted:
            row = int(self._rows[position])
            if self._ids.text(row) == passage_id:
                return row
            position += 1
        return None

    def ids(self, rows: Iterable[int] | np.ndarray) -> list[str]:
        """Return the ids of passage numbers."""
        return [self._ids.text(int(row)) for row in rows]

    # The next four differ in a corpus that changes (`indexing/corpus/stores/live_store.py`); here passages never
    # change.

    def refresh(self) -> bool:
        """Read the changes made since and return True if there were any."""
        return False

    def is_living(self, numbers: np.ndarray) -> np.ndarray:
        """Return bool, in the shape of `numbers`: True for passages that are in the corpus now."""
        return np.ones(np.shape(numbers), bool)

    def current(self, numbers: np.ndarray) -> np.ndarray:
        """Return the present numbers of passages, int64; passages that are gone are left out."""
        return np.asarray(numbers, np.int64)

    def origin(self, numbers: np.ndarray) -> np.ndarray:
        """Return the first number that each passage had, int64 in the shape of `numbers`."""
        return np.asarray(numbers, np.int64)

    def tokens(self, side: str) -> TokenTable:
        """Return the token rows of one side by passage number. Raises ValueError that names the sides."""
        self.side_fingerprint(side)
        return self._tokens[side]

    @property
    def sides(self) -> dict[str, str]:
        """Return side -> fingerprint of its tokeniser."""
        return dict(self._sides)

    def side_fingerprint(self, side: str) -> str:
        """Return the fingerprint of the tokeniser that wrote this side."""
        if side not in self._sides:
            raise ValueError(f"store {self.path} has no side {side!r}, only {sorted(self._sides)}")
        return self._sides[side]


def write_store(
    path: str | Path, passages: Iterable[Passage], sides: Sequence[TokenSide], extra: dict[str, Any] | None = None
) -> Store:
    """Write `passages`, which are read once and not kept, as a new store, and open it.

    `extra` (JSON) is kept in the manifest. Raises FileExistsError, and ValueError for a repeated id and for no
    passages.
    """
    seal: dict[str, Any] = {
        "kind": KIND,
        "extra": extra or {},
        "sides": {side.name: side.fingerprint for side in sides},
    }
    if len(seal["sides"]) < len(sides):
        raise ValueError(f"sides of a store need different names, got {[side.name for side in sides]}")
    with write_once(path, seal) as directory:
        digest, hashes, names = hashlib.sha256(), [], set[str]()
        with ExitStack() as stack:
            columns = [
                stack.enter_context(RaggedWriter(directory, name, "uint8")) for name in ("ids", "titles", "texts")
            ]
            described = stack.enter_context(RaggedWriter(directory, "metadata", "uint8"))
            tables = [stack.enter_context(RaggedWriter(directory, f"tokens-{side.name}", "int32")) for side in sides]
            for batch in batched(passages, BATCH_PASSAGES):
                fields = [[getattr(passage, name).encode() for passage in batch] for name in ("id", "title", "text")]
                for column, values in zip(columns, fields, strict=True):
                    column.append(values)
                for value in itertools.chain.from_iterable(zip(*fields, strict=True)):
                    digest.update(len(value).to_bytes(8, "little") + value)
                described.append([_json(passage.metadata) for passage in batch])
                names.update(*(passage.metadata for passage in batch))
                hashes.append(np.array([_hash(passage.id) for passage in batch], np.uint64))
                for side, table in zip(sides, tables, strict=True):
                    table.append(tokenize(side, [(passage.title, passage.text) for passage in batch]))
        if not hashes:
            raise ValueError(f"the corpus for {path} has no passages")
        _write_lookup(directory, np.concatenate(hashes))
        if names:
            seal["metadata"] = sorted(names)
        else:  # the same bytes as for stores without metadata
            for path_ in (described.path, described.offsets_path):
                path_.unlink()
        seal["fingerprint"] = digest.hexdigest()
    return Store.open(path, verify=False)


def tokenize(side: TokenSide, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Return the rows of `side.tokenize` after a check of their number."""
    rows = side.tokenize(pairs)
    if len(rows) != len(pairs):
        raise ValueError(f"side {side.name!r} made {len(rows)} token rows of {len(pairs)} texts")
    return rows


def open_extra(path: str | Path, kind: str, contents: bool) -> dict[str, Any]:
    """Verify a directory of this kind and return the `extra` of its manifest."""
    extra = verify(path, contents)
    if extra.get("kind") != kind:
        raise ValueError(f"{path} is a {extra.get('kind', 'directory of another kind')}, not a {kind}")
    return extra


def _json(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, separators=(",", ":")).encode() if metadata else b""


def batched(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def _hash(passage_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")


def _write_lookup(directory: Path, hashes: np.ndarray) -> None:
    """Write the sorted hashes of the ids and the passage number of each. Raises ValueError for a repeated id."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    ids = Ragged(directory, "ids", "uint8")
    seen: dict[str, int] = {}  # passages whose hash equals that of the one before them in the order, and that one
    for position in np.flatnonzero(ordered[1:] == ordered[:-1]):
        for row in map(int, order[position : position + 2]):
            first = seen.setdefault(ids.text(row), row)
            if first != row:
                raise ValueError(f"passages {first} and {row} have the same id {ids.text(row)!r}")
    write_file(directory / "lookup.hashes", [ordered])
    write_file(directory / "lookup.rows", [order.astype(np.int64)])
