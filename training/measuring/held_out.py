"""Measures pretraining on examples that were cut from passages held out of training."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.data import Collator, encode_questions
from training.engine.engine import Engine
from training.feeding.pretraining import CorpusQuestions, FairSearch
from training.models.model_inputs import RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.system import System
from training.objectives.inputs import Likelihoods, Needs, mixture_log_probs, retrieval_log_probs
from training.retrieving.rerank import Reranking
from training.training_settings import EvaluationConfig, ObjectiveConfig, RetrievalConfig


@dataclass(kw_only=True)
class HeldOut:
    """Measures examples 0, 1, ... of the held-out passages, which are the same in every evaluation of every run."""

    engine: Engine
    collator: Collator
    questions: CorpusQuestions
    search: FairSearch | None  # None reads no passages
    config: EvaluationConfig
    retrieval: RetrievalConfig
    objective: ObjectiveConfig
    number: int  # Number of examples, of all ranks together
    select: Reranking | None  # puts hits in another order
    progress: Callable[[str], None]

    def __call__(self) -> dict[str, float]:
        """Return `log_likelihood` of an answer and `loss`, its negative per token, as means over all examples, and
        `TASK/log_likelihood`. They are marginal over the passages, or fused if answers are decoded so. Collective."""
        with evaluating(self.engine.module):
            mine = self._measure()
        rows = [row for part in self.engine.gather_objects(mine) for row in part]
        by_number = {number: (task, value, tokens) for number, task, value, tokens in rows}
        found: dict[str, list[float]] = defaultdict(list)
        for task, value, tokens in by_number.values():
            found["log_likelihood"].append(value)
            found["loss"].append(-value / tokens)
            found[f"{task}/log_likelihood"].append(value)
        return {name: float(np.mean(values)) for name, values in sorted(found.items())}

    def _measure(self) -> list[tuple[int, str, float, int]]:
        """Return (number, task, log-likelihood, tokens) of this trainer's examples; all trainers have equally many."""
        share = -(-self.number // self.engine.world_size)
        numbers = (np.arange(share) + self.engine.rank * share) % self.number
        rows: list[tuple[int, str, float, int]] = []
        for start in range(0, share, self.config.batch_size):
            part = numbers[start : start + self.config.batch_size]
            passages, lexical = self._passages(part)
            batch = self.collator(part, passages, lexical=lexical).to(self.engine.device)
            values, tokens = self._log_likelihoods(batch), batch.generator_batch.answer_mask.sum(dim=1).tolist()
            tasks = [self.questions.example(int(number)).task for number in part]
            rows += zip(part.tolist(), tasks, values, tokens, strict=True)
            self.progress(f"evaluate held-out examples: {len(rows)}/{share}")
        return rows

    def _passages(self, numbers: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        if self.search is None:
            return [np.empty(0, dtype=np.int64)] * len(numbers), None
        queries, k = encode_questions(self.engine, self.collator, numbers), self.retrieval.k
        depth = k if self.select is None else max(k, self.select.candidates)
        hits = self.search(numbers, queries, depth).result()
        if self.select is not None:
            hits = self.select(numbers, hits)
        passages = [row[row >= 0] for row in hits.ids[:, :k]]
        return passages, None if hits.lexical is None else hits.lexical[:, :k]

    @torch.no_grad()
    def _log_likelihoods(self, batch: RetrievalBatch) -> list[float]:
        fused = self.config.decoding.mode == "fused"
        bias = fused and self.objective.name == "fused" and self.objective.score_bias
        needs = Needs(per_passage=not fused, per_passage_gradient=not fused, fused=fused, score_bias=bias)
        outputs: Likelihoods = self.engine(System.likelihoods, batch, needs, self.objective.temperature)
        if outputs.fused is not None:
            return outputs.fused.sum(dim=1).tolist()
        assert outputs.per_passage is not None
        prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, self.objective.temperature)
        return mixture_log_probs(prior, outputs.per_passage.sum(dim=2), outputs.passage_mask).tolist()
