"""When a refresh is asked for: a table of decisions."""

import pytest

from training.refreshing.policy import Decision, RefreshPlan, decide

CLOCK = RefreshPlan(every_steps=10)
DRIFT = RefreshPlan(every_steps=10, policy="on_drift", drift_threshold=0.8, check_every_steps=4)
BOTH = RefreshPlan(every_steps=10, policy="both", drift_threshold=0.8, check_every_steps=4)
BUDGET = RefreshPlan(policy="on_drift", drift_threshold=0.8, check_every_steps=4, max_share=0.125)
PARTS = RefreshPlan(policy="on_drift", drift_threshold=0.8, check_every_steps=4, max_share=0.125, partial=0.5)


@pytest.mark.parametrize(
    ("plan", "step", "overlap", "refresh"),
    [
        (CLOCK, 10, 1.0, True),
        (CLOCK, 10, None, True),
        (CLOCK, 12, 0.1, None),
        (DRIFT, 10, 0.1, None),  # no check after this step
        (DRIFT, 12, 0.79, True),
        (DRIFT, 12, 0.8, None),
        (DRIFT, 12, None, None),
        (DRIFT, 20, 0.9, None),  # the clock does not count
        (BOTH, 10, 0.9, True),
        (BOTH, 12, 0.1, True),
        (BOTH, 12, 0.9, None),
        (BOTH, 20, 0.1, True),
        (RefreshPlan(), 10, 0.1, None),
    ],
)
def test_who_asks(plan, step, overlap, refresh):
    decision = decide(plan, step, share=0.0, num_partial=0, overlap=overlap, under_way=False)
    assert (decision.refresh if decision else None) == refresh


def test_reasons():
    assert decide(BOTH, 20, share=0.0, num_partial=0, overlap=0.1, under_way=False) == Decision(
        True, True, "refresh.every_steps=10"
    )
    why = "overlap 0.712 is below refresh.drift_threshold=0.8"
    assert decide(BOTH, 12, share=0.0, num_partial=0, overlap=0.712, under_way=False) == Decision(True, True, why)
    held = Decision(False, True, f"{why}; an earlier refresh is under way")
    assert decide(BOTH, 12, share=0.0, num_partial=0, overlap=0.712, under_way=True) == held
    assert decide(BOTH, 20, share=0.0, num_partial=0, overlap=0.712, under_way=True) == Decision(
        True, True, "refresh.every_steps=10"
    )


@pytest.mark.parametrize(
    ("plan", "step", "share", "room_from"),
    [
        (BUDGET, 4, 0.0, 8),
        (BUDGET, 8, 0.0, None),
        (BUDGET, 12, 1.0, 16),
        (BUDGET, 16, 1.0, None),
        (BUDGET, 16, 2.5, 28),
        (PARTS, 4, 0.0, None),
        (PARTS, 4, 0.5, 8),
        (PARTS, 8, 0.5, None),
        (RefreshPlan(policy="on_drift", drift_threshold=0.8, check_every_steps=4), 4, 50.0, None),
    ],
)
def test_a_refresh_waits_until_the_budget_has_room(plan, step, share, room_from):
    decision = decide(plan, step, share=share, num_partial=0, overlap=0.1, under_way=False)
    assert decision is not None
    assert decision.refresh == (room_from is None)
    if room_from is not None:
        assert decision.why.endswith(f"refresh.max_share=0.125 has room from step {room_from} on")
        later = decide(plan, -(-room_from // 4) * 4, share=share, num_partial=0, overlap=0.1, under_way=False)
        assert later is not None
        assert later.refresh


def test_what_the_clock_asks_for_is_never_withheld():
    plan = RefreshPlan(every_steps=10, policy="both", drift_threshold=0.8, check_every_steps=4, max_share=0.001)
    decision = decide(plan, 10, share=9.0, num_partial=0, overlap=0.1, under_way=True)
    assert decision is not None
    assert decision.refresh


@pytest.mark.parametrize(
    ("partial", "whole_every", "expected"),
    [
        (0.0, 5, [True] * 7),
        (0.2, 3, [False, False, True, False, False, True, False]),
        (0.2, 1, [True] * 7),
        (0.2, 0, [False] * 7),
    ],
)
def test_one_of_so_many_refreshes_is_whole(partial, whole_every, expected):
    plan = RefreshPlan(partial=partial, whole_every=whole_every)
    found, num_partial = [], 0
    for _ in expected:
        found.append(plan.is_whole(num_partial))
        num_partial = 0 if found[-1] else num_partial + 1
    assert found == expected
