"""Loads a saved generation on another number of shards than it was saved with.

A new shard owns a range of the base corpus, and every so many-th of the passages added later: it takes them from
whichever saved shards have them. Big index: rows of one saved shard keep their codes, bit for bit, whatever the kind (a
graph's links are made anew). Rows of several are joined from what these kept: whole vectors (Flat, SQfp16, IVFn,Flat,
HNSWn), the float16 vectors beside a compressed index, or one byte a number (SQ8). Product-quantised codes of different
shards were made with different codebooks and cannot be joined: that is refused, by `check_ranges` before anything
starts. Delta: whole vectors, taken as they are. Rows of a big index that was built from other weights than most of the
rows (of a shard that was lost and encoded again) go into the delta, which knows the version of each.

Every new shard reads the saved ones that it takes something from, and verifies them; nothing is written.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.snapshot import TornSnapshot, verify
from indexing.corpus.stores.changes import contains
from indexing.corpus.stores.table import map_array
from indexing.dense.faiss_build import HALVES, Index, build_index, place
from indexing.dense.faiss_library import codes_of, inner_of, load_faiss
from indexing.dense.kinds import Kind, parse
from indexing.dense.probe import UNKNOWN, Figures
from indexing.indexing_settings import IndexConfig
from indexing.shard.generation import Base, Generation, make_delta
from indexing.shard.shard_files import BASE, INDEX_FILE, SHARD_PREFIX, check_saved, delta_numbers, read_delta


@dataclass(frozen=True)
class _Saved:
    """Describes a saved shard."""

    path: Path
    extra: dict[str, Any]

    @property
    def base(self) -> Path:
        """Return the directory of its big index."""
        return self.path / BASE if self.extra.get("derived") else self.path

    @property
    def start(self) -> int:
        return int(self.extra.get("start", 0))

    @property
    def stop(self) -> int:
        return int(self.extra.get("stop", 0))

    def base_numbers(self) -> np.ndarray:
        """Return the passages of the big index, int64 [rows], sorted."""
        path = self.base / "numbers"
        return map_array(path, "int64") if path.is_file() else np.arange(self.start, self.stop)

    def has_added(self, num_base: int) -> bool:
        """Return True if it has passages beyond the base corpus."""
        path = self.base / "numbers"
        parts = [map_array(path, "int64")] if path.is_file() else []
        if self.extra.get("derived"):
            parts.append(delta_numbers(self.path))
        return any(len(part) and part[-1] >= num_base for part in parts)


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """Describes the passages that a new shard owns."""

    shard: int
    start: int
    stop: int
    num_shards: int
    num_base: int

    def owns(self, numbers: np.ndarray) -> np.ndarray:
        """Return which of `numbers` it owns, bool of the same shape."""
        added = (numbers >= self.num_base) & ((numbers - self.num_base) % self.num_shards == self.shard)
        return added | ((numbers >= self.start) & (numbers < self.stop))


@dataclass(frozen=True)
class _Part:
    """Names rows of a saved big index."""

    path: Path  # its directory
    extra: dict[str, Any]
    rows: np.ndarray  # int64, rising
    numbers: np.ndarray  # int64: passages of the rows


def check_ranges(
    saved: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], factory: str, directory: str | Path
) -> None:
    """Raise ValueError where shards of the passages `saved` cannot become shards of the passages `wanted`."""
    directory = Path(directory)
    covered = [min((a for a, _ in saved), default=0), max((b for _, b in saved), default=0)]
    if covered != [min(a for a, _ in wanted), max(b for _, b in wanted)]:
        raise ValueError(f"index {directory} holds the passages of {list(saved)}: it cannot serve {list(wanted)}")
    if parse(factory).joinable or any(directory.rglob(f"*{HALVES}")):
        return
    joins = any(not any(a <= start and stop <= b for a, b in saved) for start, stop in wanted)
    if not joins and len(saved) > 1:  # added passages are spread over all shards
        indexes = [one.base_numbers() for one in _read_saved(directory)]
        joins = any(len(numbers) and numbers[-1] >= covered[1] for numbers in indexes)
    if joins:
        raise ValueError(
            f"index {directory} of kind {factory} has {len(saved)} shards and cannot become {len(wanted)}: codes of "
            f"different shards cannot be joined. Set index.num_shards to {_number_that_fits(directory, saved)}, keep "
            "vectors beside them (index.rescore_candidates), or let the index be built anew"
        )


def fits(directory: str | Path, number: int, *, start: int, stop: int, num_shards: int) -> bool:
    """Return True if saved shard `number` holds exactly what shard `number` of `num_shards` owns, or nobody holds it.

    It is then loaded as it is, and loading reports what is wrong.
    """
    saved = _read_saved(directory)
    mine = [one for one in saved if one.path.name == f"{SHARD_PREFIX}{number:04d}"]
    if not mine:
        return not any(one.start < stop and start < one.stop for one in saved)
    if (mine[0].start, mine[0].stop) != (start, stop):
        return False
    num_base = max(one.stop for one in saved)
    return mine[0].extra.get("num_shards", len(saved)) == num_shards or not any(o.has_added(num_base) for o in saved)


def load_range(
    directory: str | Path, shard: int, start: int, stop: int, generation: int, config: IndexConfig, seed: int
) -> Generation:
    """Return what shard `shard` of `config.num_shards`, with the passages `start` to `stop` - 1 of the base corpus,
    owns of what other shards saved in `directory`. What has to be trained anew is drawn with `seed`.

    Raises TornSnapshot for damaged files, ValueError for another generation or kind, for passages that no saved shard
    holds, and for codes that cannot be joined.
    """
    saved = _read_saved(directory)
    overlaps = [max(0, min(stop, one.stop) - max(start, one.start)) for one in saved]
    if sum(overlaps) < stop - start:
        raise ValueError(f"{directory} does not hold the passages {start} to {stop - 1} of the corpus")
    owner = _Owner(
        shard=shard, start=start, stop=stop, num_shards=config.num_shards, num_base=max(one.stop for one in saved)
    )
    parts, deltas = list[_Part](), list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    for one in saved:
        part, delta = _taken(one, owner, generation, config)
        if len(part.rows):
            parts.append(part)
        if delta is not None:
            deltas.append(delta)
    versions = {(one.extra["weights_version"], one.extra.get("corpus_version", 0)) for one in saved}
    if len(versions) > 1:
        raise ValueError(f"{directory} holds shards of different weights and corpus versions {sorted(versions)}")
    weights_version, corpus_version = versions.pop()
    parts, others = _of_one_version(parts)
    base = _base(parts, owner, config=config, seed=seed, directory=directory)
    known = np.concatenate([numbers for numbers, _, _ in deltas]) if deltas else np.empty(0, np.int64)
    deltas += [_as_delta(part, np.sort(known), config, directory) for part in others]
    deltas = [each for each in deltas if len(each[0])]
    delta = None
    if deltas:
        numbers, of_each, vectors = (np.concatenate(each) for each in zip(*deltas, strict=True))
        order = np.argsort(numbers)
        delta = make_delta(numbers[order], of_each[order], vectors[order], config)
    return Generation(base, delta, weights_version, corpus_version)


def _taken(
    saved: _Saved, owner: _Owner, generation: int, config: IndexConfig
) -> tuple[_Part, tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
    """Return rows of the big index, and numbers, versions and vectors of the delta, that `owner` takes from `saved`."""
    check_saved(saved.path, saved.extra, generation=generation, factory=config.factory)
    numbers = saved.base_numbers()
    rows = np.flatnonzero(owner.owns(numbers))
    of_delta = delta_numbers(saved.path) if saved.extra.get("derived") else np.empty(0, np.int64)
    mine = np.flatnonzero(owner.owns(of_delta))
    if len(rows) or len(mine):
        verify(saved.path)
    extra = verify(saved.base, contents=False) if saved.extra.get("derived") else saved.extra
    part = _Part(saved.base, extra, rows, np.array(numbers[rows]))
    if not len(mine):
        return part, None
    numbers, versions, vectors = read_delta(saved.path)
    return part, (numbers[mine], versions[mine], vectors[mine])


def _of_one_version(parts: list[_Part]) -> tuple[list[_Part], list[_Part]]:
    """Return the parts of the weights version that most rows have, and the others."""
    rows = Counter[int]()
    for part in parts:
        rows[part.extra["weights_version"]] += len(part.rows)
    main = max(rows, key=lambda version: (rows[version], version), default=0)
    same = [part.extra["weights_version"] == main for part in parts]
    return [p for p, s in zip(parts, same, strict=True) if s], [p for p, s in zip(parts, same, strict=True) if not s]


def _base(parts: list[_Part], owner: _Owner, *, config: IndexConfig, seed: int, directory: str | Path) -> Base:
    """Return one big index of these parts."""
    kind = parse(config.factory)
    numbers = np.concatenate([part.numbers for part in parts]) if parts else np.empty(0, np.int64)
    order = np.argsort(numbers)
    numbers = numbers[order]
    if not parts:
        index = None
    elif len(parts) == 1 and kind.cuttable:
        index = _cut(parts[0], config)
    else:
        _check_joined(parts, kind, directory)
        index = build_index(np.concatenate([_vectors(part, config) for part in parts])[order], config, seed)
    whole = len(numbers) == owner.stop - owner.start and bool(np.all(numbers == np.arange(owner.start, owner.stop)))
    first = parts[0].extra if parts else {}
    keys = [str(part.extra.get("key") or part.path) for part in parts]
    key = hashlib.sha256(f"{owner} {keys}".encode()).hexdigest()[:16]  # the same in every replica
    return Base(
        index=index,
        start=owner.start,
        numbers=None if whole else numbers,
        generation=max((int(part.extra["generation"]) for part in parts), default=0),
        weights_version=int(first.get("weights_version", 0)),
        corpus_version=max((int(part.extra.get("corpus_version", 0)) for part in parts), default=0),
        key=key,
        figures=UNKNOWN if index is None else Figures(index.num_bytes / index.num_vectors),
    )


def _check_joined(parts: Sequence[_Part], kind: Kind, directory: str | Path) -> None:
    """Raise ValueError where codes alone are left of `parts`, which are to be joined."""
    if not kind.joinable and not all((part.path / INDEX_FILE).with_suffix(HALVES).is_file() for part in parts):
        raise ValueError(
            f"index {directory} of kind {kind.factory}: codes of different shards cannot be joined. Set "
            "index.num_shards to what it was saved with, keep vectors beside them (index.rescore_candidates), or let "
            "the index be built anew"
        )


def _as_delta(
    part: _Part, known: np.ndarray, config: IndexConfig, directory: str | Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers, versions and vectors of the rows of `part` that are not `known` (sorted) already."""
    _check_joined([part], parse(config.factory), directory)
    new = ~contains(known, part.numbers)
    part = replace(part, rows=part.rows[new], numbers=part.numbers[new])
    vectors = _vectors(part, config) if new.any() else np.empty((0, part.extra["dim"]), np.float32)
    return part.numbers, np.full(len(part.numbers), part.extra["weights_version"], np.int64), vectors


def _cut(part: _Part, config: IndexConfig) -> Index:
    """Return the rows of `part` with their codes as they are."""
    saved = Index.read(part.path / INDEX_FILE, replace(config, device="cpu"))
    index, halves, rows = saved.faiss_index, saved.halves, part.rows
    inner = inner_of(index)
    if hasattr(inner, "invlists"):
        _keep_in_lists(inner, rows)
    else:
        codes = codes_of(inner)[rows]
        inner.reset()
        inner.add_sa_codes(codes)
    index.ntotal = inner.ntotal  # of a rotation around it
    return place(index, config, None if halves is None else np.array(halves[rows]))


def _keep_in_lists(inner: Any, rows: np.ndarray) -> None:
    """Leave `rows` (rising) alone in an IVF index, counted from 0."""
    faiss = load_faiss()
    new_rows = np.full(inner.ntotal, -1, np.int64)
    new_rows[rows] = np.arange(len(rows))
    kept, lists = list[tuple[np.ndarray, np.ndarray]](), inner.invlists
    for number in range(inner.nlist):
        size = lists.list_size(number)
        ids, codes = np.empty(size, np.int64), np.empty((size, inner.code_size), np.uint8)
        if size:
            faiss.memcpy(faiss.swig_ptr(ids), lists.get_ids(number), ids.nbytes)
            faiss.memcpy(faiss.swig_ptr(codes), lists.get_codes(number), codes.nbytes)
        there = new_rows[ids] >= 0
        kept.append((new_rows[ids[there]], codes[there]))
    inner.reset()
    for number, (ids, codes) in enumerate(kept):
        if len(ids):
            inner.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    inner.ntotal = len(rows)


def _vectors(part: _Part, config: IndexConfig) -> np.ndarray:
    """Return what the saved shard kept of the rows of `part`, as float32 [rows, dim]."""
    saved = Index.read(part.path / INDEX_FILE, replace(config, device="cpu"))
    if saved.halves is not None:
        return saved.halves[part.rows].astype(np.float32)
    first, last = int(part.rows[0]), int(part.rows[-1])
    return saved.faiss_index.reconstruct_n(first, last + 1 - first)[part.rows - first]


def _read_saved(directory: str | Path) -> list[_Saved]:
    """Return the saved shards, in order. Damaged ones are left out: what is missing then is noticed."""
    found = []
    for path in sorted(Path(directory).glob(f"{SHARD_PREFIX}*")):
        try:
            found.append(_Saved(path, verify(path, contents=False)))
        except TornSnapshot:
            continue
    return found


def _number_that_fits(directory: Path, saved: Sequence[tuple[int, int]]) -> str:
    """Return the allowed values of index.num_shards, for messages."""
    num_base = max(stop for _, stop in saved)
    added = any(one.has_added(num_base) for one in _read_saved(directory))
    return f"{len(saved)}" if added and len(saved) > 1 else f"a multiple of {len(saved)}"
