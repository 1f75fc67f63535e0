"""Rows of unequal length in few padded rectangles: sorted by length, in groups, each trimmed to its longest row."""

from collections.abc import Callable

import torch
from torch import Tensor

MIN_GROUP_ROWS = 4  # smaller groups cost more in calls than they save in padding


def count_groups(num_rows: int, num_groups: int) -> int:
    """How many groups are made: a function of the row count alone, so that ranks of equal batches make equally many
    calls of a sharded module (each call is a collective under ZeRO 3)."""
    return max(1, min(num_groups, num_rows // MIN_GROUP_ROWS))


def row_lengths(mask: Tensor) -> Tensor:
    """int64 [rows]: position after the last valid token of `mask` [rows, tokens]; 0 for a row without any."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    if mask.shape[1] == 0:
        return torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device)
    return (mask.bool() * positions).amax(dim=1)


def by_length(fn: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, num_groups: int) -> Tensor:
    """Run `fn(ids [n, t], mask [n, t])` on length-sorted, trimmed groups; rows come back in their original order.

    `fn` returns [n, dim] or [n, t, ...] of three or more axes (a vector a token; trimmed
    positions come back as zeros). Gradients flow through. Padding is on the right.
    """
    num_rows, width = ids.shape
    if num_rows == 0 or width == 0:
        return fn(ids, mask)
    lengths = row_lengths(mask).cpu()
    groups = count_groups(num_rows, num_groups)
    if groups == 1:
        return _trimmed(fn, ids, mask, int(lengths.max()))
    order = torch.argsort(lengths, stable=True)
    outputs: list[Tensor] = []
    for rows in torch.tensor_split(order, groups):
        chosen = rows.to(ids.device)
        outputs.append(_trimmed(fn, ids[chosen], mask[chosen], int(lengths[rows].max())))
    return torch.cat(outputs)[torch.argsort(order).to(ids.device)]


def _trimmed(fn: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """`fn` on the first `length` (at least one) tokens; an output per token is filled up with zeros."""
    length, width = max(1, length), ids.shape[1]
    output = fn(ids[:, :length], mask[:, :length])
    if length == width or output.dim() < 3:
        return output
    return torch.cat([output, output.new_zeros(len(output), width - length, *output.shape[2:])], dim=1)
