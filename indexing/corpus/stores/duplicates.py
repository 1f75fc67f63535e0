"""Finds groups of near-duplicate passages, once and in time linear in the corpus, and stores them beside the passages.

Two passages are near-duplicates if the Jaccard index of their sets of token trigrams reaches a threshold. Candidates
come from MinHash signatures cut into bands (Broder 1997, "On the resemblance and containment of documents"; banding as
in Indyk & Motwani 1998): passages that agree on a whole band are compared exactly. The bands are chosen so that a pair
right at the threshold is overlooked with a probability below `MISS`; equal rows never are. A group holds everything
that a chain of near-duplicates joins, so that too much rather than too little is excluded with a passage.
"""

from pathlib import Path

import numpy as np

from indexing.corpus.snapshot import write_file, write_once
from indexing.corpus.stores.passages import Store, open_extra
from indexing.corpus.stores.table import TokenTable, map_array

KIND = "duplicate groups"
SHINGLE = 3  # Number of tokens
NUM_HASHES = 64
MISS = 1e-3
SEED = 0  # the same corpus always has the same groups
BLOCK_ROWS = 8192
BLOCK_PAIRS = 8192


def write_groups(path: str | Path, store: Store, side: str, threshold: float) -> np.ndarray:
    """Find the groups of `store` by the token rows of `side`, write them once, and return them as `open_groups` does.
    Raises FileExistsError."""
    seal = {"kind": KIND, "corpus_fingerprint": store.fingerprint, "threshold": threshold}
    with write_once(path, seal) as directory:
        write_file(directory / "groups", [duplicate_groups(store.tokens(side), threshold)])
    return open_groups(path)


def open_groups(path: str | Path) -> np.ndarray:
    """Return the stored groups, int64 [passages], memory-mapped: equal numbers are near-duplicates. Raises
    TornSnapshot, ValueError."""
    open_extra(path, KIND, False)
    return map_array(Path(path) / "groups", "int64")


def duplicate_groups(table: TokenTable, threshold: float) -> np.ndarray:
    """Return int64 [rows]: the smallest row number of each row's group. `threshold` is in (0, 1]; above 1 each row is
    alone."""
    if threshold <= 0:
        raise ValueError(f"pretraining.duplicate_threshold={threshold}: must be above 0")
    if threshold > 1 or len(table) < 2:
        return np.arange(len(table), dtype=np.int64)
    signatures = np.concatenate(
        [
            _signatures(*_shingles(table, start, min(start + BLOCK_ROWS, len(table))))
            for start in range(0, len(table), BLOCK_ROWS)
        ]
    )
    parents = np.arange(len(table), dtype=np.int64)
    width = band_width(threshold)
    for start in range(0, NUM_HASHES - width + 1, width):
        pairs = _candidates(signatures[:, start : start + width])
        roots = _roots(parents)
        pairs = pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]]
        for block in range(0, len(pairs), BLOCK_PAIRS):
            some = pairs[block : block + BLOCK_PAIRS]
            for left, right in some[jaccard(table, some) >= threshold].tolist():
                _join(parents, left, right)
    return _roots(parents)


def band_width(threshold: float) -> int:
    """Return the largest width of a band at which a pair at `threshold` is overlooked with a probability of at most
    `MISS`."""
    widths = [width for width in (16, 8, 4, 2, 1) if (1 - threshold**width) ** (NUM_HASHES // width) <= MISS]
    return widths[0] if widths else 1


def jaccard(table: TokenTable, pairs: np.ndarray) -> np.ndarray:
    """Return the Jaccard index, float64 [pairs], of the shingle sets of row pairs int64 [pairs, 2]."""
    rows = pairs.reshape(-1)
    shingles, owners = _shingles_of(table.rows(rows))
    order = np.lexsort((shingles, owners))
    shingles, owners = shingles[order], owners[order]
    first = np.ones(len(shingles), dtype=bool)
    first[1:] = (shingles[1:] != shingles[:-1]) | (owners[1:] != owners[:-1])
    shingles, owners = shingles[first], owners[first]  # each row's shingles are a set
    sizes = np.bincount(owners, minlength=len(rows)).reshape(-1, 2)
    pair = owners // 2
    order = np.lexsort((shingles, pair))
    shingles, pair = shingles[order], pair[order]
    both = (shingles[1:] == shingles[:-1]) & (pair[1:] == pair[:-1])
    shared = np.bincount(pair[1:][both], minlength=len(pairs))
    return shared / np.maximum(1, sizes.sum(axis=1) - shared)


def _shingles(table: TokenTable, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashed shingles of rows [start, stop) and the place of each row's first one; every row has at least
    one."""
    shingles, owners = _shingles_of(table.rows(np.arange(start, stop)))
    return shingles, np.searchsorted(owners, np.arange(stop - start))


def _shingles_of(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return uint64 hashes of the token trigrams of all rows, in order, and the row that each belongs to. Rows that are
    too short are padded with -1."""
    lengths = np.array([max(len(row), SHINGLE) for row in rows], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.full(int(lengths.sum()), -1, dtype=np.int64)
    for start, row in zip(starts, rows, strict=True):
        tokens[start : start + len(row)] = row
    hashes = np.zeros(len(tokens) - SHINGLE + 1, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = _mixed(hashes ^ tokens[offset : offset + len(hashes)].astype(np.uint64))
    owners = np.repeat(np.arange(len(rows)), lengths)[: len(hashes)]
    inside = np.arange(len(hashes)) < (starts + lengths)[owners] - SHINGLE + 1
    return hashes[inside], owners[inside]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64 (Steele et al. 2014): every bit of the input changes every bit of the
    output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(shingles: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return uint64 [rows, NUM_HASHES]: the smallest hash of each row's shingles under each hash function."""
    random = np.random.default_rng(SEED)
    keys = random.integers(0, 2**63, size=NUM_HASHES, dtype=np.uint64)
    columns = [np.minimum.reduceat(_mixed(shingles ^ key), starts) for key in keys]
    return np.stack(columns, axis=1)


def _candidates(band: np.ndarray) -> np.ndarray:
    """Return int64 [pairs, 2]: each row that agrees on the whole band with others, paired with the first of them and
    with the one before it."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        keys = _mixed(keys ^ column)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first = np.searchsorted(ordered, ordered[same])
    pairs = np.concatenate(
        [np.stack([order[same - 1], order[same]], axis=1), np.stack([order[first], order[same]], axis=1)]
    )
    return np.unique(pairs.astype(np.int64), axis=0)


def _join(parents: np.ndarray, left: int, right: int) -> None:
    left, right = _root(parents, left), _root(parents, right)
    parents[max(left, right)] = min(left, right)


def _root(parents: np.ndarray, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = int(parents[row])
    return row


def _roots(parents: np.ndarray) -> np.ndarray:
    """Return the root of every row; pointers are followed until nothing changes."""
    roots = parents
    while True:
        above = roots[roots]
        if np.array_equal(above, roots):
            return above
        roots = above
