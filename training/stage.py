"""Runs one stage in one trainer process: build, restore, train, measure, save. Every rank runs the same lines.

A `StageJob` (settings and paths, no open objects) describes the stage, so that it can be sent to a process. The caller
hands in the index service, so that the same code runs under Ray and, in tests, without it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.passages import Store
from training.checkpoint import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from training.engine.engine import Engine
from training.feeding.mixture import pretrains
from training.feeding.reference import Reference, build_reference, initial_copy
from training.job import Parts, StageJob, StageSettings
from training.loop import Hooks, LoopState, Source, publish, retriever_delay, train
from training.make_source import CorpusExamples, make_probe, make_source
from training.measuring.measures import Measures
from training.models.build import build_system, built_parts, fit_weights, parameter_groups
from training.objectives.check import needs_reference
from training.refreshing.freshness import Freshness
from training.reporting.jsonl import plain
from training.reporting.monitor import Monitor
from training.retrieving.retrieve import IndexService
from training.run_text import RunText
from training.stopped import Stopped

EVALUATION_FILE = "evaluation.json"
PENDING = "pending"  # a snapshot that is being written
SAVE_ROUND_S = 5.0  # Seconds of waiting for a snapshot between two stop points; a stop takes no longer


class Stage:
    """The objects of one trainer process, and the stage that they run."""

    def __init__(
        self,
        job: StageJob,
        service: IndexService | None,
        stream: TextIO | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Build models, engine and monitor. Collective. `stop_asked` says, without waiting, whether the stage is to
        stop; it may become true on one rank before the others."""
        torch.set_num_threads(job.threads)
        self.job, self.settings, self.service, self.run_dir = job, job.settings, service, Path(job.run_dir)
        settings = job.settings
        text = RunText.load(settings, Path(job.tokenizers))
        self.store = Store.open(job.passages, verify=False)
        if job.corpus:
            self.store = LiveStore.open_with(job.passages, job.corpus)
        self.system = build_system(
            settings.encoder,
            settings.generator,
            train=settings.training.train,
            tokenizers=text.tokenizers,
            seed=job.seed,
            objective=settings.objective,
            retrieval=settings.retrieval,
            reranker=settings.reranker,
        )
        self._built = built_parts(self.system) if job.init_from else {}
        self._initial = initial_copy(self.system) if has_reference(settings) else None
        self.reference: Reference | None = None
        self.engine = Engine(self.system, settings.engine, parameter_groups(self.system))
        self.monitor = Monitor(
            self.run_dir,
            settings.monitor,
            run_config=job.config,
            total_steps=settings.training.steps,
            rank=self.engine.rank,
            stream=stream,
        )
        self.state = LoopState()
        self.source: Source | None = None
        self.parts = Parts(
            job,
            self.store,
            system=self.system,
            text=text,
            engine=self.engine,
            service=service,
            monitor=self.monitor,
            stop_asked=stop_asked,
        )
        self.corpus = CorpusExamples(self.parts) if pretrains(settings.pretraining) else None
        self.measures = Measures(self.parts, self.corpus)
        self.freshness: Freshness | None = None

    # ---------------------------------------------------------------- the stage, in order

    def run(self) -> dict[str, Any]:
        """Train to the last step, measure and save. Return the measurements. Raises what the loop raises, and Stopped
        after a checkpoint if the stage was asked to stop."""
        with self.monitor:
            try:
                return self._run()
            except Stopped:
                if self.source is not None:
                    self.save(self.state)
                    self.monitor.message(f"stopped at step {self.state.step}, which is saved")
                self.monitor.event("stopped", step=self.state.step)
                raise

    def _run(self) -> dict[str, Any]:
        job, settings = self.job, self.settings
        loader_state = self.restore()
        self.reference = self.make_reference(resumes=loader_state is not None)
        self.serve_index(fresh=not job.index_from_snapshot)
        if settings.training.steps > self.state.step:
            self.source = self.make_source(loader_state)
            self.freshness = self.make_freshness(loader_state)
            begin = time.monotonic()
            train(
                settings.training,
                settings.objective,
                engine=self.engine,
                source=self.source,
                service=self.service,
                monitor=self.monitor,
                state=self.state,
                hooks=self.hooks(),
            )
            self.monitor.message(f"trained to step {self.state.step} in {time.monotonic() - begin:.0f} s")
        if self.parts.retriever_trains and self.state.step:
            self.serve_index(fresh=self.state.published_whole != self.state.step)
        return self.finish()

    def restore(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint of this run, else the weights of `init_from`; else the models stay as
        built. Return the state of the source of batches, None if nothing is resumed. Collective."""
        job, settings = self.job, self.settings
        torch.manual_seed(job.seed * 1000 + self.engine.rank)
        found = self.engine.broadcast_object(self._newest() if self.engine.rank == 0 else None)
        if found is not None and settings.training.train != "none":
            state, rank_state = load_checkpoint(Path(found), self.engine)
            # This index service has no weights yet.
            evaluated = {"evaluated": state["loop"]["step"]}  # earlier versions evaluated, but did not note it
            self.state = LoopState(**evaluated | state["loop"] | {"published": -1, "published_whole": -1})
            set_rng_state(rank_state["rng"])
            self.monitor.message(f"resumes from {found} at step {self.state.step}")
            self.monitor.event("resumed", checkpoint=found, step=self.state.step)
            return rank_state["source"]
        if job.init_from:
            weights = self._start_weights() if self.engine.rank == 0 else {}
            self.engine.load_consolidated(weights)
            self.monitor.message(f"starts from {job.init_from}")
        return None

    def _start_weights(self) -> dict[str, torch.Tensor]:
        built, self._built = self._built, {}
        return fit_weights(load_weights(Path(self.job.init_from)), self.system, built)

    def make_reference(self, resumes: bool) -> Reference | None:
        """Return the system at this stage's start, which alignment compares with; None if it does not. Collective."""
        if not has_reference(self.settings):
            return None
        initial, self._initial = self._initial, None
        offload, init_from = self.settings.alignment.reference == "offload", self.job.init_from
        return build_reference(
            self.engine, initial, offload=offload, init_from=init_from, run_dir=self.run_dir, resumes=resumes
        )

    def serve_index(self, fresh: bool) -> None:
        """Wait until an index generation serves; if `fresh`, publish the present weights first. Collective."""
        if self.service is None:
            return
        if fresh:
            publish(self.engine, self.service, state=self.state, precision=self.settings.refresh.precision)
        begin = time.monotonic()

        def report(encoded: int, doing: str) -> None:
            if doing:
                self.parts.progress(f"index: {doing}")
            elif encoded:
                rate = encoded / (time.monotonic() - begin)
                left_s = max(0, len(self.store) - encoded) / rate
                self.parts.progress(f"index: {encoded}/{len(self.store)} passages, {rate:.0f}/s, {left_s:.0f} s left")

        version, stop = max(0, self.state.published), self.parts.stop_asked
        self.service.wait_for_version(version, self.job.wait_timeout_s, report, stop=stop)
        self.parts.stop_point()
        waited = f"step {self.state.step}, {time.monotonic() - begin:.1f} s"
        self.monitor.message(f"index of {self.service.num_passages} passages serves ({waited})")

    def make_source(self, loader_state: dict[str, Any] | None) -> Source:
        """Return the micro-batches, from where the checkpoint stood."""
        return make_source(self.parts, self.corpus, self.reference, loader_state)

    def make_freshness(self, loader_state: dict[str, Any] | None) -> Freshness | None:
        """Return the refreshes of the index during training; None if the passage encoder does not train. Collective."""
        if self.service is None or not self.parts.retriever_trains:
            return None
        plan = self.settings.refresh
        probe = make_probe(self.parts, self.corpus) if plan.probe_questions else None
        fixed_until = retriever_delay(self.settings.training)
        freshness = Freshness(
            plan,
            self.engine,
            service=self.service,
            monitor=self.monitor,
            probe=probe,
            num_numbers=len(self.store),
            fixed_until=fixed_until,
        )
        freshness.begin(self.state, (loader_state or {}).get("freshness"))
        return freshness

    def hooks(self) -> Hooks:
        """Return the tasks of the loop between steps."""
        job, settings, trains = self.job, self.settings, self.parts.retriever_trains
        watched = self.measures.watch(self.state) is not None
        return Hooks(
            evaluate=self.measures.briefly if self.measures.any_while_training else None,
            evaluate_every=settings.evaluation.every_steps,
            save=self.save,
            save_every=settings.checkpoint.every_steps,
            refresh=self.freshness.after_step if self.freshness is not None else None,
            max_staleness_steps=settings.refresh.max_staleness_steps if trains else 0,
            passages_fixed=not trains,
            wait_timeout_s=job.wait_timeout_s,
            stop_point=self.parts.stop_point,
            stop_asked=self.parts.stop_asked,
            numbers=self._numbers if self.parts.has_lexical_weight else None,
            watch=(lambda metrics: self.measures.after_step(self.state.step, metrics)) if watched else None,
        )

    def finish(self) -> dict[str, Any]:
        """Evaluate the whole split, save, and write the measurements. Return them."""
        result: dict[str, Any] = {"step": self.state.step, "fingerprint": self.job.fingerprint}
        result |= {"source": self.settings.retrieval.source}
        result |= {"train_seconds": self.state.seconds, "blocked_steps": self.state.blocked_steps}
        result |= self.measures.finally_(self.state.step)
        if self.service is not None:
            result["generations_committed"] = self.service.status().generations_committed
        self._await_index_on_disk()
        if self.source is not None:
            self.save(self.state)
        if self.engine.rank == 0:
            self.monitor.summary(result["metrics"])
            partial = self.run_dir / f".{EVALUATION_FILE}"
            partial.write_text(json.dumps(plain(result), indent=1), encoding="utf-8")
            partial.rename(self.run_dir / EVALUATION_FILE)
        self.engine.barrier()
        return result

    # ---------------------------------------------------------------- parts

    def save(self, state: LoopState) -> None:
        """Write a checkpoint, which names the newest index generation on disk and waits for none. Collective."""
        assert self.source is not None
        generation, current = self._index_on_disk()
        save_checkpoint(
            self.run_dir,
            state.step,
            engine=self.engine,
            state={
                "loop": asdict(state),
                "generation": generation,
                "index_is_current": current,
                "fingerprint": self.job.fingerprint,
            },
            rank_state={"source": self.source.state() | self._freshness_state(), "rng": rng_state()},
            keep=self.settings.checkpoint.keep,
            files={"tokenizers": Path(self.job.tokenizers)},
        )
        self.monitor.event("checkpoint", step=state.step, generation=generation)

    def _freshness_state(self) -> dict[str, Any]:
        state = self.freshness.state() if self.freshness is not None else None
        return {} if state is None else {"freshness": state}

    def _numbers(self) -> dict[str, float]:
        return {"retrieval/lexical_weight": self.parts.lexical_weight()}

    def _index_on_disk(self) -> tuple[int, bool]:
        """Return the number of the newest generation on disk, which is kept, and whether the present passage encoder
        made it; -1 if there is none. Only rank 0 asks. It waits for no snapshot, because other ranks could not bound
        that wait."""
        if self.service is None or not self.settings.checkpoint.index or self.engine.rank:
            return -1, False
        status = self.service.status()
        generation = self.service.keep_newest()
        if generation != status.generation:
            self.monitor.event("checkpoint_names_older_index", generation=generation, serving=status.generation)
        trains, newest = self.parts.retriever_trains, generation == status.generation
        current = generation >= 0 and (not trains or (newest and status.oldest == self.state.step))
        return generation, current and self.settings.refresh.precision == "float32"

    def _await_index_on_disk(self) -> None:
        """Wait until the serving generation is on disk. All ranks wait in rounds, so that none stands in a collective
        for as long as a large index takes. A full disk costs the snapshot, not the run. Collective."""
        if self.service is None or not self.settings.checkpoint.index:
            return
        generation, begin = self.service.status().generation, time.monotonic()
        heard = begin  # of a shard that is at it
        while True:
            failure = self.engine.broadcast_object(self._save_failure(generation) if self.engine.rank == 0 else None)
            if failure is None:
                return
            now, doing = time.monotonic(), self.service.status().doing
            heard = now if doing else heard
            waited_s = now - begin
            late = self.engine.any_rank(now - heard > self.job.wait_timeout_s)
            if failure != PENDING or late:
                why = f"it is not there after {waited_s:.0f} s" if failure == PENDING else failure
                self.monitor.message(f"index generation {generation} was not saved, a resume will encode again: {why}")
                self.monitor.event("index_save_failed", generation=generation, message=why)
                return
            writing = doing or f"{waited_s:.0f} s"
            self.parts.after_batch(f"index generation {generation} is being written: {writing}")

    def _save_failure(self, generation: int) -> str | None:
        """Return None if the generation is on disk, PENDING if it is being written, else the reason why it cannot
        be."""
        assert self.service is not None
        try:
            self.service.save_generation(generation, SAVE_ROUND_S)
        except TimeoutError:
            return PENDING
        except OSError as error:
            return str(error)
        return None

    def _newest(self) -> str | None:
        found = newest_checkpoint(self.run_dir, self.monitor.message)
        return str(found) if found is not None else None


def has_reference(settings: StageSettings) -> bool:
    """Return whether the stage trains by an objective that compares with the system at its start."""
    trains = settings.training.train != "none" and settings.training.steps > 0
    return trains and needs_reference(settings.objective) and settings.alignment.reference != "none"
