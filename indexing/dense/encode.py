"""Encodes token rows of the store into blocks of vectors, in batches of similar length.

The caller passes the encode function: this module knows no model.
"""

from collections.abc import Callable, Iterator

import numpy as np

from indexing.corpus.stores.table import TokenTable

PADDING = 1 / 16  # Share of a group's tokens
SMALL_TOKENS = 2048  # Number of tokens: a smaller group is not split, since it does not fill a processor
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids, mask int64 [n, tokens] -> vectors float32 [n, dim]


def encode_rows(
    table: TokenTable, rows: np.ndarray, *, encode: Encode, batch_tokens: int, pad_id: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode `rows` of `table`, longest first, at most `batch_tokens` padded tokens at a time (one row at least).

    Yields row numbers int64 [n] and their vectors float32 [n, dim], every row once. Raises ValueError for a row
    without tokens (naming it) and for vectors of a wrong shape.
    """
    for batch in length_batches(table, rows, batch_tokens):
        ids, mask = table.padded(batch, pad_id)
        vectors = np.asarray(encode(ids, mask), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(batch):
            raise ValueError(f"the encoder made vectors of shape {vectors.shape} from {len(batch)} passages")
        yield batch, vectors


def encode_range(
    table: TokenTable, start: int, *, stop: int, encode: Encode, batch_tokens: int, pad_id: int = 0
) -> np.ndarray:
    """Return the vectors float32 [stop - start, dim] of the passages `start` to `stop` - 1, in their order."""
    assert start < stop
    return encode_numbers(table, np.arange(start, stop), encode=encode, batch_tokens=batch_tokens, pad_id=pad_id)


def encode_numbers(
    table: TokenTable, numbers: np.ndarray, *, encode: Encode, batch_tokens: int, pad_id: int = 0
) -> np.ndarray:
    """Return the vectors float32 [n, dim] of the passages `numbers` (int64 [n], sorted, none twice), in their order."""
    vectors = np.empty((0, 0), np.float32)
    for rows, block in encode_rows(table, numbers, encode=encode, batch_tokens=batch_tokens, pad_id=pad_id):
        if not vectors.size:
            vectors = np.empty((len(numbers), block.shape[1]), np.float32)
        vectors[np.searchsorted(numbers, rows)] = block
    return vectors


def length_batches(table: TokenTable, rows: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Return `rows` in groups, longest first; number of rows times longest length of a group is at most `batch_tokens`.

    A group also ends if more than `PADDING` of it would be padding, unless it is small.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: allowed is 1 or more")
    rows = np.asarray(rows, np.int64)
    lengths = table.lengths[rows]
    if len(rows) and not lengths.min():
        raise ValueError(f"row {rows[lengths.argmin()]} has no tokens: an encoder needs at least one")
    order = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[order], lengths[order].astype(np.int64)
    begin = 0
    while begin < len(rows):
        largest = max(1, batch_tokens // int(lengths[begin]))
        tokens = np.cumsum(lengths[begin : begin + largest])
        padded = lengths[begin] * np.arange(1, len(tokens) + 1)
        size = int(np.count_nonzero((tokens >= (1 - PADDING) * padded) | (padded <= SMALL_TOKENS)))
        yield rows[begin : begin + max(1, size)]
        begin += max(1, size)
