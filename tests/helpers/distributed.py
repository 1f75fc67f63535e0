"""Run a function in several processes that form one gloo group."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def spawn(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` new processes and return the results by rank.

    `fn` is a function of a module's top level; arguments and results are pickled. Raises RuntimeError with the
    traceback of the first process that failed, TimeoutError after `timeout_s`. No process is left behind.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: a free one
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(fn, rank, world_size, store.port, writer, args), daemon=True)
            process.start()
            writer.close()  # the child has its own end; a dead child is an end of file here
            pipes.append(reader)
            processes.append(process)
        return _collect(pipes, deadline, timeout_s)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(pipes: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - results.keys())
            raise TimeoutError(f"ranks {missing} have not answered after {timeout_s} s")
        for pipe in ready:
            rank = next(number for number, candidate in enumerate(pipes) if candidate is pipe)
            try:
                succeeded, value = pipes[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, writer: Connection, args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        writer.send((True, fn(rank, world_size, *args)))
    except BaseException:
        writer.send((False, traceback.format_exc()))
    finally:
        writer.close()
