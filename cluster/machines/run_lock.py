"""Keeps two jobs out of one run folder: `lock.json` in it names the process that works there.

A lock is stale when its process has ended, or where that is on another machine when nothing has touched the file for
`SILENT_S`. No lock of the file system is needed, which network file systems may lack.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LOCK_FILE = "lock.json"
BEAT_S = 5.0  # between two signs of life
SILENT_S = 20.0  # after which a process on another machine counts as ended: a few beats, late ones included
LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder; `created` tells it from a later one with the same number."""

    host: str
    pid: int
    created: float  # seconds since 1970
    command: str = ""


def this_process() -> Holder:
    """Return what other processes need to know of this one."""
    process = psutil.Process()
    return Holder(
        host=socket.gethostname(),
        pid=process.pid,
        created=process.create_time(),
        command=" ".join(" ".join(process.cmdline()[-3:]).split()),  # in one line
    )


def read_holder(path: Path) -> Holder | None:
    """Return the process that a file names; None where there is no such file, or another one."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def lives(holder: Holder, beat: Path, *, silent_s: float, look_s: float) -> bool:
    """Return True if a process has not ended. One on another machine has ended when nothing touches the file `beat` for
    `silent_s`; this looks every `look_s`."""
    if holder.host == socket.gethostname():
        try:
            return psutil.Process(holder.pid).create_time() == holder.created
        except psutil.NoSuchProcess:
            return False
    before, deadline = _touched(beat), time.monotonic() + silent_s
    while time.monotonic() < deadline:
        time.sleep(look_s)
        if _touched(beat) != before:
            return True
    return False


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the run folder `folder`, which is made if it is not there, while the block runs. A folder that this process
    holds already stays held. Raises ValueError that names the process that holds it."""
    path, me = folder / LOCK_FILE, this_process()
    if read_holder(path) == me:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _take(path, me)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), name="run-lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if read_holder(path) == me:
                path.unlink()


def clear(folder: Path) -> None:
    """Remove everything in a folder that this process holds, but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _take(path: Path, me: Holder) -> None:
    draft = path.with_name(f".{LOCK_FILE}.{socket.gethostname()}.{me.pid}")
    draft.write_text(json.dumps(asdict(me)), encoding="utf-8")
    try:
        while True:
            try:
                os.link(draft, path)  # fails where the file is there, complete at once
                return
            except FileExistsError:
                holder = read_holder(path)
                if holder is not None and lives(holder, path, silent_s=SILENT_S, look_s=LOOK_S):
                    raise ValueError(_refusal(path.parent, holder)) from None
                stale = path.with_name(f".{LOCK_FILE}.stale.{me.pid}")
                with suppress(FileNotFoundError):  # another process was faster
                    path.rename(stale)
                    if read_holder(stale) not in (holder, None):  # it was taken anew meanwhile
                        stale.rename(path)
                    stale.unlink(missing_ok=True)
    finally:
        draft.unlink(missing_ok=True)


def _touched(path: Path) -> int:
    """Return when the file was touched last; opened first, since a network file system then asks its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return -1


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)


def _refusal(folder: Path, holder: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.created))
    return (
        f"{folder} is in use by process {holder.pid} on {holder.host}, which started at {since} ({holder.command}): "
        "wait for it, stop it, or take another run.name"
    )
