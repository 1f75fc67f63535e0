"""The trainer's side of a refresh: measures drift, decides, and hands out the encoder for the whole index or a part.

After each optimiser step the loop calls `after_step`, on every rank. Where the plan looks at the index after this step,
the probe is measured (collective, waits for one search), rank 0 decides and tells the others, and the weights are
gathered and published, which returns at once. Every decision is an event with its reason: `refresh_triggered` or
`refresh_withheld`.
"""

from collections.abc import Sequence
from typing import Any

from training.engine.engine import Engine
from training.loop import Fetched, LoopState, publish
from training.refreshing.drift import Drift, DriftProbe
from training.refreshing.heat import Heat
from training.refreshing.policy import Decision, RefreshPlan, decide
from training.reporting.monitor import Monitor, Timer
from training.retrieving.retrieve import IndexService


class Freshness:
    """Keeps the index as fresh as the plan says."""

    def __init__(
        self,
        plan: RefreshPlan,
        engine: Engine,
        *,
        service: IndexService,
        monitor: Monitor,
        probe: DriftProbe | None = None,
        num_numbers: int = 0,
        fixed_until: int = 0,
    ) -> None:
        """`probe` None measures no drift. `num_numbers` is the number of passage numbers given so far, of which a
        filter may let the index return fewer (0: the index has them all). Up to step `fixed_until` the encoders do not
        change, and no refresh is asked for."""
        self.plan, self.engine, self.service, self.monitor, self.probe = plan, engine, service, monitor, probe
        self._num_numbers, self._fixed_until = num_numbers or service.num_passages, fixed_until
        self.heat = Heat(self._num_numbers, engine) if plan.partial else None
        self._failures = 0  # Number of failed refreshes when the newest one was asked for

    def begin(self, state: LoopState, saved: dict[str, Any] | None = None) -> None:
        """Prepare for training, which begins or goes on from a checkpoint that `saved` comes from, once an index
        serves. Collective."""
        if self.heat is not None:
            encoded_now = state.step if state.published == state.step else None
            if saved is not None:
                self.heat.restore(saved, encoded_now)
            else:
                version = self.service.status().weights_version if encoded_now is None else encoded_now
                self.heat = Heat(self._num_numbers, self.engine, max(0, version))
        if self.probe is not None:
            self.probe.measure()
            self.probe.remember()

    def after_step(self, state: LoopState, fetched: Sequence[Fetched], timer: Timer) -> dict[str, float]:
        """Look at the index if the plan says so, and ask for a refresh if it is time. Return the measurements.
        `fetched` are this rank's micro-batches of the step. Collective."""
        if self.heat is not None:
            for one in fetched:
                if one.passages is not None:
                    self.heat.read(one.passages)
        if state.step <= self._fixed_until or not (self.plan.is_due(state.step) or self.plan.is_checked(state.step)):
            return {}
        drift = None
        if self.probe is not None:
            with timer.measure("drift"):
                drift = self.probe.measure()
        with timer.measure("publish"):
            mine = self._decide(state, drift) if self.engine.rank == 0 else None
            decision: Decision | None = self.engine.broadcast_object(mine)
            if decision is not None and decision.refresh:
                self._refresh(state, decision, drift)
            elif decision is not None:
                self._note("refresh_withheld", state, decision, drift)
        metrics = drift.metrics() if drift is not None else {}
        return metrics | {"index/refreshed_share": state.refreshed_share}

    def state(self) -> dict[str, Any] | None:
        """Return this rank's part of a checkpoint, beside that in `LoopState`."""
        return self.heat.state() if self.heat is not None else None

    # ---------------------------------------------------------------- inside

    def _decide(self, state: LoopState, drift: Drift | None) -> Decision | None:
        status = self.service.status()
        # A failed refresh may never be repeated; newer weights then serve as well as another attempt.
        under_way = status.weights_version < state.published and status.failures == self._failures
        overlap = drift.overlap if drift is not None else None
        return decide(
            self.plan,
            state.step,
            share=state.refreshed_share,
            num_partial=state.partial_refreshes,
            overlap=overlap,
            under_way=under_way,
        )

    def _refresh(self, state: LoopState, decision: Decision, drift: Drift | None) -> None:
        only = None
        if self.heat is not None:
            status = self.service.status()
            self.heat.gather(status.weights_version)
            if self.engine.rank == 0:
                only = None if decision.whole else self.heat.choose(self.plan.partial, state.step)
                self.heat.ask(state.step, only)
        share = 1.0 if decision.whole else self.plan.partial
        self._note("refresh_triggered", state, decision, drift, share=share)
        self._failures = self.service.status().failures
        publish(self.engine, self.service, state=state, precision=self.plan.precision, whole=decision.whole, only=only)
        state.refreshed_share += share
        state.partial_refreshes = 0 if decision.whole else state.partial_refreshes + 1
        if self.probe is not None:
            self.probe.remember()

    def _note(self, event: str, state: LoopState, decision: Decision, drift: Drift | None, **fields: Any) -> None:
        if drift is not None:
            fields["overlap"] = round(drift.overlap, 4)
        self.monitor.event(event, step=state.step, why=decision.why, **fields)
