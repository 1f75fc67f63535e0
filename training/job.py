"""The description of a stage that is sent to a trainer process, and the objects that the process builds from it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from indexing.corpus.stores.passages import Store
from indexing.indexing_settings import QuestionsConfig
from training.data import Collator, Questions
from training.engine.engine import Engine
from training.example_settings import AlignmentConfig, PretrainingConfig
from training.models.model_inputs import RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.system import System
from training.refreshing.policy import RefreshPlan
from training.reporting.monitor import Monitor
from training.retrieving.hybrid import HybridSearch, Refusion
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import IndexService
from training.run_text import RunText
from training.stopped import Stopped
from training.training_settings import (
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    MonitorConfig,
    ObjectiveConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)

PROGRESS_EVERY_S = 5.0  # Seconds between two messages of progress: seldom enough for a log, often enough for a watcher


@dataclass(kw_only=True)
class StageSettings:
    """The sections of the settings that a trainer process reads, under the names that they have in a YAML file."""

    encoder: EncoderConfig
    generator: GeneratorConfig
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    refresh: RefreshPlan = field(default_factory=RefreshPlan)  # the part of the section that the trainer reads
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


@dataclass(kw_only=True)
class StageJob:
    """One stage as it is sent to a trainer process: settings, paths and plain values, no open object."""

    settings: StageSettings
    run_dir: str
    passages: str  # folder of the store of the corpus
    train_questions: str  # folder of the store (of judged answers for preference objectives); "": none
    evaluate_questions: str  # folder of the store; "": the stage measures no questions
    tokenizers: str  # folder of retriever/, generator/ and, for a re-ranker with a tokeniser of its own, reranker/
    init_from: str  # checkpoint whose weights the stage starts from; "": as built
    seed: int
    threads: int  # Number of CPU threads of the process
    fingerprint: str  # hash of the settings; the evaluation carries it, so that a finished stage is recognised
    evaluate_preferences: str = ""  # folder of the store of pairs; "": the stage measures none
    duplicates: str = ""  # file of groups of near-duplicate passages, if the stage pretrains on the corpus
    corpus: str = ""  # folder of the changes made to the passages, before and during the stage; "": there are none
    wait_timeout_s: float = 1800.0  # Seconds to wait for an index generation, at the start and at the end
    index_from_snapshot: bool = False  # the service was started with the generation that the checkpoint names
    config: dict[str, Any] = field(default_factory=dict)  # all settings as plain values, for the monitor


class Parts:
    """Models, engine, index and monitor of one trainer process."""

    def __init__(
        self,
        job: StageJob,
        store: Store,
        *,
        system: System,
        text: RunText,
        engine: Engine,
        service: IndexService | None,
        monitor: Monitor,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stop_asked` says, without waiting, whether this process knows that the stage is to stop."""
        self.job, self.settings, self.store = job, job.settings, store
        self.system, self.text = system, text
        self.engine, self.service, self.monitor = engine, service, monitor
        self.run_dir = Path(job.run_dir)
        self.stop_asked = stop_asked
        self._last_progress = 0.0

    @property
    def retriever_trains(self) -> bool:
        """True if the passage encoder trains, so that the index has something to follow."""
        return any(p.requires_grad for p in self.system.retriever.passage_encoder.parameters())

    @property
    def index_is_fresh(self) -> bool:
        """True if the index holds the vectors of the passage encoder at every step, in full precision."""
        return not self.retriever_trains and self.settings.refresh.precision == "float32"

    def hybrid_search(self, questions: Questions) -> HybridSearch | None:
        """Return the search of passages for `questions` by both indexes; None if vectors alone are searched. Raises
        ValueError if the index service has no lexical index."""
        retrieval = self.settings.retrieval
        if retrieval.hybrid == "none" or self.service is None:
            return None
        if self.service.lexical is None:
            raise ValueError(f"retrieval.hybrid={retrieval.hybrid}: the index service has no lexical index")
        return HybridSearch(
            self.service,
            self.service.lexical,
            text_of=questions.text,
            config=retrieval,
            weight=self.lexical_weight,
            is_living=self.store.is_living,
        )

    def refusion(self) -> Refusion | None:
        """Return the fusion of both indexes' hits by fresh scores; None if there is one index."""
        if self.settings.retrieval.hybrid == "none":
            return None
        return Refusion(self.settings.retrieval, self.lexical_weight)

    @torch.no_grad()
    def lexical_weight(self) -> float:
        """Return the number that a lexical score of 1 now adds to an inner product. Collective under ZeRO 3."""
        return float(self.engine(System.lexical_weight))

    @property
    def has_lexical_weight(self) -> bool:
        """True if lexical scores are part of p(z|q), with a weight that trains."""
        return self.system.retriever.lexical is not None

    def selection(self, collator: Collator) -> Reranking | None:
        """Return what re-ranks the hits; None without a re-ranker. With one, the collator makes pairs, too."""
        collator.pairing = self.text.pairing
        if collator.pairing is None:
            return None
        return Reranking(self._rank, collator, self.settings.reranker.candidates, self.settings.evaluation.batch_size)

    @torch.no_grad()
    def _rank(self, batch: RetrievalBatch) -> torch.Tensor:
        with evaluating(self.engine.module):
            return self.engine(System.scores, batch.to(self.engine.device))

    def progress(self, text: str) -> None:
        """Print `text`, at most once every few seconds."""
        if time.monotonic() - self._last_progress > PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            self.monitor.message(text)

    def stop_point(self) -> None:
        """Raise Stopped, on every rank, if any rank knows that the stage is to stop. Collective."""
        if self.engine.any_rank(self.stop_asked()):
            raise Stopped

    def after_batch(self, text: str) -> None:
        """Print progress as `progress` does, at a stop point. Collective."""
        self.progress(text)
        self.stop_point()
