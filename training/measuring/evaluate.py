"""Evaluates a split: ranks passages for every question, writes answers from them, and measures each question alone.

Every trainer takes its share of the questions and the same number of batches, because with sharded weights each forward
is a collective; rank 0 has all rows at the end.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from training.data import Collator, encode_questions
from training.engine.engine import Engine
from training.feeding.long_context import LongContext
from training.measuring.costs import CostModel
from training.measuring.user_metrics import load_metrics, measured
from training.metrics import answer_metrics, answer_recall, exact_match, mean_of_rows, ranking_metrics
from training.models.generators.decode import marginal_answers, restore_spelling, top1_answers
from training.models.generators.token_scores import collate_answers
from training.models.model_inputs import RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.system import System
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import IndexService, Search, dense_search
from training.training_settings import (
    DecodingConfig,
    EvaluationConfig,
    GeneratorConfig,
    ObjectiveConfig,
    RetrievalConfig,
)

CONTROLS = ("closed_book", "gold")  # modes that read no passage, and the labelled passage
LONG = "long"  # mode that reads as much of the corpus as fits, without retrieval
LONG_SEED = 0  # seed of the corpus's order in long prompts, the same for every system


@dataclass(kw_only=True)
class Evaluation:
    """Means over the split, and a row for each question."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # on rank 0, in the order of the questions
    costs: dict[str, dict[str, float]] = field(default_factory=dict)  # means by mode: `costs.py`, seconds
    generation: int = -1
    weights_version: int = -1


@dataclass
class Written:
    """Answers to a batch of questions, and the batch that they were written from."""

    predictions: list[str]
    log_likelihoods: list[float]
    batch: RetrievalBatch
    tokens: list[list[int]]  # see `Decoded.tokens`


@dataclass
class Known:
    """Values that came with the hits that are read; None: nothing came."""

    vectors: np.ndarray | None = None  # float32 [questions, k, dim]
    lexical: np.ndarray | None = None  # float32 [questions, k]: normalised lexical scores

    def of(self, part: slice) -> "Known":
        """Return the values of some questions."""
        return Known(*(None if values is None else values[part] for values in (self.vectors, self.lexical)))


class Evaluator:
    """Measures a system on questions of one store."""

    def __init__(
        self,
        engine: Engine,
        collator: Collator,
        *,
        store: Store,
        service: IndexService | None,
        to_text: Callable[[Sequence[int]], str],
        config: EvaluationConfig,
        retrieval: RetrievalConfig,
        objective: ObjectiveConfig,
        generator: GeneratorConfig,
        progress: Callable[[str], None] = lambda _: None,
        passages_fixed: bool = False,
        refusal: str = "",
        search: Search | None = None,
        select: Reranking | None = None,
    ) -> None:
        """`passages_fixed`: the passage encoder does not change, so that the index holds its vectors. `refusal` is the
        answer that says that there is none; if it is not empty, its frequency is measured. `search` finds the passages,
        None by vectors alone; `select` puts hits in another order."""
        self.engine, self.collator, self.store, self.service = engine, collator, store, service
        self.to_text, self.config, self.retrieval, self.objective = to_text, config, retrieval, objective
        self.progress, self.refusal = progress, refusal
        self.search = search if search is not None or service is None else dense_search(service)
        self.select = select
        self._metrics = load_metrics(config.metrics)
        self.deepest = max(retrieval.k, 0 if select is None else select.candidates)  # hits whose order may change
        self.num_vectors = self.deepest if passages_fixed else 0
        assert isinstance(collator.questions, QuestionStore)
        self.questions = collator.questions
        self.generator_config = generator
        self.long_context: LongContext | None = None  # made early: refuses prompts before training
        if retrieval.source == LONG or LONG in config.also:
            self.long_context = self.context_of(retrieval.max_context_tokens)
        self._costs: CostModel | None = None
        self._search_seconds = 0.0  # Seconds that the search of one question takes

    def __call__(
        self, numbers: np.ndarray, also: Sequence[str] = (), texts: bool = False, costs: bool = False
    ) -> Evaluation:
        """Measure questions `numbers` under the configured decoding and under each mode of `also`. `texts` adds recall
        by answer string, which reads the hits' texts; `costs` adds the costs of an answer by mode. Raises ValueError
        for an empty split."""
        if not len(numbers):
            raise ValueError("questions.evaluate: the split has no question left to ask")
        mine = self.engine.share(numbers)
        try:
            with evaluating(self.engine.module):
                evaluation = Evaluation()
                begin = time.monotonic()
                rows, known = self._rank(mine, evaluation, texts)
                if costs:
                    assert isinstance(self.engine.module, System)
                    reranked = 0 if self.select is None else self.select.candidates
                    self._costs = CostModel(self.engine.module, self._value_bytes, len(self.store), reranked)
                    self._search_seconds = (time.monotonic() - begin) / len(rows)
                for mode in (self.config.decoding.mode, *also):
                    self._answer(mine, rows, mode, known)
        finally:
            self._costs = None
        everyone = self.engine.gather_objects(rows)
        by_number = {row["number"]: row for part in everyone for row in part}
        evaluation.rows = [by_number[int(number)] for number in numbers]
        evaluation.metrics = mean_of_rows(evaluation.rows)
        modes = [mode for mode in also if mode != self.config.decoding.mode]
        evaluation.metrics |= measured(self._metrics, evaluation.rows, modes)
        spent = [row.pop("costs", {}) for row in evaluation.rows]
        evaluation.costs = {mode: mean_of_rows([costs[mode] for costs in spent]) for mode in spent[0]}
        return evaluation

    def context_of(self, budget: int, setting: str = "retrieval.max_context_tokens") -> LongContext:
        """Return what chooses passages for prompts of `budget` tokens (0: the generator's context). Raises
        ValueError."""
        answer = max(self.config.decoding.max_tokens, self.generator_config.max_answer_tokens)
        return LongContext(self.collator, budget, answer, setting)

    def exact_match(
        self, numbers: np.ndarray, choose: Callable[[int], np.ndarray], prompt_tokens: int
    ) -> dict[int, float]:
        """Return exact match by question, on every rank. Each question is answered from the passages that `choose`
        names, all of them in one prompt of about `prompt_tokens`. Collective."""
        mine = self.engine.share(numbers)
        found: dict[int, float] = {}
        with evaluating(self.engine.module):
            for part in self._batches(mine, self._size_of(prompt_tokens)):
                chunk = mine[part]
                passages = [choose(int(number)) for number in chunk]
                written = self._write(
                    chunk, passages, decoding=replace(self.config.decoding, mode="fused"), for_retriever=False
                )
                answers = [self.questions.question(int(number)).answers for number in chunk]
                values = answer_metrics(written.predictions, answers)["exact_match"]
                found |= dict(zip(chunk.tolist(), values.tolist(), strict=True))
        return {number: value for part in self.engine.gather_objects(found) for number, value in part.items()}

    def _size_of(self, prompt_tokens: int) -> int:
        """Return the number of questions with long prompts that have about as many tokens as a batch with retrieved
        passages."""
        tokens = self.config.batch_size * self.retrieval.k * self.generator_config.max_passage_tokens
        return max(1, min(self.config.batch_size, tokens // max(1, prompt_tokens)))

    def _batches(self, numbers: np.ndarray, size: int = 0) -> list[slice]:
        size = size or self.config.batch_size
        return [slice(start, start + size) for start in range(0, len(numbers), size)]

    def _rank(self, numbers: np.ndarray, evaluation: Evaluation, texts: bool) -> tuple[list[dict[str, Any]], Known]:
        """Search every question. Return rows with ranking metrics and the best `retrieval.k` hits, and the values that
        came along."""
        asked = [self.questions.question(int(number)) for number in numbers]
        rows: list[dict[str, Any]] = [
            {"number": int(number), "id": q.id, "question": q.text, "answers": q.answers, "old_answers": q.old_answers}
            for number, q in zip(numbers, asked, strict=True)
        ]
        if self.service is None:
            for row in rows:
                row["hits"] = np.empty(0, dtype=np.int64)
            return rows, Known()
        depth = min(max(self.config.k, self.deepest), self.service.num_passages)
        hits, known = self._search(numbers, depth, evaluation)
        gold = [self.questions.gold_rows(int(number)) for number in numbers]
        measured = ranking_metrics(hits, gold)
        if texts:
            measured |= answer_recall([self._texts(row) for row in hits], [q.answers for q in asked])
        for i, row in enumerate(rows):
            row |= {name: float(values[i]) for name, values in measured.items()}
            row["hits"] = hits[i, : self.retrieval.k]
            row["gold_in_k"] = float(np.isin(row["hits"], gold[i]).any()) if len(gold[i]) else float("nan")
        return rows, known

    def _search(self, numbers: np.ndarray, depth: int, evaluation: Evaluation) -> tuple[np.ndarray, Known]:
        assert self.search is not None
        asked = [numbers[part] for part in self._batches(numbers)]
        pending = [
            self.search(some, encode_questions(self.engine, self.collator, some), depth, num_vectors=self.num_vectors)
            for some in asked
        ]
        found = [search.result() for search in pending]
        if self.select is not None:
            found = [self.select(some, hits) for some, hits in zip(asked, found, strict=True)]
        evaluation.generation, evaluation.weights_version = found[-1].generation, found[-1].weights_version
        k = self.retrieval.k
        vectors = [hits.vectors[:, :k] for hits in found if hits.vectors is not None]
        lexical = [hits.lexical[:, :k] for hits in found if hits.lexical is not None]
        known = Known(*(np.concatenate(parts) if parts else None for parts in (vectors, lexical)))
        return np.concatenate([hits.ids for hits in found]), known

    def _texts(self, hits: np.ndarray) -> list[str]:
        passages = [self.store.passage(int(number)) for number in hits]
        return [f"{passage.title} {passage.text}" for passage in passages]

    def _answer(self, numbers: np.ndarray, rows: list[dict[str, Any]], mode: str, known: Known) -> None:
        """Write an answer to every question and measure it; the main mode's metrics carry no prefix."""
        decoding = self.config.decoding if mode in CONTROLS else replace(self.config.decoding, mode=mode)
        prefix = "" if mode == self.config.decoding.mode else f"{mode}/"
        begin = last = time.monotonic()
        long, retrieved = self._is_long(mode), self.service is not None and mode not in (*CONTROLS, LONG)
        size = 0
        if long and self.long_context is not None:
            decoding, size = replace(decoding, mode="fused"), self._size_of(self.long_context.budget)
        for part in self._batches(numbers, size):
            chunk = rows[part]
            passages = [self._passages(row, mode) for row in chunk]
            some = known.of(part) if retrieved else Known()
            predictions, likelihoods, written = self._predict(
                numbers[part], passages, decoding=decoding, for_retriever=not long, known=some
            )
            measured = answer_metrics(predictions, [row["answers"] for row in chunk])
            old = answer_metrics(predictions, [row["old_answers"] for row in chunk])["exact_match"]
            for i, row in enumerate(chunk):
                row[f"{prefix}prediction"] = predictions[i]
                if self.refusal:
                    kind = "answerable" if row["answers"] else "unanswerable"
                    row[f"{prefix}refusal_{kind}"] = exact_match(predictions[i], [self.refusal])
                    if not row["answers"]:
                        continue  # nothing else can be right or wrong
                row |= {f"{prefix}{name}": float(values[i]) for name, values in measured.items()}
                row[f"{prefix}log_likelihood"] = likelihoods[i]
                if self._has_options(row["number"]):
                    row[f"{prefix}accuracy"] = float(predictions[i] in row["answers"])
                if row["old_answers"]:
                    row[f"{prefix}old_exact_match"] = float(old[i])
            if self._costs is not None and written is not None:
                costs = self._costs(written.batch, written.tokens, decoding.mode == "fused", retrieved)
                spent, last = (time.monotonic() - last) / len(chunk), time.monotonic()
                for row, cost in zip(chunk, costs, strict=True):
                    values = {name: float(value) for name, value in vars(cost).items()}
                    values |= {"seconds": spent, "search_seconds": self._search_seconds if retrieved else 0.0}
                    row.setdefault("costs", {})[mode] = values
            done = min(part.stop, len(numbers))
            rate = done / max(1e-9, time.monotonic() - begin)
            left_s = (len(numbers) - done) / rate
            self.progress(f"evaluate {mode}: {done}/{len(numbers)} questions, {rate:.0f}/s, {left_s:.0f} s left")

    def _is_long(self, mode: str) -> bool:
        return mode == LONG or (self.retrieval.source == LONG and mode not in CONTROLS)

    def _passages(self, row: dict[str, Any], mode: str) -> np.ndarray:
        if self._is_long(mode):
            assert self.long_context is not None
            return self.long_context.choose(row["number"], np.random.default_rng([LONG_SEED, row["number"]]))
        if mode == "closed_book" or (self.retrieval.source == "none" and mode != "gold"):
            return np.empty(0, dtype=np.int64)
        return self.questions.gold_rows(row["number"])[:1] if mode == "gold" else row["hits"]

    def _has_options(self, number: int) -> bool:
        return bool(self.questions.max_options and self.questions.question(number).options)

    def _predict(
        self,
        numbers: np.ndarray,
        passages: list[np.ndarray],
        *,
        decoding: DecodingConfig,
        for_retriever: bool,
        known: Known,
    ) -> tuple[list[str], list[float], Written | None]:
        """Return answers, log-likelihoods of the gold ones, and the written answers unless all questions have options.
        An answer is chosen among the options if a question has any, else written. The store alone decides which models
        are called, so that all trainers call them equally often."""
        predictions, likelihoods, written = [""] * len(numbers), [0.0] * len(numbers), None
        if self.questions.num_with_options < len(self.questions):
            written = self._write(numbers, passages, decoding=decoding, for_retriever=for_retriever, known=known)
            predictions, likelihoods = written.predictions, written.log_likelihoods
        if self.questions.max_options:
            scores = self._score_options(numbers, passages, decoding.mode, known.lexical)
            for i, number in enumerate(numbers):
                question = self.questions.question(int(number))
                if question.options:
                    of_options = scores[i, : len(question.options)]
                    predictions[i] = question.options[int(of_options.argmax())]
                    gold = question.options.index(question.answers[0]) if question.answers else int(of_options.argmax())
                    likelihoods[i] = float(of_options[gold])
        return predictions, likelihoods, written

    def _score_options(
        self, numbers: np.ndarray, passages: list[np.ndarray], mode: str, lexical: np.ndarray | None
    ) -> np.ndarray:
        """Return the log-probability of each option, float32 [questions, options], marginal over the passages or fused.
        Columns beyond a question's options mean nothing."""
        rows = [self.questions.option_tokens(int(number)) or [np.empty(0, dtype=np.int32)] for number in numbers]
        batch = self.collator(numbers, passages, with_answers=False, lexical=lexical).to(self.engine.device)
        answers = []
        for option in range(self.questions.max_options):
            some = [of_question[min(option, len(of_question) - 1)] for of_question in rows]
            ids, mask = collate_answers(some, len(some), self.collator.generator.end_id)
            answers.append((ids.to(self.engine.device), mask.to(self.engine.device)))
        with torch.no_grad():
            scores = self.engine(
                System.score,
                batch,
                answers,
                mode=mode,
                temperature=self.objective.temperature,
                score_bias=self._score_bias,
            )
        return scores.float().cpu().numpy()

    @property
    def _score_bias(self) -> bool:
        return self.objective.name == "fused" and self.objective.score_bias

    def _write(
        self,
        numbers: np.ndarray,
        passages: list[np.ndarray],
        *,
        decoding: DecodingConfig,
        for_retriever: bool = True,
        known: Known | None = None,
    ) -> Written:
        vectors, lexical = (None, None) if known is None else (known.vectors, known.lexical)
        batch = self.collator(numbers, passages, for_retriever=for_retriever, vectors=vectors, lexical=lexical)
        batch = batch.to(self.engine.device)
        with torch.no_grad():
            answers = self.engine(System.answer, batch, decoding, self.objective.temperature, self._score_bias)
        texts = self._spelled(passages, answers.decoded.tokens)
        match decoding.mode:
            case "fused":
                predictions = texts
            case "top1":
                predictions = top1_answers(texts, answers.log_prior)
            case _:
                predictions = marginal_answers(texts, answers.decoded.log_probs, answers.log_prior)
        return Written(predictions, answers.log_likelihood.float().cpu().tolist(), batch, answers.decoded.tokens)

    @property
    def _value_bytes(self) -> int:
        """Return the bytes of a number that the generator keeps while it writes."""
        return 2 if self.engine.config.precision.startswith("bf16") else 4

    def _spelled(self, passages: list[np.ndarray], tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as text, spelled as in the passages that they were read from: one passage each, or all of
        them."""
        per_question = len(tokens) // len(passages)
        texts = []
        for i, row in enumerate(tokens):
            question, place = divmod(i, per_question)
            read = passages[question] if per_question == 1 else passages[question][place : place + 1]
            texts.append(restore_spelling(self.to_text(row), self._texts(read)))
        return texts
