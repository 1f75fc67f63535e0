"""Writes and reads a shard's generation on disk.

    shard-NNNN/                      a generation as it was built
        index.faiss                  absent where it has no passages
        numbers                      int64: passage numbers of the rows, where these are not start, start + 1, ...
        manifest.json
    shard-NNNN/                      a generation that was derived from another one
        base/                        what that one's base would be written as; its files are names for the same files
        delta.numbers, delta.versions, delta.vectors
        manifest.json

What was deleted is not written: that stands in the corpus's own log, which is newer than any snapshot.
"""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.snapshot import TornSnapshot, verify, write_file, write_once
from indexing.corpus.stores.table import map_array
from indexing.dense.faiss_build import Index
from indexing.dense.probe import UNKNOWN, Figures
from indexing.indexing_settings import IndexConfig
from indexing.shard.generation import Base, Generation, make_delta

SHARD_PREFIX = "shard-"
INDEX_FILE = "index.faiss"
BASE = "base"
KIND = "index shard"


def check_saved(path: Path, extra: dict[str, Any], **wanted: int | str) -> None:
    """Raise ValueError if the manifest of the saved shard `path` says `extra` where `wanted` is needed."""
    for name, value in {"kind": KIND, **wanted}.items():
        if extra.get(name) != value:
            raise ValueError(f"{path} has {name} {extra.get(name)!r}: needed is {value!r}")


def write_generation(
    path: Path, number: int, *, generation: Generation, place: dict[str, Any], earlier: Path | None
) -> None:
    """Write `generation` to the new directory `path`; `place` (shard range and kind of index) goes into the manifest.

    `earlier`: this shard's directory in another snapshot; where it holds the same base, that is linked and not written
    again. Raises OSError with the path where the disk is full.
    """
    base, delta = generation.base, generation.delta
    if number == base.generation and delta is None:
        _write_base(path, base, place)
        return
    extra = {
        **place,
        "kind": KIND,
        "generation": number,
        "weights_version": generation.weights_version,
        "corpus_version": generation.corpus_version,
        "dim": generation.dim,
        "derived": True,
    }
    with write_once(path, extra) as temporary:
        if earlier is None or not _link_base(earlier, temporary / BASE, base.key):
            _write_base(temporary / BASE, base, place)
        empty = np.empty((0, generation.dim), np.float32)
        numbers, versions, vectors = (
            (np.empty(0, np.int64), np.empty(0, np.int64), empty)
            if delta is None
            else (delta.numbers, delta.versions, delta.vectors)
        )
        write_file(temporary / "delta.numbers", [numbers])
        write_file(temporary / "delta.versions", [versions])
        write_file(temporary / "delta.vectors", [vectors])


def read_generation(path: Path, config: IndexConfig) -> tuple[Generation, dict[str, Any]]:
    """Read what `write_generation` wrote, and the manifest's extra. Raises TornSnapshot where a bit is wrong."""
    extra = verify(path)
    if extra.get("kind") != KIND:
        raise ValueError(f"{path} has kind {extra.get('kind')!r}: needed is {KIND!r}")
    if not extra.get("derived"):
        base = _read_base(path, extra, config)
        return Generation(base, None, base.weights_version, base.corpus_version), extra
    base = _read_base(path / BASE, verify(path / BASE, contents=False), config)
    numbers, versions, vectors = read_delta(path)
    delta = make_delta(numbers, versions, vectors, config) if len(numbers) else None
    return Generation(base, delta, extra["weights_version"], extra["corpus_version"]), extra


def delta_numbers(path: Path) -> np.ndarray:
    """Return the passage numbers int64 [n], sorted, of the delta in the directory of a derived generation."""
    return map_array(path / "delta.numbers", "int64")


def read_delta(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same, with weights versions int64 [n] and vectors float32 [n, dim]."""
    numbers, versions = (np.array(map_array(path / f"delta.{name}", "int64")) for name in ("numbers", "versions"))
    vectors = np.array(map_array(path / "delta.vectors", "float32"))
    return numbers, versions, vectors.reshape(len(numbers), -1) if len(numbers) else np.empty((0, 0), np.float32)


def _write_base(path: Path, base: Base, place: dict[str, Any]) -> None:
    extra = {
        **place,
        "kind": KIND,
        "generation": base.generation,
        "weights_version": base.weights_version,
        "corpus_version": base.corpus_version,
        "dim": 0 if base.index is None else base.index.dim,
        "rows": base.num_rows,
        "key": base.key,
        "recall": base.figures.recall,
    }
    with write_once(path, extra) as temporary:
        if base.index is not None:
            base.index.write(temporary / INDEX_FILE)
        if base.numbers is not None:
            write_file(temporary / "numbers", [base.numbers])


def _read_base(path: Path, extra: dict[str, Any], config: IndexConfig) -> Base:
    """Read the base in a directory that was verified."""
    index = Index.read(path / INDEX_FILE, config) if (path / INDEX_FILE).is_file() else None
    numbers = np.array(map_array(path / "numbers", "int64")) if (path / "numbers").is_file() else None
    rows, dim = (0, 0) if index is None else (index.num_vectors, index.dim)
    needed = extra["stop"] - extra["start"] if numbers is None else len(numbers)
    if (rows, dim) != (needed, extra["dim"]):
        raise ValueError(f"{path} holds {rows} vectors: needed are {needed}")
    # Snapshots of before the live corpus have neither key nor corpus version.
    key, corpus_version = extra.get("key") or secrets.token_hex(8), extra.get("corpus_version", 0)
    figures = UNKNOWN if index is None else Figures(index.num_bytes / rows, recall=extra.get("recall"))
    weights_version = extra["weights_version"]
    return Base(
        index=index,
        start=extra["start"],
        numbers=numbers,
        generation=extra["generation"],
        weights_version=weights_version,
        corpus_version=corpus_version,
        key=key,
        figures=figures,
    )


def _link_base(earlier: Path, target: Path, key: str) -> bool:
    """Give the files of the base with this key in `earlier` a second name under `target`; whether that was possible."""
    for source in (earlier, earlier / BASE):
        try:
            if not key or verify(source, contents=False).get("key") != key:
                continue
            target.mkdir()
            for file in source.iterdir():
                os.link(file, target / file.name)
        except (TornSnapshot, OSError):  # pruned meanwhile, or on a file system without links
            shutil.rmtree(target, ignore_errors=True)
        else:
            return True
    return False
