"""Candidates of an exact search by products of bfloat16, on processors that have them (AMX, AVX512-BF16).

The vectors are kept once more in 2 bytes a number. A query's product with them goes block by block; of each block what
exceeds the worst candidate so far joins the candidates. That is looked for in the maxima of GROUP rows each, by integer
comparison: numbers of bfloat16 that are not negative are ordered as their bits are.

How far a row that is no candidate may really score follows from what was rounded. With x' and q' the vectors in
bfloat16, |q.x - q'.x'| <= |q| |x - x'| + |q - q'| |x'|, both computed; a sum of dim products in float32 adds at most
dim 2^-24 |q'| |x'| (Higham 2002, section 3.1), rounding the score to bfloat16 2^-8 of it.
"""

import numpy as np
import torch

BLOCK_SCORES = 1 << 20  # of a product that is looked through at a time
BLOCK_ROWS = 1 << 14  # that are rounded at a time
FIRST_ROWS = 8192  # that give the first candidates, by sorting
GROUP = 64  # rows with one maximum
SPARE = 108  # candidates beyond k: unit vectors of 384 numbers are then told apart among millions
UNIT = 2.0**-8  # largest relative error of rounding to bfloat16
SLACK = 1.01  # for the rounding of the bounds themselves
OVERFLOW = 2.0**120
LOWEST = np.int16(-(2**15))


class HalfProducts:
    """`indexing.dense.exhaustive.Proposer` of vectors float32 or float16 [n, dim], which it copies."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.spare_candidates, self.num_bytes = SPARE, 2 * vectors.size
        self._halves = torch.empty(vectors.shape, dtype=torch.bfloat16)
        self._largest = self._error = 0.0  # norms: of a vector as it is kept, and of what its rounding took
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = torch.from_numpy(vectors[start : start + BLOCK_ROWS].astype(np.float32))
            kept = self._halves[start : start + len(block)].copy_(block).double()  # squares of tiny numbers vanish
            self._largest = max(self._largest, float(kept.norm(dim=1).max()))
            self._error = max(self._error, float((kept - block).norm(dim=1).max()))

    def propose(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Implements the protocol. Raises no further errors: where products overflow, the ceiling is infinite."""
        with torch.inference_mode():
            asked = torch.from_numpy(queries).to(torch.bfloat16)
            scores, rows = self._best(asked.T.contiguous(), count)
            off = (torch.from_numpy(queries) - asked.float()).double().norm(dim=1).numpy()
            length = asked.double().norm(dim=1).numpy()
        dim, worst = queries.shape[1], scores.min(axis=1).astype(np.float64)
        error = (length + off) * self._error + off * self._largest
        error += dim * (2.0**-24 * length * self._largest + 2.0**-126)  # the processor takes tiny numbers for 0
        ceiling = worst + SLACK * (UNIT * np.abs(worst) + error)
        return rows, np.where(length * self._largest < OVERFLOW, ceiling, np.inf)

    def _best(self, columns: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `count` best scores float32 [batch, count] by bfloat16 `columns` [dim, batch], in no order, and
        rows."""
        total, batch = len(self._halves), columns.shape[1]
        start = min(total, max(FIRST_ROWS, count))
        first = torch.mm(self._halves[:start], columns).T.float().topk(count, sorted=False)
        scores, rows = first.values.numpy(), first.indices.numpy()
        block = max(GROUP, BLOCK_SCORES // batch // GROUP * GROUP)
        product = torch.empty((min(block, -(-(total - start) // GROUP) * GROUP), batch), dtype=torch.bfloat16)
        for begin in range(start, total, block):
            num_rows = min(block, total - begin)
            torch.mm(self._halves[begin : begin + num_rows], columns, out=product[:num_rows])
            which, above = _above(product, num_rows, scores.min(axis=1))
            if len(which):
                more = product[torch.from_numpy(above), torch.from_numpy(which)].float().numpy()
                scores, rows = _joined(scores, rows, which=which, more=more, more_rows=above + begin)
        return scores, rows


def _above(product: torch.Tensor, num_rows: int, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries, rising, and rows whose score in the first `num_rows` of bfloat16 [rows, batch] exceeds the query's of
    float32 `limits` [batch], which are numbers of bfloat16. The rows' number is a multiple of GROUP."""
    bits = product.view(torch.int16).numpy()
    bounds = torch.from_numpy(limits).to(torch.bfloat16).view(torch.int16).numpy()
    if (bounds <= 0).any():  # negative numbers are ordered backwards
        bits, bounds = _ordered(bits), _ordered(bounds)
    bits[num_rows:] = LOWEST
    groups = bits.reshape(GROUP, -1, bits.shape[1])  # row j of group g is row j * groups + g
    which, group = np.nonzero(bounds[:, None] < groups.max(axis=0).T)
    members, place = np.nonzero(groups[:, group, which] > bounds[which])
    order = np.argsort(place, kind="stable")
    members, place = members[order], place[order]
    return which[place], members * groups.shape[1] + group[place]


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Integers in the order of the numbers whose bits are given."""
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def _joined(
    scores: np.ndarray, rows: np.ndarray, *, which: np.ndarray, more: np.ndarray, more_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of `scores` [batch, count] and of `more` [any], which belong to the queries `which`, rising."""
    batch, count = scores.shape
    numbers = np.bincount(which, minlength=batch)
    place = np.arange(len(which)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    wide = np.full((batch, count + numbers.max()), -np.inf, np.float32)
    wide_rows = np.full(wide.shape, -1, np.int64)
    wide[:, :count], wide_rows[:, :count] = scores, rows
    wide[which, count + place], wide_rows[which, count + place] = more, more_rows
    best = np.argpartition(wide, wide.shape[1] - count, axis=1)[:, wide.shape[1] - count :]
    return np.take_along_axis(wide, best, axis=1), np.take_along_axis(wide_rows, best, axis=1)
