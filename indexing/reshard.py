"""A saved generation on another number of shards than it was saved with.

A new shard that lies within one saved shard takes over its codes, bit for bit, whatever the kind (a graph's links are
made anew). One that spans several joins what they kept: whole vectors (Flat, SQfp16, IVFn,Flat, HNSWn), the float16
vectors beside a compressed index, or one byte a number (SQ8). Product-quantised codes of different shards were made
with different codebooks and cannot be joined: that is refused, by `check_ranges` before anything starts.

Every new shard reads the saved ones that it overlaps, and verifies them; nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from indexing.build import Index, build_index, halves_path, place
from indexing.kinds import Kind, parse
from indexing.library import codes_of, inner_of, load_faiss
from indexing.settings import IndexConfig
from indexing.snapshot import TornSnapshot, verify

SHARD_PREFIX = "shard-"
INDEX_FILE = "index.faiss"
BY_RANGE = 0  # FAISS's InvertedLists::SUBSET_TYPE_ID_RANGE


@dataclass(frozen=True)
class Part:
    """Rows `first` to `last` - 1 of a saved shard."""

    path: Path
    extra: dict[str, Any]
    first: int
    last: int


def check_ranges(
    saved: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], factory: str, directory: str | Path
) -> None:
    """Raise ValueError where shards of the passages `saved` cannot become shards of the passages `wanted`."""
    covered = [min((a for a, _ in saved), default=0), max((b for _, b in saved), default=0)]
    if covered != [min(a for a, _ in wanted), max(b for _, b in wanted)]:
        raise ValueError(f"index {directory} holds the passages of {list(saved)}: it cannot serve {list(wanted)}")
    check_codes(saved, wanted, factory, directory)


def check_codes(
    saved: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], factory: str, directory: str | Path
) -> None:
    """Raise ValueError where codes would have to be joined that cannot be."""
    joins = [bounds for bounds in wanted if not any(a <= bounds[0] and bounds[1] <= b for a, b in saved)]
    if joins and parse(factory).codec == "PQ" and not halves_path(_shard(directory, 0) / INDEX_FILE).is_file():
        raise ValueError(
            f"index {directory} of kind {factory} has {len(saved)} shards and cannot become {len(wanted)}: codes of "
            f"different shards cannot be joined. Set index.num_shards to a multiple of {len(saved)}, keep vectors "
            "beside them (index.rescore_candidates), or let the index be built anew"
        )


def fits(directory: str | Path, number: int, start: int, stop: int) -> bool:
    """Whether saved shard `number` holds exactly these passages, or nobody holds them: then it is to be loaded as it is
    (and what is wrong is said there)."""
    try:
        extra = verify(_shard(directory, number), contents=False)
    except TornSnapshot:
        return not _overlapping(directory, start, stop)
    return (extra.get("start"), extra.get("stop")) == (start, stop)


def load_range(
    directory: str | Path, start: int, stop: int, generation: int, config: IndexConfig, seed: int
) -> tuple[Index, int]:
    """An index over the passages `start` to `stop` - 1 of what other shards saved in `directory`, and its weights
    version. What has to be trained anew is drawn with `seed`.

    Raises TornSnapshot for damaged files, ValueError for another generation or kind, for passages that no saved shard
    holds, and for codes that cannot be joined.
    """
    parts = _overlapping(directory, start, stop)
    if not parts or sum(part.last - part.first for part in parts) < stop - start:
        raise ValueError(f"{directory} does not hold the passages {start} to {stop - 1} of the corpus")
    for part in parts:
        wanted = {
            "kind": "index shard",
            "generation": generation,
            "factory": config.factory,
            "dim": parts[0].extra["dim"],
        }
        for name, value in wanted.items():
            if part.extra.get(name) != value:
                raise ValueError(f"{part.path} has {name} {part.extra.get(name)!r}: needed is {value!r}")
        verify(part.path)
    versions = {part.extra["weights_version"] for part in parts}
    if len(versions) > 1:
        raise ValueError(f"{directory} holds shards of different weights versions {sorted(versions)}")
    kind = parse(config.factory)
    if len(parts) == 1 and not kind.links:
        index = _cut(parts[0], kind, config)
    else:
        check_codes([(p.extra["start"], p.extra["stop"]) for p in parts], [(start, stop)], config.factory, directory)
        index = build_index(np.concatenate([_vectors(part, config) for part in parts]), config, seed)
    return index, versions.pop()


def _cut(part: Part, kind: Kind, config: IndexConfig) -> Index:
    """The rows of `part` with their codes as they are."""
    faiss = load_faiss()
    saved = Index.read(part.path / INDEX_FILE, replace(config, device="cpu"))
    index, halves = saved.faiss_index, saved.halves
    inner = inner_of(index)
    if kind.lists:
        chosen, rest = faiss.clone_index(inner), inner
        chosen.reset()
        rest.copy_subset_to(chosen, BY_RANGE, part.first, part.last)
        inner.reset()
        inner.merge_from(chosen, -part.first)  # rows count from 0 again
    else:
        codes = codes_of(inner)[part.first : part.last].copy()
        inner.reset()
        inner.add_sa_codes(codes)
    index.ntotal = inner.ntotal  # of a rotation around it
    return place(index, config, None if halves is None else np.array(halves[part.first : part.last]))


def _vectors(part: Part, config: IndexConfig) -> np.ndarray:
    """What the saved shard kept of the rows of `part`, as float32 [rows, dim]."""
    saved = Index.read(part.path / INDEX_FILE, replace(config, device="cpu"))
    if saved.halves is not None:
        return saved.halves[part.first : part.last].astype(np.float32)
    return saved.faiss_index.reconstruct_n(part.first, part.last - part.first)


def _overlapping(directory: str | Path, start: int, stop: int) -> list[Part]:
    """The saved shards that hold some of these passages, in order."""
    parts = []
    for path in sorted(Path(directory).glob(f"{SHARD_PREFIX}*")):
        try:
            extra = verify(path, contents=False)
        except TornSnapshot:
            continue  # what is missing then is noticed
        first, last = max(start, extra.get("start", 0)), min(stop, extra.get("stop", 0))
        if first < last:
            parts.append(Part(path, extra, first - extra["start"], last - extra["start"]))
    return parts


def _shard(directory: str | Path, number: int) -> Path:
    return Path(directory) / f"{SHARD_PREFIX}{number:04d}"
