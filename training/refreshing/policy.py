"""The policy of refreshes: pure decisions on when the index follows the encoder, and how much of it.

    every_steps   every `refresh.every_steps` steps, whatever the drift
    on_drift      when, at one of the checks every `refresh.check_every_steps` steps, the index's k best and the k best
                  by fresh scores overlap by less than `refresh.drift_threshold` on the probe (`drift.py`)
    both          the first is kept, and drift may ask in between

The budget `refresh.max_share` counts passages, not seconds: it is the share of the corpus that refreshes may encode per
optimiser step, averaged over the stage so far (0.02: one whole refresh every 50 steps, or one of a fifth every 10). A
count is the same on every machine and after a resume, so that a resumed run decides as the uninterrupted one. Refreshes
by the clock of `every_steps` count and are never withheld; those that drift asks for wait until they fit.

With `refresh.partial` a refresh encodes only that share of the corpus, and every `refresh.whole_every`-th is whole.
"""

from dataclasses import dataclass

POLICIES = ("every_steps", "on_drift", "both")


@dataclass(frozen=True, kw_only=True)
class RefreshPlan:
    """The settings of section `refresh` that the trainer reads."""

    every_steps: int = 0  # Number of steps from one refresh to the next; 0: none by the clock
    precision: str = "float32"
    max_staleness_steps: int = 0  # 0: training never waits for a refresh
    policy: str = "every_steps"
    drift_threshold: float = 0.0
    check_every_steps: int = 0
    max_share: float = 0.0
    probe_questions: int = 0
    partial: float = 0.0
    whole_every: int = 0

    def is_due(self, step: int) -> bool:
        """Return whether the clock asks for a refresh after optimiser step `step`."""
        return self.policy != "on_drift" and self.every_steps > 0 and step % self.every_steps == 0

    def is_checked(self, step: int) -> bool:
        """Return whether drift may ask for a refresh after optimiser step `step`."""
        return self.policy != "every_steps" and self.check_every_steps > 0 and step % self.check_every_steps == 0

    def is_whole(self, num_partial: int) -> bool:
        """Return whether the next refresh encodes all passages, after `num_partial` partial ones in a row."""
        return self.partial == 0 or (self.whole_every > 0 and num_partial >= self.whole_every - 1)


@dataclass(frozen=True)
class Decision:
    """A decision about the index after a step, with its reason."""

    refresh: bool
    whole: bool
    why: str


def decide(
    plan: RefreshPlan, step: int, *, share: float, num_partial: int, overlap: float | None, under_way: bool
) -> Decision | None:
    """Return the decision after optimiser step `step`; None if neither clock nor drift asks for a refresh.

    `share` of the corpus was encoded by this stage's refreshes so far (2.5: two and a half times). `num_partial` is the
    number of partial refreshes since the last whole one. `overlap` is that of the probe, None if it was not measured.
    `under_way` says that an earlier refresh has not been committed yet.
    """
    whole = plan.is_whole(num_partial)
    if plan.is_due(step):
        return Decision(True, whole, f"refresh.every_steps={plan.every_steps}")
    if not plan.is_checked(step) or overlap is None or overlap >= plan.drift_threshold:
        return None
    why = f"overlap {overlap:.3f} is below refresh.drift_threshold={plan.drift_threshold:g}"
    if under_way:
        return Decision(False, whole, f"{why}; an earlier refresh is under way")
    wanted = share + (1.0 if whole else plan.partial)
    if plan.max_share and wanted > plan.max_share * step * (1 + 1e-9):
        first = int(-(-wanted * (1 - 1e-9) // plan.max_share))
        return Decision(False, whole, f"{why}; refresh.max_share={plan.max_share:g} has room from step {first} on")
    return Decision(True, whole, why)
