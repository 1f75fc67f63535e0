"""Pack rows of unequal length into few padded rectangles, sorted by length and trimmed to the longest row of each."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

MIN_GROUP_ROWS = 4  # smaller groups cost more in calls than they save in padding


def count_groups(num_rows: int, num_groups: int) -> int:
    """Return the number of groups: a function of the row count alone, so that ranks of equal batches make equally many
    calls of a sharded module (each call is a collective under ZeRO 3)."""
    return max(1, min(num_groups, num_rows // MIN_GROUP_ROWS))


def row_lengths(mask: Tensor) -> Tensor:
    """Return the position after the last valid token of `mask` [rows, tokens], int64 [rows]; 0 for an empty row."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    if mask.shape[1] == 0:
        return torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device)
    return (mask.bool() * positions).amax(dim=1)


def length_groups(mask: Tensor, num_groups: int) -> list[tuple[Tensor, int]]:
    """Return groups of row numbers (int64, on the mask's device), shortest rows first, each with the length (at least
    1) to which its rows of `mask` [rows, tokens] can be trimmed. One group keeps the rows in order."""
    lengths = row_lengths(mask).cpu()
    groups = count_groups(len(lengths), num_groups)
    order = torch.argsort(lengths, stable=True) if groups > 1 else torch.arange(len(lengths))
    chunks = torch.tensor_split(order, groups)
    return [(rows.to(mask.device), max(1, int(lengths[rows].max())) if len(rows) else 1) for rows in chunks]


def restore_order(outputs: Sequence[Tensor], groups: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Join the outputs of all groups to one tensor [rows, ...] in the original order."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(list(outputs))[torch.argsort(torch.cat([rows for rows, _ in groups]))]


def by_length(fn: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, num_groups: int) -> Tensor:
    """Run `fn(ids [n, t], mask [n, t])` on length-sorted, trimmed groups; rows come back in their original order.

    `fn` returns [n, dim] or [n, t, ...] of three or more axes (a vector a token; trimmed positions come back as zeros).
    Gradients flow through. Padding is on the right.
    """
    width = ids.shape[1]
    groups = length_groups(mask, num_groups)
    outputs: list[Tensor] = []
    for rows, length in groups:
        whole = len(groups) == 1
        output = fn((ids if whole else ids[rows])[:, :length], (mask if whole else mask[rows])[:, :length])
        if output.dim() >= 3 and length < width:
            output = torch.cat([output, output.new_zeros(len(output), width - length, *output.shape[2:])], dim=1)
        outputs.append(output)
    return restore_order(outputs, groups)


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ragged token rows as int64 ids [rows, longest], padded on the right with `pad_id`, and their bool mask."""
    width = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return torch.from_numpy(ids), torch.from_numpy(mask)
