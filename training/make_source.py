"""The micro-batches of a stage: spans of the corpus, examples cut from it, questions, or judged and sampled answers."""

from dataclasses import replace
from typing import Any

import numpy as np

from indexing.corpus.stores.duplicates import open_groups
from indexing.corpus.stores.questions import QuestionStore
from training.data import ClozeSource, Collator, Stream, encode_questions
from training.feeding.alignment import aligned, make_collator
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
from training.retrieving.rescore import FreshVectors, Rescorer
from training.retrieving.retrieve import Prefetcher
from training.training_settings import PREFERENCE

PROBE = 21  # purpose of the random generator that draws the probe


class CorpusExamples:
    """Examples of pretraining, those that are held out, and searches that leave out what they were cut from."""

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
        """How passages for `questions` are searched."""
        assert self.parts.service is not None
        margin, hybrid = self.parts.settings.pretraining.margin, self.parts.hybrid_search(questions)
        return FairSearch(self.parts.service, questions, groups=self.groups, margin=margin, search=hybrid)


def make_source(
    parts: Parts, corpus: CorpusExamples | None, reference: Reference | None, loader_state: dict[str, Any] | None
) -> Source:
    """Micro-batches from where the checkpoint stood; `corpus` where the stage pretrains on it."""
    job, settings, engine = parts.job, parts.settings, parts.engine
    place = (job.seed, engine.rank, engine.world_size)
    start = loader_state["number"] if loader_state else 0
    if needs(settings.objective).in_batch:
        stream = Stream(len(parts.store), settings.training.batch_size, *place)
        return ClozeBatches(_pairs(parts, stream, settings.objective.name), engine.device, start)
    if corpus is not None:
        questions = corpus.training
        stream = Stream(len(questions.candidates), settings.training.batch_size, *place)
        answers, batch_of = None, stream.places
        collator = Collator(parts.store, questions, parts.system.generator, parts.text.pad_id)
        hybrid = None  # every passage that is read is a hit
        search = corpus.search(questions) if parts.service is not None else None
    else:
        questions = QuestionStore.open(job.train_questions, verify=False, corpus=parts.store)
        stream = Stream(len(questions), settings.training.batch_size, *place)
        judged = settings.objective.name in PREFERENCE or samples_answers(settings.objective)
        answers, batch_of = None if judged else _training_answers(parts, questions, stream), stream.batch
        collator = make_collator(
            settings.objective,
            parts.store,
            questions=questions,
            generator=parts.system.generator,
            pad_id=parts.text.pad_id,
            seed=job.seed,
        )
        search = hybrid = parts.hybrid_search(questions)
    select = parts.selection(collator)
    if settings.retrieval.source == "long":
        long_context = LongContext(
            collator, settings.retrieval.max_context_tokens, settings.generator.max_answer_tokens
        )
        return LongContextBatches(collator, stream, choose=long_context.choose, device=engine.device, start=start)
    if parts.service is None:
        source = ClosedBookBatches(collator, batch_of, device=engine.device, start=start, answers=answers)
        return _with_pairs(
            parts,
            corpus,
            source=_aligned(parts, source, collator=collator, reference=reference, loader_state=loader_state),
            place=place,
            start=start,
        )
    k, depth = settings.retrieval.k, settings.retrieval.prefetch_depth
    # A labelled passage takes one place: search one more, so that k - 1 others are left.
    k += (settings.retrieval.source == "gold") + (MORE_FOR_REFUSALS if settings.questions.refusal_share else 0)
    if select is not None:
        k = max(k, select.candidates)
    k = min(k, parts.service.num_passages)
    as_they_came = settings.retrieval.source != "gold" and not settings.questions.refusal_share
    candidates, rescore = k, None
    if settings.retrieval.rescore > 1:
        candidates = min(k * settings.retrieval.rescore, parts.service.num_passages)
        keep_vectors = parts.index_is_fresh and as_they_came
        fresh, fuse = FreshVectors(engine, collator), parts.refusion()
        rescore = Rescorer(fresh, k, vectors_are_fresh=parts.index_is_fresh, keep_vectors=keep_vectors, fuse=fuse)
    prefetcher = Prefetcher(
        parts.service,
        batch_of,
        encode_questions=lambda numbers: encode_questions(engine, collator, numbers),
        k=candidates,
        depth=depth,
        start=start,
        with_vectors=parts.index_is_fresh and (as_they_came or rescore is not None),
        search=search,
        is_living=parts.store.is_living,
        rescore=rescore,
        select=select,
    )
    weighed = hybrid if parts.weighs_words else None
    source = RetrievedBatches(
        prefetcher,
        collator,
        config=settings.retrieval,
        device=engine.device,
        stream=stream,
        answers=answers,
        hybrid=weighed,
    )
    if loader_state:
        source.restore(loader_state)
    return _with_pairs(
        parts,
        corpus,
        source=_aligned(parts, source, collator=collator, reference=reference, loader_state=loader_state),
        place=place,
        start=start,
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
    """Pairs of the mixture's contrastive tasks beside every micro-batch, cut from the same passages as its examples."""
    config = parts.settings.pretraining
    shares = contrasted(config) if corpus is not None else {}
    if corpus is None or not shares:
        return source
    passages = corpus.training.candidates
    stream = Stream(len(passages), config.contrast_passages, *place)
    return WithPairs(
        source,
        {task: _pairs(parts, stream, task, passages) for task in shares},
        shares=shares,
        seed=place[0],
        start=start,
    )


def make_probe(parts: Parts, corpus: CorpusExamples | None) -> DriftProbe:
    """What measures the drift of the index: a seeded sample of the questions, or the first examples, trained on."""
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


def _aligned(
    parts: Parts,
    source: Source,
    *,
    collator: Collator,
    reference: Reference | None,
    loader_state: dict[str, Any] | None,
) -> Source:
    settings = parts.settings
    return aligned(
        source,
        parts.engine,
        collator=collator,
        store=parts.store,
        to_text=parts.text.to_text,
        max_tokens=settings.generator.max_answer_tokens,
        objective=settings.objective,
        alignment=settings.alignment,
        reference=reference,
        loader_state=loader_state,
    )


def _training_answers(parts: Parts, questions: QuestionStore, stream: Stream) -> TrainingAnswers:
    config = parts.settings.questions
    row = parts.text.answer_row(config.refusal) if config.refusal else None
    return TrainingAnswers(
        questions, parts.store, stream=stream, choice=config.target, refusal=row, refusal_share=config.refusal_share
    )
