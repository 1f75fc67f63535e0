"""Encoding: every row once, in length order, within the budget, whatever the batches."""

from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.table import RaggedWriter, TokenTable
from indexing.dense.encode import encode_range, encode_rows, length_batches
from tests.indexing.helpers import make_store


def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sum, length and last token of each row: any mistake with padding shows."""
    assert ids[mask == 0].tolist() == [7] * int((mask == 0).sum())
    last = ids[np.arange(len(ids)), mask.sum(axis=1) - 1]
    return np.stack([(ids * mask).sum(axis=1), mask.sum(axis=1), last], axis=1).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", 60)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_every_row_once_within_the_budget(store: Store, batch_tokens: int) -> None:
    table = store.tokens("retriever")
    wanted = np.array([5, 59, 0, *range(10, 40)])
    seen = {}
    last_length = 10**9
    for rows, vectors in encode_rows(table, wanted, encode=encode, batch_tokens=batch_tokens, pad_id=7):
        lengths = table.lengths[rows]
        assert len(rows) == 1 or len(rows) * lengths.max() <= batch_tokens
        assert lengths.max() <= last_length
        last_length = lengths.min()
        seen.update(dict(zip(rows.tolist(), vectors.tolist(), strict=True)))
    expected = {
        int(row): [tokens.sum(), len(tokens), tokens[-1]]
        for row, tokens in zip(wanted, table.rows(wanted), strict=True)
    }
    assert seen == expected


def test_range_is_in_order(store: Store) -> None:
    table = store.tokens("retriever")
    vectors = encode_range(table, 20, stop=50, encode=encode, batch_tokens=200, pad_id=7)
    assert vectors.shape == (30, 3)
    assert vectors[:, 0].tolist() == [row.sum() for row in table.rows(np.arange(20, 50))]


def test_refusals(store: Store, tmp_path: Path) -> None:
    table = store.tokens("retriever")
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        list(length_batches(table, np.arange(3), 0))
    with pytest.raises(ValueError, match=r"shape \(1, 3\) from 3 passages"):
        list(encode_rows(table, np.arange(3), encode=lambda ids, mask: np.zeros((1, 3)), batch_tokens=1000))
    with pytest.raises(IndexError):
        list(encode_rows(table, np.array([60]), encode=encode, batch_tokens=1000))
    with RaggedWriter(tmp_path, "t", "int32") as writer:
        writer.append([[1], [], [2]])
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        list(encode_rows(TokenTable(tmp_path, "t"), np.arange(3), encode=encode, batch_tokens=1000))
    assert list(encode_rows(table, np.arange(0), encode=encode, batch_tokens=1000)) == []


def test_little_padding(tmp_path: Path) -> None:
    """A group of more than 2,048 tokens has at most a sixteenth of padding, however large the budget."""
    generator = np.random.default_rng(0)
    with RaggedWriter(tmp_path, "t", "int32") as writer:
        writer.append([np.ones(length) for length in generator.integers(1, 200, 500)])
    table = TokenTable(tmp_path, "t")
    groups = list(length_batches(table, np.arange(500), 1_000_000))
    assert sorted(np.concatenate(groups).tolist()) == list(range(500))
    for rows in groups:
        lengths = table.lengths[rows].astype(int)
        padded = len(rows) * lengths.max()
        assert padded <= 2048 or lengths.sum() >= padded * 15 / 16
    assert len(groups) < 30
