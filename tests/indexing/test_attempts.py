"""Attempts: how many there are, and what lies between them."""

import itertools
import time

from indexing.attempts import Attempts


def test_attempts_end_before_the_deadline_and_pauses_double() -> None:
    begin = time.monotonic()
    moments = [time.monotonic() - begin for _ in Attempts(0.1, first_s=0.01, longest_s=0.02)]
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert pauses[0] >= 0.01
    assert all(pause >= 0.02 for pause in pauses[1:])


def test_one_attempt_is_made_without_time() -> None:
    assert list(Attempts(0.0)) == [0]


def test_a_number_of_attempts_without_pauses() -> None:
    attempts = Attempts(most=3, first_s=1000.0)
    seen = []
    for attempt in attempts:
        seen.append(attempt)
        attempts.skip_pause()
    assert seen == [0, 1, 2]


def test_progress_extends_the_deadline() -> None:
    attempts, count = Attempts(0.05, first_s=0.02, longest_s=0.02), 0
    for attempt in attempts:
        count = attempt
        if attempt < 5:
            attempts.extend()
    assert count >= 5
