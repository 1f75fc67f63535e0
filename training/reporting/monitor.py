"""One monitor per run: metrics to the console, to metrics.jsonl and to Weights & Biases; events to events.jsonl.

The training loop (producer) hands rows to a queue; a thread of its own (consumer) starts the W&B run and logs them, so
that a slow or unreachable W&B never holds training up. The thread waits on the queue until `finish` puts the end mark;
`finish` waits for the thread at most `init_timeout_s` + FINISH_TIMEOUT_S. When W&B fails, one message and one event
say so, and the rows that follow only go to metrics.jsonl.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from training.reporting.jsonl import append_line, drop_torn_line, plain, read_rows
from training.reporting.meters import Timer, memory_metrics
from training.reporting.progress import Progress
from training.reporting.redact import redact
from training.reporting.wandb_settings import run_identifier, wandb_mode
from training.training_settings import MonitorConfig

__all__ = ["Monitor", "Timer", "memory_metrics"]

FINISH_TIMEOUT_S = 30.0  # Seconds for W&B to upload what is left; longer would hold up the next stage
QUEUE_ROWS = 10_000  # Number of rows that may wait for W&B before new ones are left out
STEP_METRIC = "trainer/step"


class Monitor:
    """Takes a run's numbers and events. Does nothing on ranks other than 0."""

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        run_config: Mapping[str, Any],
        total_steps: int,
        rank: int,
        stream: TextIO | None = None,
    ) -> None:
        """Open the files of `run_dir` and start W&B. Raises ValueError for an unknown `monitor.wandb`."""
        mode = wandb_mode(config.wandb)
        self._active = rank == 0
        self._metrics_path = run_dir / "metrics.jsonl"
        self._events_path = run_dir / "events.jsonl"
        self._stream = (stream or sys.stdout) if config.console else None
        self._unwritable: set[Path] = set()
        self._progress: Progress | None = None
        self._wandb: WandbThread | None = None
        if not self._active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if self._stream is not None:
            self._progress = Progress(total_steps, self._stream)
        if drop_torn_line(self._metrics_path):
            self.event("torn_metrics_line_dropped")
        if mode != "off":
            num_rows = sum(1 for _ in read_rows(self._metrics_path))
            if config.wandb == "online" and mode == "offline":
                self._report_wandb("no key found (WANDB_API_KEY or netrc); going on offline", failed=True)
            self._wandb = WandbThread(
                run_dir,
                config,
                mode=mode,
                run_config=redact(dict(run_config)),
                num_rows=num_rows,
                report=self._report_wandb,
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` of optimiser step `step`; numbers that are not finite become null and are counted."""
        if not self._active:
            return
        row = {key: _number(value) for key, value in metrics.items()}
        finite = plain(row)
        num_nonfinite = sum(value is None for value in finite.values())
        if num_nonfinite:
            finite["num_nonfinite"] = num_nonfinite
        self._append(self._metrics_path, {"step": step, "time": round(time.time(), 3), **finite})
        if self._progress is not None and (line := self._progress.line(row, step)) is not None:
            self.message(line)
        if self._wandb is not None:
            self._wandb.log({**{key: value for key, value in finite.items() if value is not None}, STEP_METRIC: step})

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; other processes of the run append to the same file."""
        if self._active:
            self._append(self._events_path, {"time": round(time.time(), 3), "event": kind, **fields})

    def message(self, text: str) -> None:
        """Print one line, unless the console is off or gone."""
        if not self._active or self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # the terminal was closed: the run goes on without it
            self._stream = None

    def summary(self, values: Mapping[str, Any]) -> None:
        """Put final numbers, nested ones as `outer/inner`, into the W&B run's summary."""
        if self._wandb is not None:
            self._wandb.summary(_flat(plain(values)))

    def finish(self, exit_code: int = 0) -> None:
        """Hand W&B what is left and wait for it within bounds. May be called twice."""
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Append a row to a file. A full disk costs the line and one message, not the run."""
        try:
            append_line(path, row)
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                self.message(f"cannot write to {path}: {error}; training goes on without these lines")

    def _report_wandb(self, text: str, failed: bool) -> None:
        self.message(f"W&B: {text}")
        if failed:
            self.event("wandb_failed", message=text)


class WandbThread:
    """The W&B run. A thread of its own talks to it, and nothing else does."""

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        mode: str,
        run_config: dict[str, Any],
        num_rows: int,
        report: Callable[[str, bool], None],
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._mode = mode
        self._run_config = run_config
        self._first_row: int | None = num_rows
        self._report = report
        self._failed = False
        self._run: Any = None
        self._thread: threading.Thread | None = None
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_ROWS)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports hold the exit up for 18 s when offline
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except Exception as error:  # a broken installation must not stop training either
            self._fail(f"cannot be imported: {_first_line(error)}; metrics.jsonl has every number")
            return
        self._module = wandb
        self._thread = threading.Thread(target=self._consume, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, float]) -> None:
        """Queue one row; never waits."""
        self._put("log", row)

    def summary(self, values: dict[str, Any]) -> None:
        """Queue final numbers; never waits."""
        self._put("summary", values)

    def finish(self, exit_code: int) -> None:
        """End the run, and wait for it within bounds."""
        if self._thread is None:
            return
        timeout_s = self._config.init_timeout_s + FINISH_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._queue.put(("finish", exit_code), timeout=timeout_s)
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._fail(f"did not finish within {timeout_s:.0f} s; what it has lies in {self._run_dir / 'wandb'}")

    def _put(self, kind: str, payload: Any) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait((kind, payload))
        except queue.Full:
            self._fail(f"has not taken {QUEUE_ROWS} rows; metrics.jsonl keeps them")

    def _consume(self) -> None:
        try:
            self._start()
        except Exception as error:  # whatever W&B raises, training goes on
            self._give_up("could not start", error)
        while True:
            kind, payload = self._queue.get()
            if self._run is not None:
                try:
                    self._handle(kind, payload)
                except Exception as error:
                    self._give_up("stopped", error)
            if kind == "finish":
                return

    def _handle(self, kind: str, payload: Any) -> None:
        match kind:
            case "log":
                # A resumed offline run does not know how many rows it had: its first row carries the number.
                self._run.log(payload, step=self._first_row, commit=True)
                self._first_row = None
            case "summary":
                self._run.summary.update(payload)
            case "finish":
                self._run.finish(exit_code=payload)

    def _start(self) -> None:
        identifier = run_identifier(self._run_dir)
        run = None
        if self._mode == "online":
            try:
                run = self._init("online", identifier)
                self._first_row = None  # the server knows
                self._report(f"run at {run.url}", False)
            except Exception as error:
                self._report(f"server not reached ({_first_line(error)}); going on offline", True)
                self._module.teardown(exit_code=0)  # the service still holds the identifier
        if run is None:
            run = self._init("offline", identifier)
            self._report(f"offline run in {self._run_dir / 'wandb'} (wandb sync uploads it)", False)
        run.define_metric(STEP_METRIC, hidden=True)
        run.define_metric("*", step_metric=STEP_METRIC)
        self._run = run

    def _init(self, mode: Literal["online", "offline"], identifier: str) -> Any:
        wanted = {
            "root_dir": str(self._run_dir),
            "init_timeout": self._config.init_timeout_s,
            "finish_timeout": FINISH_TIMEOUT_S,
            "reinit": "create_new",  # independent of other runs of this process
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "x_disable_meta": True,  # it would hold this process's arguments
        }
        known = self._module.Settings.model_fields  # older versions lack a few
        return self._module.init(
            project=self._config.project,
            entity=self._config.entity or None,
            name=self._run_dir.name,
            id=identifier,
            resume="allow",
            mode=mode,
            config=self._run_config,
            settings=self._module.Settings(**{key: value for key, value in wanted.items() if key in known}),
        )

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        self._fail(f"{what}: {_first_line(error)}; training goes on, metrics.jsonl has every number")
        with contextlib.suppress(Exception):
            self._module.teardown(exit_code=1)  # so that it does not complain again when Python exits

    def _fail(self, text: str) -> None:
        """Report the first failure; later ones follow from it."""
        if not self._failed:
            self._failed = True
            self._report(text, True)


def _number(value: float) -> float:
    return int(value) if isinstance(value, int) else float(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
