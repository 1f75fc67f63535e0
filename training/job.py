"""What a trainer process is told, and what it makes of it first: the parts that all its work is done with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from indexing.corpus.stores.passages import Store
from indexing.indexing_settings import QuestionsConfig
from training.data import Collator, Questions
from training.engine.engine import Engine
from training.models.model_inputs import RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.retriever.reranker import make_pairing
from training.models.system import System
from training.models.text.tokenizers import pad_id, to_text
from training.refreshing.policy import RefreshPlan
from training.reporting.monitor import Monitor
from training.retrieving.hybrid import HybridSearch, Refusion
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import IndexService
from training.training_settings import (
    AlignmentConfig,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    MonitorConfig,
    ObjectiveConfig,
    PretrainingConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)

PROGRESS_EVERY_S = 5.0


@dataclass(kw_only=True)
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
    plan: RefreshPlan = field(default_factory=RefreshPlan)  # the rest of the refresh policy
    max_staleness_steps: int = 0
    wait_timeout_s: float = 1800.0  # for a generation, at the start and at the end
    index_from_snapshot: bool = False  # the service was started with the generation that the checkpoint names
    config: dict[str, Any] = field(default_factory=dict)  # resolved settings, for the monitor
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    evaluate_preferences: str = ""  # store of pairs, or "" where none are measured
    corpus: str = ""  # folder of the changes made to the passages, now and while the stage runs; "": they stay
    reranker: RerankerConfig = field(default_factory=RerankerConfig)


class Parts:
    """Models, engine, index and monitor of one trainer process."""

    def __init__(
        self,
        job: StageJob,
        store: Store,
        *,
        system: System,
        tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
        engine: Engine,
        service: IndexService | None,
        monitor: Monitor,
    ) -> None:
        """`tokenizers` are the retriever's and the generator's."""
        self.job, self.store, self.system, self.tokenizers = job, store, system, tokenizers
        self.engine, self.service, self.monitor = engine, service, monitor
        self.run_dir = Path(job.run_dir)
        self.pad_id = pad_id(tokenizers[0])
        self.pairing = make_pairing(job.reranker, tokenizers[0], Path(job.tokenizers))
        self.to_text: Callable[[Any], str] = lambda tokens: to_text(tokenizers[1], tokens)
        self._last_progress = 0.0

    @property
    def retriever_trains(self) -> bool:
        """Whether the passage encoder changes, so that the index has something to follow."""
        return any(p.requires_grad for p in self.system.retriever.passage_encoder.parameters())

    @property
    def index_is_fresh(self) -> bool:
        """Whether the vectors of the index are those of the passage encoder at every step, in full precision."""
        return not self.retriever_trains and self.job.publish_precision == "float32"

    def hybrid_search(self, questions: Questions) -> HybridSearch | None:
        """How passages for `questions` are found by vectors and words; None where by vectors alone. Raises ValueError
        where the index service has no lexical index."""
        if self.job.retrieval.hybrid == "none" or self.service is None:
            return None
        if self.service.lexical is None:
            raise ValueError(f"retrieval.hybrid={self.job.retrieval.hybrid}: the index service has no lexical index")
        return HybridSearch(
            self.service,
            self.service.lexical,
            text_of=questions.text,
            config=self.job.retrieval,
            weight=self.lexical_weight,
            is_living=self.store.is_living,
        )

    def refusion(self) -> Refusion | None:
        """How hits of both indexes are fused by fresh scores; None where there is but one."""
        if self.job.retrieval.hybrid == "none":
            return None
        return Refusion(self.job.retrieval, self.lexical_weight)

    @torch.no_grad()
    def lexical_weight(self) -> float:
        """What a lexical score of 1 adds to an inner product now. Collective under ZeRO 3."""
        return float(self.engine("lexical_weight"))

    @property
    def weighs_words(self) -> bool:
        """Whether lexical scores are part of p(z|q)."""
        return self.system.retriever.lexical is not None

    def selection(self, collator: Collator) -> Reranking | None:
        """How hits are re-ranked; None without a re-ranker. The collator then makes pairs, too."""
        collator.pairing = self.pairing
        if self.pairing is None:
            return None
        return Reranking(self._rank, collator, self.job.reranker.candidates, self.job.evaluation.batch_size)

    @torch.no_grad()
    def _rank(self, batch: RetrievalBatch) -> torch.Tensor:
        with evaluating(self.engine.module):
            return self.engine("rank", batch.to(self.engine.device))

    def progress(self, text: str) -> None:
        """Say how far something is, every few seconds."""
        if time.monotonic() - self._last_progress > PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            self.monitor.message(text)
