"""`events.jsonl` of a run: refreshes, failures and recoveries, one JSON object a line.

Several processes append (coordinator, trainers); each line is one `write` to a file opened for appending, so lines
stay whole. Reading it back is how a restarted coordinator knows what was committed before it died.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """Appends `{"time": seconds since 1970, "event": kind, ...}`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: str, **fields: Any) -> None:
        """Note one event. A full disk costs the line, not the run."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            print(f"cannot write to {self.path}: {error}; lost: {line}", file=sys.stderr)


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first; a line that was cut by a crash is passed over."""
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event
