"""Trains: one loop for pretraining, fine-tuning and alignment, which differ in data, objective and trained parts.

One trainer process runs `train`. It gets an engine (collectives, weights), an index service (hits now, a newer index
later), a source of batches and a monitor; it knows none of their machinery.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from indexing.dense.probe import Figures
from training.engine.engine import Engine
from training.models.model_inputs import ContrastBatch, RetrievalBatch
from training.models.parts.weights import to_numpy
from training.models.system import System
from training.objectives.dispatch import compute, needs
from training.reporting.monitor import Monitor, Timer, memory_metrics
from training.retrieving.retrieve import IndexService, IndexStatus
from training.training_settings import ObjectiveConfig, TrainingConfig


@dataclass(kw_only=True)
class Fetched:
    """One micro-batch on its device, with facts about the hits in it."""

    batch: RetrievalBatch | ContrastBatch
    num_questions: int
    search_wait_s: float = 0.0
    generation: int | None = None
    weights_version: int = 0
    gold_in_k: float = 0.0  # Share of questions with a labelled passage among the K
    rescore_s: float = 0.0
    rescore_overlap: float | None = None  # see training/retrieving/rescore.py
    passages: np.ndarray | None = None  # int64 [any]: numbers of the passages that are read, -1 for none
    # Weights version of each hit's vector if a generation mixes them; None: all are of `weights_version`
    hit_versions: np.ndarray | None = None


class Source(Protocol):
    """A supply of micro-batches; its position is part of the checkpoint."""

    def next(self) -> Fetched:
        """Return the next micro-batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the values that `next` needs to go on after a restart as if nothing had happened."""
        ...


@dataclass(kw_only=True)
class LoopState:
    """The position of the loop; saved whole with every checkpoint."""

    step: int = 0  # Number of optimiser steps done
    evaluated: int = -1  # Step of the newest evaluation during training; -1: there was none
    published: int = -1  # Newest weights version that was handed out
    published_whole: int = -1  # Newest weights version that all passages were to be encoded with
    refreshed_share: float = 0.0  # Share of the corpus that this stage's refreshes were asked to encode, summed
    partial_refreshes: int = 0  # Number of partial refreshes since the last whole one
    skipped_steps: int = 0  # Number of updates left out because something was not finite
    seconds: float = 0.0  # Seconds of training, over all attempts
    blocked_steps: int = 0  # Number of steps that waited because of refresh.max_staleness_steps
    # Retrieval at the stage's start, see training/measuring/collapse.py
    start: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Hooks:
    """The tasks of the loop besides training. Each is a plain function that does one thing; None if the stage has no
    such task."""

    evaluate: Callable[[int], None] | None = None
    evaluate_every: int = 0
    save: Callable[[LoopState], None] | None = None
    save_every: int = 0
    # Sees every step and its batches, asks for refreshes of the index, returns its measurements
    # (training/refreshing/freshness.py)
    refresh: Callable[[LoopState, Sequence[Fetched], Timer], dict[str, float]] | None = None
    max_staleness_steps: int = 0
    passages_fixed: bool = False  # the passage encoder does not train: hits are never stale
    wait_timeout_s: float = 600.0
    stop_point: Callable[[], None] | None = None  # raises Stopped between two steps; collective
    stop_asked: Callable[[], bool] = lambda: False  # ends a wait early; a stop point follows
    numbers: Callable[[], dict[str, float]] | None = None  # more metrics of a logged step; called on every rank
    watch: Callable[[dict[str, float]], None] | None = None  # sees the metrics of every step; may end the run


@dataclass
class Window:
    """Sums over the micro-batches of one optimiser step."""

    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    fetched: list[Fetched] = field(default_factory=list)

    def add(self, fetched: Fetched, stats: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch to the sums."""
        self.fetched.append(fetched)
        for name, value in stats.items():
            self.stats[name] = self.stats.get(name, torch.zeros((), device=value.device)) + value

    def means(self) -> dict[str, float]:
        """Return means over the micro-batches, with one transfer from the device."""
        names = list(self.stats)
        values = torch.stack([self.stats[name].float() for name in names]).tolist() if names else []
        return {name: value / len(self.fetched) for name, value in zip(names, values, strict=True)}


def train(
    config: TrainingConfig,
    objective: ObjectiveConfig,
    *,
    engine: Engine,
    source: Source,
    service: IndexService | None,
    monitor: Monitor,
    state: LoopState,
    hooks: Hooks,
) -> LoopState:
    """Run optimiser steps `state.step + 1 .. config.steps`; the caller evaluates and saves after the last one. Raises
    FloatingPointError when updates are not finite `config.stop_after_nonfinite` times in a row, TimeoutError when a
    bounded wait ends, Stopped between two steps, after which `state` is as good as after any step."""
    needed = needs(objective)
    engine.module.train()
    timer, window, resumed_at, begin = Timer(), Window(), state.step, 0.0
    while state.step < config.steps:
        # Between steps: stop, evaluate, save.
        if not window.fetched:
            _between_steps(state, hooks, timer=timer, resumed_at=resumed_at)
            begin = time.perf_counter()

        # The next micro-batch, searched while the last one trained.
        with timer.measure("fetch"):
            fetched = source.next()

        # Forward, objective, backward, step.
        with timer.measure("forward"):
            outputs = engine(System.outputs, fetched.batch, needed, objective.temperature)
            loss, stats = compute(objective, outputs)
        with timer.measure("backward"):
            engine.backward(loss)
        rates = learning_rates(config, state.step)
        with timer.measure("optimizer"):
            result = engine.step(rates)
        window.add(fetched, {"loss/total": loss.detach(), **stats})
        if not result.at_boundary:
            continue
        state.step += 1
        state.skipped_steps += not result.updated

        # Hand out the encoder if it is time; the index follows by itself.
        drift = hooks.refresh(state, window.fetched, timer) if hooks.refresh is not None else {}
        _wait_if_stale(service, state, hooks=hooks, monitor=monitor, fixed_until=retriever_delay(config))

        # Log.
        times, status = step_times(timer, begin), service.status() if service is not None else None
        metrics = step_metrics(window, state, times=times, status=status, fixed_until=retriever_delay(config)) | drift
        if hooks.passages_fixed and "index/staleness_steps" in metrics:
            metrics |= {"index/staleness_steps": 0, "index/staleness_max_steps": 0}
        state.seconds += metrics["time/step_s"]
        if state.step % config.log_every == 0 or state.step == config.steps or not result.updated:
            metrics |= optimizer_metrics(result.grad_norm, rates)
            metrics |= hooks.numbers() if hooks.numbers is not None else {}
            monitor.log(metrics, state.step)
        if hooks.watch is not None:
            hooks.watch(metrics)
        window = Window()
        _check_finite(config, state, result.skipped_in_a_row)
    return state


def publish(
    engine: Engine,
    service: IndexService,
    *,
    state: LoopState,
    precision: str,
    whole: bool = True,
    only: np.ndarray | None = None,
) -> None:
    """Gather the passage encoder (collective), hand it out from rank 0, and go on. If the refresh is not `whole`, it
    encodes the passages `only`, which rank 0 names."""
    weights = engine.consolidated_state("retriever.passage_encoder")
    if engine.rank == 0:
        service.publish(state.step, to_numpy(weights, precision), only)
    state.published = state.step
    if whole:
        state.published_whole = state.step


def _between_steps(state: LoopState, hooks: Hooks, *, timer: Timer, resumed_at: int) -> None:
    """Stop if that was asked for; evaluate and save if it is time. The tasks of step `resumed_at`, done before an
    interruption, are not repeated."""
    if hooks.stop_point is not None:
        hooks.stop_point()
    evaluates = hooks.evaluate_every and state.step % hooks.evaluate_every == 0
    if hooks.evaluate is not None and evaluates and state.evaluated < state.step:
        with timer.measure("evaluate"):
            hooks.evaluate(state.step)
        state.evaluated = state.step
    if state.step == resumed_at > 0:
        return
    if hooks.save is not None and hooks.save_every and state.step and state.step % hooks.save_every == 0:
        with timer.measure("save"):
            hooks.save(state)


def _check_finite(config: TrainingConfig, state: LoopState, skipped_in_a_row: int) -> None:
    """Raise FloatingPointError if too many updates in a row were not finite."""
    if skipped_in_a_row >= config.stop_after_nonfinite:
        raise FloatingPointError(
            f"loss or gradient was not finite in {skipped_in_a_row} steps in a row (step {state.step}); no such update "
            f"was applied. Lower training.lr_retriever or training.lr_generator, or set engine.precision=fp32; "
            f"training.stop_after_nonfinite={config.stop_after_nonfinite}"
        )


def _wait_if_stale(
    service: IndexService | None, state: LoopState, *, hooks: Hooks, monitor: Monitor, fixed_until: int
) -> None:
    """Wait until no passage's vector is older than `refresh.max_staleness_steps` allows. Training waits for a refresh
    here and nowhere else. After partial refreshes the passage that was encoded longest ago decides, and a whole refresh
    is awaited. Up to step `fixed_until` no vector ages."""
    if service is None or not hooks.max_staleness_steps:
        return
    oldest = state.step - hooks.max_staleness_steps
    if oldest <= fixed_until or service.status().oldest >= oldest:
        return
    monitor.message(f"step {state.step}: waits for an index of step {oldest} or newer (refresh.max_staleness_steps)")
    state.blocked_steps += 1
    service.wait_for_version(oldest, hooks.wait_timeout_s, stop=hooks.stop_asked)
    if service.status().oldest < oldest:  # a partial refresh came
        service.wait_for_version(state.published_whole, hooks.wait_timeout_s, stop=hooks.stop_asked)


def step_times(timer: Timer, begin: float) -> dict[str, float]:
    """Return seconds of the step begun at `begin` (time.perf_counter), of its parts, and of the tasks before it."""
    parts = {f"time/{name}_s": seconds for name, seconds in timer.pop().items()}
    return {"time/step_s": time.perf_counter() - begin, **parts}


def step_metrics(
    window: Window, state: LoopState, *, times: dict[str, float], status: IndexStatus | None, fixed_until: int = 0
) -> dict[str, float]:
    """Return all metrics of one optimiser step, by key. Up to step `fixed_until` the encoders did not change."""
    fetched, seconds = window.fetched, times["time/step_s"]
    waited = sum(f.search_wait_s for f in fetched)
    metrics = window.means()
    metrics |= {
        "perf/questions_per_s": sum(f.num_questions for f in fetched) / seconds,
        "perf/tokens_per_s": sum(f.batch.num_tokens for f in fetched) / seconds,
        "optim/skipped_steps": state.skipped_steps,
        **times,
        **memory_metrics(),
    }
    used = [f for f in fetched if f.generation is not None]
    rescored = [f for f in used if f.rescore_overlap is not None]
    if rescored:
        metrics |= {
            "retrieval/rescore_s": sum(f.rescore_s for f in rescored),
            "retrieval/rescore_overlap": sum(f.rescore_overlap or 0.0 for f in rescored) / len(rescored),
        }
    if used:
        mean_version, oldest_version = _versions(used)
        metrics |= {
            "time/search_wait_s": waited,
            "time/search_wait_share": waited / seconds,
            "retrieval/gold_in_k": sum(f.gold_in_k for f in used) / len(used),
            "index/generation": max(f.generation or 0 for f in used),
            "index/staleness_steps": max(0.0, state.step - 1 - max(mean_version, fixed_until)),
            "index/staleness_max_steps": max(0, state.step - 1 - max(oldest_version, fixed_until)),
            "index/blocked_steps": state.blocked_steps,
        }
    if status is not None:
        metrics |= {
            "index/generations_committed": status.generations_committed,
            "index/refresh_s": status.refresh_seconds,
            "index/refresh_failures": status.failures,
            "index/slow": status.slow,
            "index/hedged": status.hedged,
            "index/refused": status.refused,
            "perf/refresh_passages_per_s": status.refresh_passages_per_s,
            **index_metrics(status.figures),
        }
    return metrics


def optimizer_metrics(grad_norm: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, float]:
    """Return gradient norms and learning rates of the parameter groups, by metric key."""
    metrics = {f"optim/grad_norm_{name}": norm for name, norm in grad_norm.items()}
    return metrics | {f"optim/lr_{name}": rate for name, rate in rates.items()}


def _versions(used: Sequence[Fetched]) -> tuple[float, int]:
    """Return the mean and the oldest weights version over the hits, each of which may have another one."""
    versions = [np.array([f.weights_version]) if f.hit_versions is None else f.hit_versions for f in used]
    means, oldest = [float(np.mean(v)) for v in versions], [int(np.min(v)) for v in versions]
    return sum(means) / len(means), min(oldest)


def index_metrics(figures: Figures) -> dict[str, float]:
    """Return the costs and the recall of the newest generation, as far as they are known."""
    known = {"index/bytes_per_passage": figures.bytes_per_passage, "index/build_s": figures.build_s}
    metrics = {} if not figures.bytes_per_passage else known
    return metrics if figures.recall is None else {**metrics, "index/recall": figures.recall}


def retriever_delay(config: TrainingConfig) -> int:
    """Return the number of optimiser steps in which the generator learns alone. The encoders do not change in these
    steps, so that the index is not stale."""
    return config.retriever_delay_steps if config.train in ("both", "query_only") else 0


def learning_rates(config: TrainingConfig, step: int) -> dict[str, float]:
    """Return the learning rate of each group in optimiser step `step + 1`. It warms up linearly, then falls linearly to
    zero or stays; if both groups train, the retriever's begins after `training.retriever_delay_steps`."""
    delay = retriever_delay(config)
    return {
        "retriever": config.lr_retriever * _schedule(config, step - delay, config.steps - delay),
        "generator": config.lr_generator * _schedule(config, step, config.steps),
    }


def _schedule(config: TrainingConfig, step: int, steps: int) -> float:
    """Return the share of the learning rate in step `step + 1` of `steps`; 0 before the first."""
    if step < 0:
        return 0.0
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "linear":
        return max(0.0, (steps - step) / max(1, steps - config.warmup_steps))
    return 1.0
