"""Appends to `events.jsonl` of a run: refreshes, failures and recoveries, one JSON object per line.

Several processes append. A restarted coordinator reads it to know what was committed before.
"""

import sys
import time
from pathlib import Path
from typing import Any

from training.reporting.jsonl import append_line


class EventLog:
    """The log, which appends `{"time": seconds since 1970, "event": kind, ...}`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: str, **fields: Any) -> None:
        """Append one event. A full disk costs the line, not the run."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        try:
            append_line(self.path, line)
        except OSError as error:
            print(f"cannot write to {self.path}: {error}; lost: {line}", file=sys.stderr)
