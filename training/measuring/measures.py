"""Measures everything of a stage, while it trains and at its end: questions, pairs, held-out examples, collapse."""

from pathlib import Path
from typing import Any

import numpy as np

from indexing.corpus.stores.questions import QuestionStore
from training.data import Collator, sampled_numbers
from training.feeding.alignment import PairCollator
from training.job import Parts
from training.loop import LoopState
from training.make_source import CorpusExamples
from training.measuring.collapse import Collapsed, CollapseDetector, remedy
from training.measuring.evaluate import Evaluation, Evaluator
from training.measuring.held_out import HeldOut
from training.measuring.needle import check_needle, needle_sweep
from training.measuring.preference_pairs import PreferenceEvaluator
from training.models.build import parameter_groups
from training.objectives.dispatch import needs
from training.reporting.jsonl import append_line

PREDICTIONS_FILE, PAIRS_FILE = "predictions.jsonl", "preferences.jsonl"


class Measures:
    """Measures one system; every method is collective."""

    def __init__(self, parts: Parts, corpus: CorpusExamples | None) -> None:
        """Raises ValueError for prompts that do not fit the generator."""
        self.parts = parts
        self.evaluator = self._make_evaluator() if parts.job.evaluate_questions else None
        self.held_out = self._make_held_out(corpus) if corpus is not None else None
        self.preferences = self._make_preferences() if parts.job.evaluate_preferences else None
        self.collapse: CollapseDetector | None = None
        self.staleness = 0.0  # steps, of the last step's hits

    @property
    def any_while_training(self) -> bool:
        """True if `briefly` measures something."""
        return self.evaluator is not None or self.held_out is not None

    def watch(self, state: LoopState) -> CollapseDetector | None:
        """Look out for a collapse from here on, if the retriever learns from a generator. The entropy of a warm start
        is of another kind."""
        settings = self.parts.settings
        trains = bool(parameter_groups(self.parts.system)["retriever"])
        wanted = settings.training.on_collapse != "ignore" and not needs(settings.objective).in_batch
        self.collapse = CollapseDetector(state.start) if trains and wanted else None
        return self.collapse

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """Look at the metrics of one optimiser step. Raises Collapsed."""
        assert self.collapse is not None
        k, gold = self.parts.settings.retrieval.k, metrics.get("retrieval/gold_in_k", 0.0)
        self.staleness = metrics.get("index/staleness_steps", 0.0)
        sign = self.collapse.after_step(metrics["retrieval/entropy"], k, gold)
        if self.collapse.window.steps == 0:  # ranks see different questions, and rank 0 decides
            self._report_collapse(step, sign)

    def briefly(self, step: int) -> None:
        """Measure, during training, a fixed sample of the questions and pairs, and the held-out examples. Raises
        Collapsed."""
        if self.held_out is not None:
            self._measure_held_out(self.held_out, step)
        if self.evaluator is None:
            return
        settings = self.parts.settings
        limit = settings.evaluation.max_questions
        evaluation = self.evaluator(sampled_numbers(len(self.evaluator.questions), limit, self.parts.job.seed))
        evaluation.metrics |= self._measure_preferences(limit=limit)
        self._log(evaluation, step)
        if self.collapse is not None:
            self._report_collapse(step, self.collapse.after_evaluation(evaluation.metrics))

    def finally_(self, step: int) -> dict[str, Any]:
        """Measure, at the end, all questions under every decoding, their costs, pairs and held-out examples. Write rows
        into files and return the rest."""
        result: dict[str, Any] = {"metrics": {}}
        settings = self.parts.settings
        if self.evaluator is not None:
            numbers = np.arange(len(self.evaluator.questions))
            evaluation = self.evaluator(numbers, also=settings.evaluation.also, texts=True, costs=True)
            evaluation.metrics |= self._measure_preferences(PAIRS_FILE)
            self._log(evaluation, step)
            if settings.evaluation.needle.lengths:
                result["needle"] = needle_sweep(self.evaluator, settings.evaluation.needle)
            result |= {"metrics": evaluation.metrics, "costs": evaluation.costs, "generation": evaluation.generation}
            result |= {"weights_version": evaluation.weights_version, "num_questions": len(numbers)}
            if self.parts.engine.rank == 0:
                self._write_predictions(evaluation)
        if self.held_out is not None:
            held_out = self._measure_held_out(self.held_out, step)
            result["metrics"] |= {f"held_out/{name}": value for name, value in held_out.items()}
        return result

    # ---------------------------------------------------------------- inside

    def _make_evaluator(self) -> Evaluator:
        parts, settings = self.parts, self.parts.settings
        questions = QuestionStore.open(parts.job.evaluate_questions, verify=False, corpus=parts.store)
        collator = Collator(parts.store, questions, parts.system.generator, parts.text.pad_id)
        evaluator = Evaluator(
            parts.engine,
            collator,
            store=parts.store,
            service=parts.service,
            to_text=parts.text.to_text,
            config=settings.evaluation,
            retrieval=settings.retrieval,
            objective=settings.objective,
            generator=settings.generator,
            progress=parts.after_batch,
            passages_fixed=parts.index_is_fresh,
            refusal=settings.questions.refusal,
            search=parts.hybrid_search(questions),
            select=parts.selection(collator),
        )
        if settings.evaluation.needle.lengths:
            check_needle(evaluator, settings.evaluation.needle)
        return evaluator

    def _make_held_out(self, corpus: CorpusExamples) -> HeldOut | None:
        if corpus.held_out is None:
            return None
        parts, settings = self.parts, self.parts.settings
        collator = Collator(parts.store, corpus.held_out, parts.system.generator, parts.text.pad_id)
        return HeldOut(
            engine=parts.engine,
            collator=collator,
            questions=corpus.held_out,
            search=corpus.search(corpus.held_out) if parts.service is not None else None,
            config=settings.evaluation,
            retrieval=settings.retrieval,
            objective=settings.objective,
            number=settings.pretraining.held_out_examples,
            select=parts.selection(collator),
            progress=parts.after_batch,
        )

    def _make_preferences(self) -> PreferenceEvaluator:
        parts, settings = self.parts, self.parts.settings
        pairs = QuestionStore.open(parts.job.evaluate_preferences, verify=False, corpus=parts.store)
        collator = PairCollator(parts.store, pairs, parts.system.generator, parts.text.pad_id)
        return PreferenceEvaluator(
            parts.engine,
            collator,
            service=parts.service,
            retrieval=settings.retrieval,
            batch_size=settings.evaluation.batch_size,
            temperature=settings.objective.temperature,
            progress=parts.after_batch,
            search=parts.hybrid_search(pairs),
            select=parts.selection(collator),
        )

    def _measure_preferences(self, file: str = "", limit: int = 0) -> dict[str, float]:
        """Return log-likelihood accuracy on held-out pairs, if there are any; write a row for each pair into `file`."""
        if self.preferences is None:
            return {}
        measured, rows = self.preferences(limit, self.parts.job.seed)
        if file and self.parts.engine.rank == 0:
            (self.parts.run_dir / file).unlink(missing_ok=True)
            for row in rows:
                append_line(self.parts.run_dir / file, row)
        return measured

    def _measure_held_out(self, held_out: HeldOut, step: int) -> dict[str, float]:
        """Measure, log and return the metrics of the held-out examples."""
        metrics, monitor = held_out(), self.parts.monitor
        measured = f"loss {metrics['loss']:.3f} a token, log-likelihood {metrics['log_likelihood']:.2f} an answer"
        monitor.message(f"step {step}: {held_out.number} held-out examples: {measured}")
        monitor.log({f"eval/held_out/{name}": value for name, value in metrics.items()}, step)
        return metrics

    def _report_collapse(self, step: int, sign: str | None) -> None:
        """Warn of a collapse or stop the run."""
        sign = self.parts.engine.broadcast_object(sign)
        if sign is None:
            return
        settings = self.parts.settings
        advice = remedy(settings.objective, self.staleness, settings.refresh.every_steps)
        self.parts.monitor.message(f"step {step}: retrieval collapses: {sign}. {advice}")
        self.parts.monitor.event("retrieval_collapse", step=step, message=sign)
        if settings.training.on_collapse == "stop":
            raise Collapsed(
                f"retrieval collapses at step {step}: {sign} (training.on_collapse=stop). {advice}, or set "
                "training.on_collapse=warn"
            )

    def _log(self, evaluation: Evaluation, step: int) -> None:
        split = Path(self.parts.job.evaluate_questions).name.removeprefix("questions-")
        metrics = {f"eval/{split}/{name}": value for name, value in evaluation.metrics.items()}
        metrics[f"eval/{split}/index_version"] = evaluation.weights_version
        self.parts.monitor.log(metrics, step)

    def _write_predictions(self, evaluation: Evaluation) -> None:
        path = self.parts.run_dir / PREDICTIONS_FILE
        path.unlink(missing_ok=True)
        for row in evaluation.rows:
            append_line(path, {**row, "hits": self.parts.store.ids(row["hits"])})
