"""Measures alignment: which answer of a held-out pair the system finds likelier, with the passages that it retrieves
now."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from training.data import encode_questions, sampled_numbers
from training.engine.engine import Engine
from training.feeding.alignment import PairCollator
from training.metrics import mean_of_rows, ranking_metrics
from training.models.parts.modes import evaluating
from training.models.system import System
from training.objectives.inputs import retrieval_log_probs
from training.objectives.preference import Candidates, marginal_log_probs
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import IndexService, Search, dense_search
from training.training_settings import RetrievalConfig


class PreferenceEvaluator:
    """Measures pairs of one store. Every trainer takes its share and the same number of batches."""

    def __init__(
        self,
        engine: Engine,
        collator: PairCollator,
        *,
        service: IndexService | None,
        retrieval: RetrievalConfig,
        batch_size: int,
        temperature: float,
        progress: Callable[[str], None] = lambda _: None,
        search: Search | None = None,
        select: Reranking | None = None,
    ) -> None:
        """`search` None searches by vectors alone; `select` puts hits in another order."""
        self.search = search if search is not None or service is None else dense_search(service)
        self.select = select
        self.engine, self.collator, self.service, self.retrieval = engine, collator, service, retrieval
        self.batch_size, self.temperature, self.progress = batch_size, temperature, progress
        self.questions = collator.stored

    def __call__(self, limit: int = 0, seed: int = 0) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return means, and a row for each pair; `limit` measures a fixed sample of so many. Collective.

        preference_accuracy: share of pairs whose chosen answer has the larger log pi(y|q), a tie counting half;
        preference_margin: mean of log pi(chosen) - log pi(rejected); `_per_token`: with each divided by the answer's
        tokens, end included; preference_recall@k: of the prompts' labelled passages among the k read.
        """
        numbers = sampled_numbers(len(self.questions), limit, seed)
        mine, rows = self.engine.share(numbers), []
        with torch.no_grad(), evaluating(self.engine.module):
            for start in range(0, len(mine), self.batch_size):
                rows += self._measure(mine[start : start + self.batch_size])
                self.progress(f"evaluate preferences: {len(rows)}/{len(mine)} pairs")
        by_number = {row["number"]: row for part in self.engine.gather_objects(rows) for row in part}
        ordered = [by_number[int(number)] for number in numbers]
        return mean_of_rows(ordered), ordered

    def _measure(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        passages, lexical = self._passages(numbers)
        batch = self.collator(numbers, passages, lexical=lexical).to(self.engine.device)
        outputs: Candidates = self.engine(System.candidates, batch)
        assert outputs.log_probs is not None
        prior = retrieval_log_probs(outputs.scores, outputs.passage_mask, self.temperature)
        marginal = marginal_log_probs(prior, outputs.log_probs, batch.answer_mask, outputs.passage_mask)
        lengths = batch.answer_mask.sum(dim=-1).clamp(min=1)
        plain, per_token = marginal.double().cpu().numpy(), (marginal / lengths).double().cpu().numpy()
        rows: list[dict[str, Any]] = []
        for i, number in enumerate(numbers):
            row: dict[str, Any] = {"number": int(number), "id": self.questions.question(int(number)).id}
            for suffix, (chosen, rejected) in (("", plain[i]), ("_per_token", per_token[i])):
                row[f"preference_accuracy{suffix}"] = 0.5 if chosen == rejected else float(chosen > rejected)
                row[f"preference_margin{suffix}"] = float(chosen - rejected)
            rows.append(row)
        if self.service is not None:
            hits = np.stack(passages)
            gold = [self.questions.gold_rows(int(number)) for number in numbers]
            k = hits.shape[1]
            for row, found in zip(rows, ranking_metrics(hits, gold, cuts=(k,))[f"recall@{k}"], strict=True):
                row[f"preference_recall@{k}"] = float(found)
        return rows

    def _passages(self, numbers: np.ndarray) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Return the hits of the present index, with lexical scores if there are any; none for a closed book."""
        if self.service is None or self.search is None:
            return [np.empty(0, dtype=np.int64)] * len(numbers), None
        k = min(self.retrieval.k, self.service.num_passages)
        depth = k if self.select is None else min(max(k, self.select.candidates), self.service.num_passages)
        hits = self.search(numbers, encode_questions(self.engine, self.collator, numbers), depth).result()
        if self.select is not None:
            hits = self.select(numbers, hits)
        return list(hits.ids[:, :k]), None if hits.lexical is None else hits.lexical[:, :k]
