"""One stage in one trainer process: build, restore, train, measure, save. Every rank runs the same lines.

The stage is described by a `StageJob` (sections and places, no objects), so that it can be sent to a process; the index
service is handed in, so that the same code runs under Ray and, in tests, without it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from indexing.duplicates import open_groups
from indexing.questions import QuestionStore
from indexing.settings import QuestionsConfig
from indexing.store import Store
from training.alignment import PairCollator, aligned, make_collator
from training.answers import MORE_FOR_REFUSALS, TrainingAnswers
from training.checkpoint import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from training.collapse import Collapsed, CollapseDetector
from training.data import ClozeSource, Collator, Stream
from training.engine import Engine
from training.evaluate import Evaluation, Evaluator, encode_questions
from training.held_out import HeldOut
from training.jsonl import append_line, plain
from training.long_context import LongContext, LongContextBatches
from training.loop import Hooks, LoopState, Source, publish, train
from training.mixture import pretrains
from training.models.build import build_system, fit_weights, parameter_groups
from training.models.sides import generator_answer_side
from training.models.tokenizers import load_tokenizer, pad_id, to_text
from training.monitor import Monitor
from training.needle import check_needle, needle_sweep
from training.objectives.check import PREFERENCE, needs_reference, samples_answers
from training.objectives.choose import needs
from training.preferences import PreferenceEvaluator
from training.pretraining import (
    HELD_OUT,
    HELD_OUT_SEED,
    TRAINING,
    CorpusQuestions,
    FairSearch,
    example_sides,
    split_passages,
)
from training.reference import Reference, build_reference, initial_copy
from training.retrieve import IndexService, Prefetcher
from training.settings import (
    AlignmentConfig,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    MonitorConfig,
    ObjectiveConfig,
    PretrainingConfig,
    RetrievalConfig,
    TrainingConfig,
)
from training.sources import ClosedBookBatches, ClozeBatches, RetrievedBatches

EVALUATION_FILE, PREDICTIONS_FILE, PAIRS_FILE = "evaluation.json", "predictions.jsonl", "preferences.jsonl"
PROGRESS_EVERY_S = 5.0


@dataclass
class StageJob:
    """Everything that a trainer process needs to know."""

    run_dir: str
    passages: str  # store of the corpus
    train_questions: str  # store (of judged answers for preference objectives), or "" where none are trained on
    evaluate_questions: str  # store, or "" where nothing is evaluated
    tokenizers: str  # folder of retriever/ and generator/
    init_from: str  # checkpoint whose weights the stage starts from, or ""
    seed: int
    threads: int
    fingerprint: str  # of the settings: which evaluation belongs to which
    encoder: EncoderConfig
    generator: GeneratorConfig
    objective: ObjectiveConfig
    retrieval: RetrievalConfig
    training: TrainingConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    monitor: MonitorConfig
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    duplicates: str = ""  # groups of near-duplicates, where the stage pretrains on the corpus
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)  # which answers are trained on
    publish_every: int = 0
    publish_precision: str = "float32"
    max_staleness_steps: int = 0
    wait_timeout_s: float = 1800.0  # for a generation, at the start and at the end
    index_from_snapshot: bool = False  # the service was started with the generation that the checkpoint names
    config: dict[str, Any] = field(default_factory=dict)  # resolved settings, for the monitor
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    evaluate_preferences: str = ""  # store of pairs, or "" where none are measured


class Stage:
    """The objects of one trainer process."""

    def __init__(self, job: StageJob, service: IndexService | None, stream: TextIO | None = None) -> None:
        """Build models, engine and monitor. Collective."""
        torch.set_num_threads(job.threads)
        self.job, self.service, self.run_dir = job, service, Path(job.run_dir)
        folder = Path(job.tokenizers)
        tokenizers = (load_tokenizer(folder / "retriever"), load_tokenizer(folder / "generator"))
        self.store = Store.open(job.passages, verify=False)
        self.system = build_system(job.encoder, job.generator, job.training.train, tokenizers, job.seed, job.objective)
        self._initial = initial_copy(self.system) if self._has_reference else None
        self.reference: Reference | None = None
        self.engine = Engine(self.system, job.engine, parameter_groups(self.system))
        separator = tokenizers[0].sep_token_id
        self.pad_id, self.separator_id = pad_id(tokenizers[0]), separator if isinstance(separator, int) else -1
        self.tokenizers = tokenizers
        self.to_text: Callable[[Any], str] = lambda tokens: to_text(tokenizers[1], tokens)
        self.monitor = Monitor(
            self.run_dir, job.monitor, job.config, job.training.steps, self.engine.rank, stream=stream
        )
        self.state = LoopState()
        self.collapse: CollapseDetector | None = None
        self.source: Source | None = None
        self.evaluator = self._make_evaluator() if job.evaluate_questions else None
        self.corpus_questions, self.held_out = (
            self._make_corpus_questions() if pretrains(job.pretraining) else (None, None)
        )
        self.preferences = self._make_preferences() if job.evaluate_preferences else None
        self._last_progress = 0.0

    # ---------------------------------------------------------------- the stage, in order

    def run(self) -> dict[str, Any]:
        """Train to the last step, measure, save; what was measured, on rank 0. Raises what the loop raises."""
        job = self.job
        with self.monitor:
            loader_state = self.restore()
            self.reference = self.make_reference(resumes=loader_state is not None)
            self.serve_index(fresh=not job.index_from_snapshot)
            if job.training.steps > self.state.step:
                self.source = self.make_source(loader_state)
                self.collapse = self._make_detector()
                begin = time.monotonic()
                train(
                    job.training,
                    job.objective,
                    self.engine,
                    self.source,
                    self.service,
                    self.monitor,
                    self.state,
                    self.hooks(),
                )
                self.monitor.message(f"trained to step {self.state.step} in {time.monotonic() - begin:.0f} s")
            if self.retriever_trains and self.state.step:
                self.serve_index(fresh=self.state.published != self.state.step)
            result = self.finish()
        return result

    def restore(self) -> dict[str, Any] | None:
        """Newest complete checkpoint of this run, else the weights of `init_from`, else as built. Collective."""
        job = self.job
        torch.manual_seed(job.seed * 1000 + self.engine.rank)
        found = self.engine.broadcast_object(self._newest() if self.engine.rank == 0 else None)
        if found is not None and job.training.train != "none":
            state, rank_state = load_checkpoint(Path(found), self.engine)
            self.state = LoopState(**state["loop"] | {"published": -1})  # this index service knows of no weights yet
            set_rng_state(rank_state["rng"])
            self.monitor.message(f"resumes from {found} at step {self.state.step}")
            self.monitor.event("resumed", checkpoint=found, step=self.state.step)
            return rank_state["source"]
        if job.init_from:
            weights = fit_weights(load_weights(Path(job.init_from)), self.system) if self.engine.rank == 0 else {}
            self.engine.load_consolidated(weights)
            self.monitor.message(f"starts from {job.init_from}")
        return None

    def make_reference(self, resumes: bool) -> Reference | None:
        """What alignment compares with: this stage's start, wherever it stands now. Collective."""
        if not self._has_reference:
            return None
        initial, self._initial = self._initial, None
        offload, init_from = self.job.alignment.reference == "offload", self.job.init_from
        return build_reference(self.engine, initial, offload, init_from, self.run_dir, resumes)

    def serve_index(self, fresh: bool) -> None:
        """Wait until a generation of the present weights serves. Collective."""
        if self.service is None:
            return
        if fresh:
            publish(self.engine, self.service, self.state, self.job.publish_precision)
        begin = time.monotonic()
        self.service.wait_for_version(max(0, self.state.published), self.job.wait_timeout_s)
        waited = f"step {self.state.step}, {time.monotonic() - begin:.1f} s"
        self.monitor.message(f"index of {self.service.num_passages} passages serves ({waited})")

    def make_source(self, loader_state: dict[str, Any] | None) -> Source:
        """Micro-batches from where the checkpoint stood."""
        job, engine = self.job, self.engine
        place = (job.seed, engine.rank, engine.world_size)
        start = loader_state["number"] if loader_state else 0
        if needs(job.objective).in_batch:
            stream = Stream(len(self.store), job.training.batch_size, *place)
            cloze = ClozeSource(self.store, stream, job.objective, self.separator_id, self.pad_id)
            return ClozeBatches(cloze, engine.device, start)
        if self.corpus_questions is not None:
            questions = self.corpus_questions
            stream = Stream(len(questions.candidates), job.training.batch_size, *place)
            answers, batch_of = None, stream.places
            collator = Collator(self.store, questions, self.system.generator, self.pad_id)
        else:
            questions = QuestionStore.open(job.train_questions, verify=False)
            stream = Stream(len(questions), job.training.batch_size, *place)
            judged = job.objective.name in PREFERENCE or samples_answers(job.objective)
            answers, batch_of = None if judged else self._training_answers(questions, stream), stream.batch
            collator = make_collator(job.objective, self.store, questions, self.system.generator, self.pad_id, job.seed)
        if job.retrieval.source == "long":
            long_context = LongContext(collator, job.retrieval.max_context_tokens, job.generator.max_answer_tokens)
            return LongContextBatches(collator, stream, long_context.choose, engine.device, start)
        if self.service is None:
            source = ClosedBookBatches(collator, batch_of, engine.device, start, answers)
            return self._aligned(source, collator, loader_state)
        k, depth = job.retrieval.k, job.retrieval.prefetch_depth
        # A labelled passage takes one place: search one more, so that k - 1 others are left.
        k += (job.retrieval.source == "gold") + (MORE_FOR_REFUSALS if job.questions.refusal_share else 0)
        k = min(k, self.service.num_passages)
        search = self._fair_search(questions) if isinstance(questions, CorpusQuestions) else None
        prefetcher = Prefetcher(
            self.service, batch_of, lambda numbers: encode_questions(engine, collator, numbers), k, depth, start,
            with_vectors=self.index_is_fresh and job.retrieval.source != "gold" and not job.questions.refusal_share,
            search=search,
        )  # fmt: skip
        source = RetrievedBatches(prefetcher, collator, job.retrieval, engine.device, stream, answers)
        if loader_state:
            source.restore(loader_state)
        return self._aligned(source, collator, loader_state)

    def _aligned(self, source: Source, collator: Collator, loader_state: dict[str, Any] | None) -> Source:
        job, max_tokens = self.job, self.job.generator.max_answer_tokens
        return aligned(
            source, self.engine, collator, self.store, self.to_text, max_tokens, job.objective, job.alignment,
            self.reference, loader_state,
        )  # fmt: skip

    def hooks(self) -> Hooks:
        """What the loop does between steps."""
        job = self.job
        return Hooks(
            evaluate=self.evaluate_briefly if self.evaluator is not None or self.held_out is not None else None,
            evaluate_every=job.evaluation.every_steps,
            save=self.save,
            save_every=job.checkpoint.every_steps,
            publish_every=job.publish_every if self.retriever_trains else 0,
            publish_precision=job.publish_precision,
            max_staleness_steps=job.max_staleness_steps if self.retriever_trains else 0,
            passages_fixed=not self.retriever_trains,
            wait_timeout_s=job.wait_timeout_s,
            watch=self._watch_step if self.collapse is not None else None,
        )

    def finish(self) -> dict[str, Any]:
        """Evaluate the whole split, save, and write down what was measured."""
        result: dict[str, Any] = {"step": self.state.step, "fingerprint": self.job.fingerprint, "metrics": {}}
        result |= {"source": self.job.retrieval.source}
        result |= {"train_seconds": self.state.seconds, "blocked_steps": self.state.blocked_steps}
        if self.evaluator is not None:
            numbers = np.arange(len(self.evaluator.questions))
            evaluation = self.evaluator(numbers, also=self.job.evaluation.also, texts=True, costs=True)
            evaluation.metrics |= self._measure_preferences(PAIRS_FILE)
            self._log_evaluation(evaluation)
            if self.job.evaluation.needle.lengths:
                result["needle"] = needle_sweep(self.evaluator, self.job.evaluation.needle)
            result |= {"metrics": evaluation.metrics, "costs": evaluation.costs, "generation": evaluation.generation}
            result |= {"weights_version": evaluation.weights_version, "num_questions": len(numbers)}
            if self.engine.rank == 0:
                self._write_predictions(evaluation)
        if self.held_out is not None:
            result["metrics"] |= {f"held_out/{name}": value for name, value in self._measure_held_out().items()}
        if self.service is not None:
            result["generations_committed"] = self.service.status().generations_committed
        if self.source is not None:
            self.save(self.state)
        else:
            self._save_index()
        if self.engine.rank == 0:
            self.monitor.summary(result["metrics"])
            partial = self.run_dir / f".{EVALUATION_FILE}"
            partial.write_text(json.dumps(plain(result), indent=1), encoding="utf-8")
            partial.rename(self.run_dir / EVALUATION_FILE)
        self.engine.barrier()
        return result

    # ---------------------------------------------------------------- parts

    @property
    def retriever_trains(self) -> bool:
        """Whether the passage encoder changes, so that the index has something to follow."""
        return any(p.requires_grad for p in self.system.retriever.passage_encoder.parameters())

    @property
    def index_is_fresh(self) -> bool:
        """Whether the vectors of the index are those of the passage encoder at every step, in full precision."""
        return not self.retriever_trains and self.job.publish_precision == "float32"

    def save(self, state: LoopState) -> None:
        """Checkpoint, with the index generation in use. Collective."""
        assert self.source is not None
        generation, current = self._save_index()
        save_checkpoint(
            self.run_dir,
            state.step,
            self.engine,
            state={
                "loop": asdict(state),
                "generation": generation,
                "index_is_current": current,
                "fingerprint": self.job.fingerprint,
            },
            rank_state={"source": self.source.state(), "rng": rng_state()},
            keep=self.job.checkpoint.keep,
            files={"tokenizers": Path(self.job.tokenizers)},
        )
        self.monitor.event("checkpoint", step=state.step, generation=generation)

    def _save_index(self) -> tuple[int, bool]:
        """Number of the generation on disk, and whether the passage encoder as it is now made it; -1 where there is
        none: a full disk costs the snapshot, not the run."""
        if self.service is None or not self.job.checkpoint.index or self.engine.rank:
            return -1, False
        status = self.service.status()
        generation = status.generation
        try:
            self.service.save_generation(generation, self.job.wait_timeout_s)
        except (OSError, TimeoutError) as error:
            self.monitor.message(f"index generation {generation} was not saved, a resume will encode again: {error}")
            self.monitor.event("index_save_failed", generation=generation, message=str(error))
            return -1, False
        current = not self.retriever_trains or status.weights_version == self.state.step
        return generation, current and self.job.publish_precision == "float32"

    def evaluate_briefly(self, step: int) -> None:
        """Evaluation during training, on a fixed sample, and on the held-out examples of pretraining."""
        if self.held_out is not None:
            self._measure_held_out()
        if self.evaluator is None:
            return
        limit, total = self.job.evaluation.max_questions, len(self.evaluator.questions)
        numbers = np.arange(total)
        if 0 < limit < total:
            numbers = np.sort(np.random.default_rng(self.job.seed).permutation(total)[:limit])
        evaluation = self.evaluator(numbers)
        evaluation.metrics |= self._measure_preferences(limit=limit)
        self._log_evaluation(evaluation)
        if self.collapse is not None:
            self._report_collapse(self.collapse.after_evaluation(evaluation.metrics))

    def _make_detector(self) -> CollapseDetector | None:
        """Where a retriever follows a reader; a warm start has an entropy of another kind."""
        trains = any(p.requires_grad for p in self.system.retriever.parameters())
        wanted = self.job.training.on_collapse != "ignore" and not needs(self.job.objective).in_batch
        return CollapseDetector(self.state.start) if trains and wanted else None

    def _watch_step(self, metrics: dict[str, float]) -> None:
        assert self.collapse is not None
        k, gold = self.job.retrieval.k, metrics.get("retrieval/gold_in_k", 0.0)
        sign = self.collapse.after_step(metrics["retrieval/entropy"], k, gold)
        if self.collapse.window.steps == 0:  # ranks see different questions: the first one's word counts
            self._report_collapse(sign)

    def _report_collapse(self, sign: str | None) -> None:
        """Warn or stop. Collective."""
        sign = self.engine.broadcast_object(sign)
        if sign is None:
            return
        self.monitor.message(f"step {self.state.step}: retrieval collapses: {sign}")
        self.monitor.event("retrieval_collapse", step=self.state.step, message=sign)
        if self.job.training.on_collapse == "stop":
            raise Collapsed(
                f"retrieval collapses at step {self.state.step}: {sign} (training.on_collapse=stop). Warm up the "
                "reader, lower training.lr_retriever or objective.weight, or set training.on_collapse=warn"
            )

    def _measure_preferences(self, file: str = "", limit: int = 0) -> dict[str, float]:
        """Log-likelihood accuracy on held-out pairs, where there are any; a row a pair into `file`. Collective."""
        if self.preferences is None:
            return {}
        measured, rows = self.preferences(limit, self.job.seed)
        if file and self.engine.rank == 0:
            (self.run_dir / file).unlink(missing_ok=True)
            for row in rows:
                append_line(self.run_dir / file, row)
        return measured

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        split = Path(self.job.evaluate_questions).name.removeprefix("questions-")
        metrics = {f"eval/{split}/{name}": value for name, value in evaluation.metrics.items()}
        metrics[f"eval/{split}/index_version"] = evaluation.weights_version
        self.monitor.log(metrics, self.state.step)

    def _make_evaluator(self) -> Evaluator:
        questions = QuestionStore.open(self.job.evaluate_questions, verify=False)
        collator = Collator(self.store, questions, self.system.generator, self.pad_id)
        job = self.job
        evaluator = Evaluator(
            self.engine, collator, self.store, self.service, self.to_text, job.evaluation, job.retrieval, job.objective,
            job.generator, self._progress, self.index_is_fresh, job.questions.refusal,
        )  # fmt: skip
        if job.evaluation.needle.lengths:
            check_needle(evaluator, job.evaluation.needle)
        return evaluator

    def _training_answers(self, questions: QuestionStore, stream: Stream) -> TrainingAnswers:
        config = self.job.questions
        refusal = generator_answer_side(self.tokenizers[1], self.job.generator).tokenize([("", config.refusal)])[0]
        row = np.array(refusal, dtype=np.int32) if config.refusal else None
        return TrainingAnswers(questions, self.store, stream, config.target, row, config.refusal_share)

    def _make_corpus_questions(self) -> tuple[CorpusQuestions, HeldOut | None]:
        """Where pretraining examples come from, and what measures those that are held out."""
        job, config = self.job, self.job.pretraining
        self.duplicate_groups = np.array(open_groups(job.duplicates))
        train, out = split_passages(self.duplicate_groups, config.held_out)
        sides = example_sides(self.tokenizers, job.encoder, job.generator)
        questions = CorpusQuestions(self.store, train, config, sides, job.seed, TRAINING)
        if not len(out) or not config.held_out_examples:
            return questions, None
        asked = CorpusQuestions(self.store, out, config, sides, HELD_OUT_SEED, HELD_OUT)
        collator = Collator(self.store, asked, self.system.generator, self.pad_id)
        search = self._fair_search(asked) if self.service is not None else None
        measure = HeldOut(
            self.engine, collator, search, job.evaluation, job.retrieval, job.objective, config.held_out_examples
        )
        return questions, measure

    def _fair_search(self, questions: CorpusQuestions) -> FairSearch:
        assert self.service is not None
        return FairSearch(self.service, questions, self.duplicate_groups, self.job.pretraining.margin)

    def _measure_held_out(self) -> dict[str, float]:
        """Measured and logged. Collective."""
        assert self.held_out is not None
        metrics = self.held_out()
        measured = f"loss {metrics['loss']:.3f} a token, log-likelihood {metrics['log_likelihood']:.2f} an answer"
        self.monitor.message(f"step {self.state.step}: {self.held_out.number} held-out examples: {measured}")
        self.monitor.log({f"eval/held_out/{name}": value for name, value in metrics.items()}, self.state.step)
        return metrics

    def _make_preferences(self) -> PreferenceEvaluator:
        pairs, job = QuestionStore.open(self.job.evaluate_preferences, verify=False), self.job
        collator = PairCollator(self.store, pairs, self.system.generator, self.pad_id)
        return PreferenceEvaluator(
            self.engine, collator, self.service, job.retrieval, job.evaluation.batch_size, job.objective.temperature,
            self._progress,
        )  # fmt: skip

    @property
    def _has_reference(self) -> bool:
        job = self.job
        trains = job.training.train != "none" and job.training.steps > 0
        return trains and needs_reference(job.objective) and job.alignment.reference != "none"

    def _progress(self, text: str) -> None:
        if time.monotonic() - self._last_progress > PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            self.monitor.message(text)

    def _newest(self) -> str | None:
        found = newest_checkpoint(self.run_dir, self.monitor.message)
        return str(found) if found is not None else None

    def _write_predictions(self, evaluation: Evaluation) -> None:
        path = self.run_dir / PREDICTIONS_FILE
        path.unlink(missing_ok=True)
        for row in evaluation.rows:
            append_line(path, {**row, "hits": self.store.ids(row["hits"])})
