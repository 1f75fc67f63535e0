"""The processes that train together, and the small objects that they exchange."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class Ranks:
    """The process group of the launcher (Ray Train, torchrun), or a group of this process alone if there is none.

    Every method but `share` is collective: all ranks call it in the same order. None waits longer than `timeout_s`. The
    group is never left, since DeepSpeed keeps groups that it made from it.
    """

    def __init__(self, timeout_s: float) -> None:
        on_gpu, timeout = torch.cuda.is_available(), timedelta(seconds=timeout_s)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            backend = "nccl" if on_gpu else "gloo"
            if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                dist.init_process_group(backend, timeout=timeout)
            else:
                store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
                dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        set_timeout(None, timeout_s)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_sum([0.0])

    def any_rank(self, flag: bool) -> bool:
        """Return true if `flag` is true on some rank."""
        return flag if self.world_size == 1 else self.all_reduce_sum([float(flag)])[0] > 0

    def share(self, numbers: np.ndarray) -> np.ndarray:
        """Return this rank's part of `numbers`. All parts have the same size; the last ones repeat the first number."""
        size = -(-len(numbers) // self.world_size)
        padded = np.concatenate([numbers, np.repeat(numbers[:1], size * self.world_size - len(numbers))])
        return padded[self.rank :: self.world_size]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's `value` (pickled) on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value` (pickled) on every rank, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def set_timeout(group: Any, timeout_s: float) -> None:
    """Bound the collectives of a process group (None: the one of all ranks)."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
