"""Groups of near-duplicates against brute force over all pairs."""

from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.duplicates import (
    NUM_HASHES,
    band_width,
    duplicate_groups,
    jaccard,
    open_groups,
    write_groups,
)
from indexing.corpus.stores.passages import write_store
from indexing.corpus.stores.table import TokenTable, write_tokens
from tests.indexing.helpers import words_side


def table_of(rows: list[list[int]], folder: Path) -> TokenTable:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder, "tokens", rows)
    return TokenTable(folder, "tokens")


def trigrams(row: list[int]) -> set[tuple[int, ...]]:
    row = [*row, *[-1] * (3 - len(row))]
    return {tuple(row[i : i + 3]) for i in range(len(row) - 2)}


def similarity(a: list[int], b: list[int]) -> float:
    return len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b))


def brute_force(rows: list[list[int]], threshold: float) -> list[int]:
    """Connected components of all pairs at or above the threshold, named by their smallest row."""
    groups = list(range(len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            if similarity(rows[i], rows[j]) >= threshold:
                low, high = sorted((groups[i], groups[j]))
                groups = [low if group == high else group for group in groups]
    return groups


def planted(seed: int) -> list[list[int]]:
    """120 rows: originals, and copies of which few to many tokens were changed, cut off or moved."""
    random = np.random.default_rng(seed)
    rows = [random.integers(0, 500, random.integers(1, 60)).tolist() for _ in range(50)]
    while len(rows) < 120:
        row = list(rows[int(random.integers(len(rows)))])
        if len(rows) % 5 == 0:
            rows.append(row)
            continue
        for _ in range(int(random.integers(0, 6))):
            row[int(random.integers(len(row)))] = int(random.integers(500))
        rows.append(row[: max(1, len(row) - int(random.integers(0, 4)))])
    return rows


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_groups_equal_brute_force(tmp_path: Path, threshold: float) -> None:
    """What LSH may overlook has a probability below a thousandth a pair; these seeds have none."""
    for seed in range(3):
        rows = planted(seed)
        expected = brute_force(rows, threshold)
        assert len(set(expected)) < 112
        assert duplicate_groups(table_of(rows, tmp_path / str(seed)), threshold).tolist() == expected


def test_similarity_of_pairs_by_hand_and_by_sets(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [7], [], [1, 2, 3, 1, 2, 3]]
    table = table_of(rows, tmp_path)
    pairs = np.array([(0, 1), (0, 2), (3, 4), (4, 4), (0, 5)])
    # {123, 234} and {123, 235}: 1 of 3; {123, 231, 312} and {123, 234}: 1 of 4; a shingle twice counts once
    assert jaccard(table, pairs).tolist() == pytest.approx([1 / 3, 1.0, 0.0, 1.0, 1 / 4])
    rows = planted(5)
    table = table_of(rows, tmp_path / "more")
    pairs = np.random.default_rng(0).integers(0, len(rows), (300, 2))
    assert jaccard(table, pairs).tolist() == pytest.approx([similarity(rows[i], rows[j]) for i, j in pairs])


def test_bands_overlook_little_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.95, 1.0):
        width = band_width(threshold)
        assert (1 - threshold**width) ** (NUM_HASHES // width) <= 1e-3
    assert band_width(1.0) > band_width(0.8) > band_width(0.5)


def test_every_row_alone_above_one_and_refused_at_zero(tmp_path: Path) -> None:
    table = table_of([[1, 2, 3]] * 4, tmp_path)
    assert duplicate_groups(table, 1.01).tolist() == [0, 1, 2, 3]
    assert duplicate_groups(table, 1.0).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"pretraining\.duplicate_threshold=0"):
        duplicate_groups(table, 0)


def test_written_once_and_opened(tmp_path: Path) -> None:
    text = "a town on the river Lo with old walls and a mill"
    passages = [Passage("a", "T", text), Passage("b", "U", "something else entirely"), Passage("c", "T", f"{text} too")]
    store = write_store(tmp_path / "store", passages, [words_side("generator")])
    assert write_groups(tmp_path / "groups", store, "generator", 0.7).tolist() == [0, 1, 0]
    assert open_groups(tmp_path / "groups").tolist() == [0, 1, 0]
    with pytest.raises(FileExistsError):
        write_groups(tmp_path / "groups", store, "generator", 0.7)
    with pytest.raises(ValueError, match="not a duplicate groups"):
        open_groups(store.path)
