"""Turns the signals that end a job into one request to stop, and bounds the time that the stop may take.

Ctrl-C (SIGINT), SIGTERM (a scheduler or a pod's end), SIGHUP (a closed terminal) and SIGUSR1 (Slurm's `--signal`)
raise `Interrupted` in the main thread, once. What is under way saves what it has and ends; a process that has not ended
after the bound ends at once. A later signal changes nothing, but Ctrl-C some seconds later ends the process at once.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LEFT_TO_CHILDREN = (signal.SIGINT, signal.SIGTERM)  # the others would end Ray's processes before anything is saved
PR_SET_PDEATHSIG = 1  # linux/prctl.h
AGAIN_S = 3.0  # one Ctrl-C may arrive twice: from the terminal, and from the process that started this one


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end of the work."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved: Path | None = None  # the checkpoint that the work goes on from, if there is one

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after any other signal: what a shell reports for SIGINT and SIGTERM."""
        return exit_code(self.number)


class _State:
    """The process has one set of signal handlers, and thus one state of them."""

    limit_s = 30.0
    since: float | None = None  # time.monotonic() of the first signal


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal has stopped."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def install() -> None:
    """Take the signals over; call it in the main thread."""
    _State.since = None
    for number in SIGNALS:
        signal.signal(number, _handle)


def set_limit(limit_s: float) -> None:
    """Set the seconds that a stop may take."""
    _State.limit_s = limit_s


def left_s() -> float:
    """Return the seconds that the stop may still take; the whole bound if no signal has come."""
    passed = 0.0 if _State.since is None else time.monotonic() - _State.since
    return max(0.0, _State.limit_s - passed)


@contextmanager
def sparing_children() -> Iterator[None]:
    """Start processes in this block: they ignore the signals that only the process which starts them answers, and
    handlers that the block installs are taken back at its end. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if number not in LEFT_TO_CHILDREN:
            signal.signal(number, signal.SIG_IGN)  # a disposition that survives exec
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_with_parent() -> None:
    """Have this process, which is about to become another program, get SIGTERM when the thread that started it ends,
    however that ends (Linux; elsewhere nothing happens). A `preexec_fn` of subprocess."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.since is None:
        _State.since = time.monotonic()
        limit = threading.Timer(_State.limit_s, _end_at_once, (number,))
        limit.daemon = True
        limit.start()
        raise Interrupted(number)
    if number == signal.SIGINT and time.monotonic() - _State.since > AGAIN_S:
        os._exit(exit_code(number))


def _end_at_once(number: int) -> None:
    name = signal.Signals(number).name
    print(
        f"tandem: {name} came {_State.limit_s:g} s ago (cluster.stop_timeout_s), and the work has not ended: it is "
        "ended now; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(exit_code(number))
