"""Keeps a trained stage loaded in this process, to be asked again and again, without Ray and without an engine.

Every method takes the one lock of the run, so that threads take turns. Other processes may train
the stage or change its corpus meanwhile: a change of the corpus is looked for before each question and encoded then;
newer weights are read by loading the run again.
"""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.commands.answer import Answer, Passage
from cluster.commands.local_search import OneGeneration
from cluster.config.settings import Settings
from cluster.prepare.stores import prepare_data
from indexing.allowance import usable_cpus
from indexing.corpus.files.corpus import Question
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.questions import write_questions
from indexing.declare import refuse
from indexing.dense.encode import Encode
from indexing.hits import Hits, chosen
from indexing.lexical.rank_fusion import places_of, reciprocal_rank_fusion
from training.checkpoint import load_weights, saved_names
from training.data import Collator
from training.models.build import build_system, fit_weights
from training.models.generators.decode import marginal_answers, restore_spelling, top1_answers
from training.models.parts.named_weights import load_weights_into
from training.models.retriever.encoder import TextEncoder, with_towers_of
from training.models.system import Answers, System
from training.models.text.packing import pad_rows
from training.retrieving.hybrid import HybridSearch
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import dense_search
from training.run_text import RunText

KINDS = ("question", "passage")


@dataclass(frozen=True)
class Retrieved:
    """Passages found for the first question, best first, and their places in each ranking."""

    hits: Hits  # of one question [1, k]
    dense: np.ndarray  # int32 [phrasings, k]: place in each phrasing's dense ranking, from 1; 0: not among its hits
    lexical: np.ndarray  # int32 [phrasings, k]: place in the lexical ranking, likewise


class LoadedRun:
    """Models, stores and index of a checkpoint. Its methods may be called from any thread."""

    def __init__(self, settings: Settings, root: Path, checkpoint: str) -> None:
        """Read everything but the index, which is made for the first question. `root` holds stores and tokenisers.
        Raises ValueError where neither the store of the corpus nor its files are there."""
        folder = Path(checkpoint)
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))  # torch sees no quota of processors
        self.settings, self.checkpoint = settings, folder
        self.text = RunText.load(settings, folder / "tokenizers")
        self._prepared = prepare_data(settings, root, lambda _: None, splits=[])
        self.store = LiveStore.open_with(self._prepared.passages, folder.parent.parent / "corpus")
        self.system = _load_system(settings, folder, self.text)
        self._index: OneGeneration | None = None
        self._lock = threading.RLock()

    def ask(self, questions: Sequence[str], k: int | None = None, where: Mapping[str, Any] | None = None) -> Answer:
        """Return the answer to the first of `questions`, read from `k` passages that pass the filter `where` (None: as
        the settings have them). The others are further ways of putting the same question: each is searched, and the
        rankings are fused by reciprocal rank. Raises ValueError without a question, and for a wrong k or filter."""
        if not questions or not all(question.strip() for question in questions):
            raise ValueError("ask needs a question")
        with self._lock, torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
            asked = self._asked(questions, k, where)
            collator = self._collator(questions, Path(scratch))
            found = self._retrieve(asked, collator)
            answers = self._answer(collator, found.hits)
            return self._as_answer(found, answers)

    def search(self, question: str, k: int | None = None, where: Mapping[str, Any] | None = None) -> list[Passage]:
        """Return the best `k` passages for a question, as `ask` would read them. Raises as `ask`."""
        if not question.strip():
            raise ValueError("search needs a question")
        with self._lock, torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
            asked = self._asked([question], k, where)
            found = self._retrieve(asked, self._collator([question], Path(scratch)))
            return self._passages(found, [None] * found.hits.ids.shape[1])

    def encode(self, texts: Sequence[str], kind: str = "question") -> np.ndarray:
        """Return float32 [len(texts), dim], the vectors of questions or of passages without title. Raises ValueError
        for another kind."""
        if kind not in KINDS:
            raise ValueError(f"encode: kind={kind!r}: must be one of {', '.join(KINDS)}")
        retriever, run_text = self.system.retriever, self.text
        if kind == "question":
            side, encoder = run_text.question_sides[0], retriever.query_encoder
            pairs = [run_text.render(side.name, Question(id="", text=text, answers=[""])) for text in texts]
        else:
            side, encoder = run_text.passage_sides[0], retriever.passage_encoder
            pairs = [("", text) for text in texts]
        if not texts:
            return np.zeros((0, encoder.dim), np.float32)
        with self._lock, torch.inference_mode():
            ids, mask = pad_rows([np.asarray(row, np.int32) for row in side.tokenize(pairs)], run_text.pad_id)
            return encoder(ids, mask).float().numpy()

    def _asked(self, questions: Sequence[str], k: int | None, where: Mapping[str, Any] | None) -> Settings:
        """Return the settings of one call, after the index was brought up to the corpus as it is now."""
        retrieval = self.settings.retrieval
        if k is not None:
            if k < 1:
                raise refuse("retrieval.k", k, "must be at least 1")
            retrieval = replace(retrieval, k=k)
        if where is not None:
            retrieval = replace(retrieval, where=dict(where))
        if self._index is None:
            self._index = OneGeneration(
                self.settings,
                self.store,
                checkpoint=self.checkpoint,
                encode=encode_function(self.system.retriever.passage_encoder),
                lexical=self._prepared.lexical,
            )
        self._index.follow(retrieval.where)
        return replace(self.settings, retrieval=retrieval)

    def _collator(self, questions: Sequence[str], scratch: Path) -> Collator:
        """Return what makes batches of the questions."""
        asked = write_questions(
            scratch / "asked",
            [Question(id=f"asked-{number}", text=question, answers=[""]) for number, question in enumerate(questions)],
            sides=self.text.question_sides,
            answer_side=self.text.answer_side,
            store=self.store,
            render=self.text.render,
        )
        collator = Collator(self.store, asked, self.system.generator, self.text.pad_id)
        collator.pairing = self.text.pairing
        return collator

    def _retrieve(self, settings: Settings, collator: Collator) -> Retrieved:
        """Search every phrasing as training does, fuse the rankings, re-rank by the first phrasing, keep the best k."""
        index, system = self._index, self.system
        assert index is not None
        retrieval, reranker, questions = settings.retrieval, settings.reranker, collator.stored
        numbers = np.arange(len(questions))
        queries = system.retriever.encode_queries(*collator.question_tensors(numbers)).numpy()
        k = min(retrieval.k, index.num_passages)
        rankings = 1 if index.lexical is None else 2  # every candidate of each phrasing counts when these are fused
        several = rankings * max(retrieval.candidates, k) if len(questions) > 1 else k
        depth = min(max(several, reranker.candidates if reranker.mode != "off" else k), index.num_passages)
        hybrid = None
        if index.lexical is not None:
            hybrid = HybridSearch(
                index, index.lexical, text_of=questions.text, config=retrieval, weight=lambda: _lexical_weight(system)
            )
        hits = (hybrid or dense_search(index))(numbers, queries, depth).result()
        if hits.places is None:
            places = np.broadcast_to(np.arange(1, depth + 1, dtype=np.int32), hits.ids.shape)
            hits = replace(hits, places=np.stack([places, np.zeros_like(places)], axis=-1))
        first = _first(hits, hybrid=hybrid, constant=retrieval.rrf_constant, depth=depth)
        if reranker.mode != "off":
            first = Reranking(system.scores, collator, reranker.candidates, 1)(numbers[:1], first)
        first = chosen(first, np.arange(k)[None])
        return Retrieved(first, *(_places(first.ids, hits, ranking) for ranking in (0, 1)))

    def _answer(self, collator: Collator, hits: Hits) -> Answers:
        batch = collator(np.array([0]), list(hits.ids), with_answers=False, lexical=hits.lexical)
        objective = self.settings.objective
        bias = objective.name == "fused" and objective.score_bias
        return self.system.answer(batch, self.settings.evaluation.decoding, objective.temperature, bias)

    def _as_answer(self, found: Retrieved, answers: Answers) -> Answer:
        """Return the best answer, spelled as the passages have it."""
        passages = self._passages(found, answers.log_prior.exp()[0].tolist())
        texts = [self.text.to_text(tokens) for tokens in answers.decoded.tokens]
        sources = [f"{passage.title} {passage.text}" for passage in passages]
        mode = self.settings.evaluation.decoding.mode
        texts = [restore_spelling(t, sources if mode == "fused" else [sources[i]]) for i, t in enumerate(texts)]
        shares = answers.decoded.log_probs.double().exp().tolist()
        match mode:
            case "fused":
                text, probability = texts[0], shares[0]
            case "top1":
                text = top1_answers(texts, answers.log_prior)[0]
                probability = shares[int(answers.log_prior[0].argmax())]
            case _:
                text = marginal_answers(texts, answers.decoded.log_probs, answers.log_prior)[0]
                priors = answers.log_prior[0].double().exp().tolist()
                same = [_bare(other) == _bare(text) for other in texts]
                probability = sum(p * share for p, share, is_it in zip(priors, shares, same, strict=True) if is_it)
        return Answer(text=text, probability=probability, passages=passages, checkpoint=str(self.checkpoint))

    def _passages(self, found: Retrieved, probabilities: Sequence[float | None]) -> list[Passage]:
        columns = zip(
            found.hits.ids[0].tolist(),
            found.hits.scores[0].tolist(),
            probabilities,
            found.dense.T,
            found.lexical.T,
            strict=True,
        )
        passages: list[Passage] = []
        for row, score, probability, dense, lexical in columns:
            passage = self.store.passage(row)
            passages.append(
                Passage(
                    id=passage.id,
                    title=passage.title,
                    text=passage.text,
                    score=score,
                    probability=probability,
                    metadata=self.store.metadata(row),
                    dense_places=tuple(dense.tolist()),
                    lexical_places=tuple(lexical.tolist()) if self.settings.retrieval.hybrid != "none" else (),
                )
            )
        return passages


def _load_system(settings: Settings, folder: Path, text: RunText) -> System:
    """Return the models of the checkpoint `folder`, in evaluation mode."""
    system = build_system(
        with_towers_of(settings.encoder, saved_names(folder)),
        settings.generator,
        train="none",
        tokenizers=text.tokenizers,
        seed=settings.run.seed,
        objective=None,
        retrieval=settings.retrieval,
        reranker=settings.reranker,
    ).eval()
    load_weights_into(system, fit_weights(load_weights(folder), system))
    return system


def _lexical_weight(system: System) -> float:
    assert system.retriever.lexical is not None
    return float(system.retriever.lexical(torch.ones(1)))


def _first(hits: Hits, *, hybrid: HybridSearch | None, constant: float, depth: int) -> Hits:
    """Return the hits of the first question: those of its only phrasing, or those of all phrasings fused."""
    if len(hits.ids) == 1:
        return replace(hits, places=None)
    scores, ids = reciprocal_rank_fusion([row[None] for row in hits.ids], constant, depth)
    lexical = None if hybrid is None else hybrid.scores(np.arange(1), list(ids), hits.corpus)
    return replace(hits, ids=ids, scores=scores, lexical=lexical, vectors=None, versions=None, places=None)


def _places(ids: np.ndarray, hits: Hits, ranking: int) -> np.ndarray:
    """Return int32 [phrasings, k], the place of each of `ids` [1, k] in one ranking of every phrasing, 0: in none."""
    assert hits.places is not None
    rows = np.repeat(ids, len(hits.ids), axis=0)
    at = places_of(rows, hits.ids)
    known = np.take_along_axis(hits.places[:, :, ranking], np.maximum(at - 1, 0), axis=1)
    return np.where(at > 0, known, 0)


def _bare(text: str) -> str:
    return "".join(text.lower().split())


def encode_function(encoder: TextEncoder) -> Encode:
    """Return `encoder` as `indexing.dense.encode` calls it: numpy in, numpy out."""

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()

    return encode
