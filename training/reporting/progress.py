"""Turns metrics into the console's lines: at most one for a step, with the time left."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

INTERVAL_S = 5.0  # Seconds between two lines of a log file, which stays short enough to read
TERMINAL_INTERVAL_S = 1.0  # Seconds between two lines on a terminal, where somebody watches
WINDOW = 30  # Number of logged steps that the remaining time is estimated from
EVALUATION_KEYS = ("recall@1", "recall@5", "recall@20", "exact_match", "f1", "preference_accuracy")


class Progress:
    """Turns metrics into lines for `stream`; steps that follow each other too quickly are left out."""

    def __init__(self, total_steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._interval_s = TERMINAL_INTERVAL_S if stream.isatty() else INTERVAL_S
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._last_line_at = float("-inf")
        self._recall: float | None = None

    def line(self, metrics: Mapping[str, float], step: int) -> str | None:
        """Return the line for these metrics, or None if it is too early for one."""
        evaluation = self._evaluation_line(metrics, step)
        if not any(not key.startswith("eval/") for key in metrics):
            return evaluation
        now = self._clock()
        if not self._times or step > self._times[-1][0]:
            self._times.append((step, now))
        if now - self._last_line_at < self._interval_s and step != self._total_steps:
            return evaluation
        self._last_line_at = now
        return self._step_line(metrics, step)

    def seconds_left(self, step: int) -> float | None:
        """Return an estimate of the seconds left, from the last steps; None before two steps are known."""
        if not self._times:
            return None
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step == first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self._total_steps - step, 0)

    def _step_line(self, metrics: Mapping[str, float], step: int) -> str:
        parts = [f"step {step}/{self._total_steps}"]
        if "loss/total" in metrics:
            parts.append(f"loss {metrics['loss/total']:.3f}")
        if self._recall is not None:
            parts.append(f"recall@1 {share(self._recall)}")
        elif "retrieval/gold_in_k" in metrics:
            parts.append(f"gold in k {share(metrics['retrieval/gold_in_k'])}")
        if "perf/questions_per_s" in metrics:
            parts.append(f"{metrics['perf/questions_per_s']:.1f} q/s")
        if "index/generation" in metrics:
            stale = metrics.get("index/staleness_steps")
            note = "" if stale is None else f" (stale {stale:.0f})"
            parts.append(f"gen {metrics['index/generation']:.0f}{note}")
        seconds = self.seconds_left(step)
        if seconds is not None and step < self._total_steps:
            parts.append(f"{duration(seconds)} left")
        return "  ".join(parts)

    def _evaluation_line(self, metrics: Mapping[str, float], step: int) -> str | None:
        parts: dict[str, list[str]] = {}
        for key, value in metrics.items():
            group, _, name = key.rpartition("/")
            if key.startswith("eval/") and name in EVALUATION_KEYS:
                parts.setdefault(group.removeprefix("eval/"), []).append(f"{name} {share(value)}")
                self._recall = value if name == "recall@1" else self._recall
        if not parts:
            return None
        return f"step {step}/{self._total_steps}  " + "  ".join(
            f"{group}: {'  '.join(found)}" for group, found in parts.items()
        )


def share(value: float) -> str:
    """Return a number between 0 and 1 with two digits and without the leading zero: `.83`."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def duration(seconds: float) -> str:
    """Return the time as `45s`, `1m20s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
