"""Makes the micro-batches of a stage: spans of the corpus, examples cut from it, questions, judged or sampled
answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from indexing.corpus.stores.duplicates import open_groups
from indexing.corpus.stores.questions import QuestionStore
from training.data import ClozeSource, Collator, Stream, encode_questions
from training.feeding.alignment import ReferencedBatches, SampledBatches, make_collator
from training.feeding.answers import MORE_FOR_REFUSALS, TrainingAnswers
from training.feeding.batches import ClosedBookBatches, ClozeBatches, RetrievedBatches, WithPairs
from training.feeding.long_context import LongContext, LongContextBatches
from training.feeding.mixture import contrasted
from training.feeding.pretraining import (
    HELD_OUT,
    HELD_OUT_SEED,
    TRAINING,
    CorpusQuestions,
    FairSearch,
    example_sides,
    split_passages,
)
from training.feeding.reference import Reference
from training.job import Parts
from training.loop import Source
from training.objectives.check import samples_answers
from training.objectives.dispatch import needs
from training.refreshing.drift import PROBE_FACTOR, DriftProbe
from training.retrieving.hybrid import HybridSearch
from training.retrieving.rerank import Reranking
from training.retrieving.rescore import FreshVectors, Rescorer
from training.retrieving.retrieve import IndexService, Prefetcher, Search
from training.training_settings import PREFERENCE

PROBE = 21  # purpose of the random generator that draws the probe


class CorpusExamples:
    """Examples of pretraining, held-out ones, and searches that leave out the passages that they were cut from."""

    def __init__(self, parts: Parts) -> None:
        self.parts, job, settings = parts, parts.job, parts.settings
        config = settings.pretraining
        self.groups = np.array(open_groups(job.duplicates))
        train, out = split_passages(self.groups, config.held_out)
        sides = example_sides(parts.text)
        self.training = CorpusQuestions(parts.store, train, config=config, sides=sides, seed=job.seed, purpose=TRAINING)
        self.held_out: CorpusQuestions | None = None
        if len(out) and config.held_out_examples:
            self.held_out = CorpusQuestions(
                parts.store, out, config=config, sides=sides, seed=HELD_OUT_SEED, purpose=HELD_OUT
            )

    def search(self, questions: CorpusQuestions) -> FairSearch:
        """Return the search of passages for `questions`."""
        assert self.parts.service is not None
        margin, hybrid = self.parts.settings.pretraining.margin, self.parts.hybrid_search(questions)
        return FairSearch(self.parts.service, questions, groups=self.groups, margin=margin, search=hybrid)


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """The questions or examples that a stage trains on, before any passage is found for them."""

    stream: Stream
    batch_of: Callable[[int], np.ndarray]  # numbers of the questions of a batch; int64 [batch]
    collator: Collator
    answers: TrainingAnswers | None = None  # None: each question's target
    search: Search | None = None  # None: a search by vectors alone
    hybrid: HybridSearch | None = None  # knows the lexical scores of passages that were no hits


def make_source(
    parts: Parts, corpus: CorpusExamples | None, reference: Reference | None, loader_state: dict[str, Any] | None
) -> Source:
    """Return the micro-batches of a stage, from where the checkpoint stood. `corpus` is given if the stage pretrains
    on it, `reference` if the objective compares with the system at the stage's start."""
    job, settings, engine = parts.job, parts.settings, parts.engine
    place = (job.seed, engine.rank, engine.world_size)
    start = loader_state["number"] if loader_state else 0
    if needs(settings.objective).in_batch:
        stream = Stream(len(parts.store), settings.training.batch_size, *place)
        return ClozeBatches(_pairs(parts, stream, settings.objective.name), engine.device, start)
    examples = _of_corpus(parts, corpus, place) if corpus is not None else _of_questions(parts, place)
    collator, select = examples.collator, parts.selection(examples.collator)
    if settings.retrieval.source == "long":
        most = settings.retrieval.max_context_tokens
        choose = LongContext(collator, most, settings.generator.max_answer_tokens).choose
        return LongContextBatches(
            collator=collator, stream=examples.stream, choose=choose, device=engine.device, number=start
        )
    if parts.service is None:
        source = ClosedBookBatches(
            collator=collator,
            batch_of=examples.batch_of,
            device=engine.device,
            number=start,
            answers=examples.answers,
        )
    else:
        source = _retrieved(parts, parts.service, examples=examples, select=select, start=start)
        if loader_state:
            source.restore(loader_state)
    if samples_answers(settings.objective):
        source = SampledBatches(
            source,
            engine,
            collator=collator,
            store=parts.store,
            to_text=parts.text.to_text,
            max_tokens=settings.generator.max_answer_tokens,
            objective=settings.objective,
            updates_per_sample=settings.alignment.updates_per_sample,
        )
        source.restore(loader_state or {})
    if reference is not None:
        source = ReferencedBatches(source, reference)
    return _with_pairs(parts, corpus, source=source, place=place, start=start)


def _of_corpus(parts: Parts, corpus: CorpusExamples, place: tuple[int, int, int]) -> _Examples:
    """Return examples cut from the corpus; every passage that is read for one is a hit."""
    questions = corpus.training
    stream = Stream(len(questions.candidates), parts.settings.training.batch_size, *place)
    return _Examples(
        stream=stream,
        batch_of=stream.places,
        collator=Collator(parts.store, questions, parts.system.generator, parts.text.pad_id),
        search=corpus.search(questions) if parts.service is not None else None,
    )


def _of_questions(parts: Parts, place: tuple[int, int, int]) -> _Examples:
    """Return questions with answers that are given, judged, or sampled while training."""
    job, settings = parts.job, parts.settings
    questions = QuestionStore.open(job.train_questions, verify=False, corpus=parts.store)
    stream = Stream(len(questions), settings.training.batch_size, *place)
    without_given = settings.objective.name in PREFERENCE or samples_answers(settings.objective)
    answers = None if without_given else _training_answers(parts, questions, stream)
    collator = make_collator(
        settings.objective,
        parts.store,
        questions=questions,
        generator=parts.system.generator,
        pad_id=parts.text.pad_id,
        seed=job.seed,
    )
    hybrid = parts.hybrid_search(questions)
    return _Examples(
        stream=stream, batch_of=stream.batch, collator=collator, answers=answers, search=hybrid, hybrid=hybrid
    )


def _retrieved(
    parts: Parts, service: IndexService, *, examples: _Examples, select: Reranking | None, start: int
) -> RetrievedBatches:
    """Return batches with the passages that the index finds, searched ahead of training."""
    settings, engine, collator = parts.settings, parts.engine, examples.collator
    refuses = settings.questions.refusal_share > 0
    # A labelled passage takes one place: search one more, so that k - 1 others are left.
    k = settings.retrieval.k + (settings.retrieval.source == "gold") + (MORE_FOR_REFUSALS if refuses else 0)
    if select is not None:
        k = max(k, select.candidates)
    k = min(k, service.num_passages)
    reads_all_hits = settings.retrieval.source != "gold" and not refuses  # in the order that they were found in
    candidates, rescore = k, None
    if settings.retrieval.rescore > 1:
        candidates = min(k * settings.retrieval.rescore, service.num_passages)
        rescore = Rescorer(
            FreshVectors(engine, collator),
            k,
            vectors_are_fresh=parts.index_is_fresh,
            keep_vectors=parts.index_is_fresh and reads_all_hits,
            fuse=parts.refusion(),
        )
    prefetcher = Prefetcher(
        service,
        examples.batch_of,
        encode_questions=lambda numbers: encode_questions(engine, collator, numbers),
        k=candidates,
        depth=settings.retrieval.prefetch_depth,
        start=start,
        with_vectors=parts.index_is_fresh and (reads_all_hits or rescore is not None),
        search=examples.search,
        is_living=parts.store.is_living,
        rescore=rescore,
        select=select,
    )
    return RetrievedBatches(
        prefetcher,
        collator,
        config=settings.retrieval,
        device=engine.device,
        stream=examples.stream,
        answers=examples.answers,
        hybrid=examples.hybrid if parts.has_lexical_weight else None,
    )


def _pairs(parts: Parts, stream: Stream, task: str, passages: np.ndarray | None = None) -> ClozeSource:
    return ClozeSource(
        parts.store,
        stream,
        config=replace(parts.settings.objective, name=task),
        separator_id=parts.text.separator_id,
        pad_id=parts.text.pad_id,
        passages=passages,
    )


def _with_pairs(
    parts: Parts, corpus: CorpusExamples | None, *, source: Source, place: tuple[int, int, int], start: int
) -> Source:
    """Return `source` with pairs of the mixture's contrastive tasks beside every micro-batch, cut from the same
    passages as its examples; `source` itself if the mixture has no such task."""
    config = parts.settings.pretraining
    shares = contrasted(config) if corpus is not None else {}
    if corpus is None or not shares:
        return source
    passages = corpus.training.candidates
    stream = Stream(len(passages), config.contrast_passages, *place)
    pairs = {task: _pairs(parts, stream, task, passages) for task in shares}
    return WithPairs(source=source, pairs=pairs, shares=shares, seed=place[0], number=start)


def make_probe(parts: Parts, corpus: CorpusExamples | None) -> DriftProbe:
    """Return the drift probe of the index, on a seeded sample of the training questions or on the first examples of
    pretraining."""
    job, settings, service = parts.job, parts.settings, parts.service
    assert service is not None
    if corpus is not None:
        questions, numbers = corpus.training, np.arange(settings.refresh.probe_questions)
    else:
        questions = QuestionStore.open(job.train_questions, verify=False)
        shuffled = np.random.default_rng([job.seed, PROBE]).permutation(len(questions))
        numbers = np.sort(shuffled[: settings.refresh.probe_questions])
    collator = Collator(parts.store, questions, parts.system.generator, parts.text.pad_id)
    k = min(settings.retrieval.k, service.num_passages)
    depth = min(k * max(settings.retrieval.rescore, PROBE_FACTOR), service.num_passages)
    return DriftProbe(FreshVectors(parts.engine, collator), service, numbers=numbers, k=k, depth=depth)


def _training_answers(parts: Parts, questions: QuestionStore, stream: Stream) -> TrainingAnswers:
    config = parts.settings.questions
    row = parts.text.answer_row(config.refusal) if config.refusal else None
    return TrainingAnswers(
        questions, parts.store, stream=stream, choice=config.target, refusal=row, refusal_share=config.refusal_share
    )
