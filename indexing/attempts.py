"""Tries something again that another process may not be ready for, with pauses in between and a deadline."""

import math
import time
from collections.abc import Iterator

FIRST_S, LONGEST_S = 0.02, 0.5  # s, pauses: long enough for an answer over the network, short beside a refresh


class Attempts:
    """An iterable of the numbers of attempts: `for attempt in Attempts(5.0)`.

    Between two attempts it sleeps: `first_s`, then twice as long each time, `longest_s` at most. It ends when the next
    pause would end after the deadline, which lies `timeout_s` after the construction, or after `most` attempts. The
    code behind the loop says what was not to be had.
    """

    def __init__(
        self,
        timeout_s: float = math.inf,
        *,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        most: float = math.inf,
    ) -> None:
        self.timeout_s = timeout_s
        self._first_s, self._longest_s, self._most = first_s, longest_s, most
        self._at_once = False
        self.extend()

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline, 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    def extend(self) -> None:
        """Set the deadline to `timeout_s` from now: there was progress."""
        self.deadline = time.monotonic() + self.timeout_s

    def skip_pause(self) -> None:
        """Let the next attempt follow at once, whatever the deadline is."""
        self._at_once = True

    def __iter__(self) -> Iterator[int]:
        attempt, pause_s = 0, self._first_s
        while attempt < self._most:
            self._at_once = False
            yield attempt
            attempt += 1
            if self._at_once:
                continue
            if self.left_s < pause_s:
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self._longest_s)
