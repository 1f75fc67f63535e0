"""Answer one question, put in one or several ways, from a checkpoint, in this process: no Ray, no engine."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cluster.commands.local_search import OneGeneration
from cluster.config.settings import Settings
from cluster.prepare.stores import Prepared, prepare_data, reranker_sides
from indexing.corpus.files.corpus import Question
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.questions import QuestionStore, write_questions
from indexing.dense.encode import Encode
from indexing.hits import Hits, chosen
from indexing.lexical.rank_fusion import places_of, reciprocal_rank_fusion
from training.checkpoint import load_weights, saved_names
from training.data import Collator
from training.models.build import build_system, fit_weights
from training.models.generators.decode import marginal_answers, restore_spelling, top1_answers
from training.models.parts.named_weights import load_weights_into
from training.models.retriever.encoder import TextEncoder, with_towers_of
from training.models.retriever.reranker import make_pairing
from training.models.system import Answers, System
from training.models.text.prompts import QuestionText
from training.models.text.token_rows import (
    generator_answer_side,
    generator_question_side,
    retriever_question_side,
)
from training.models.text.tokenizers import load_tokenizer, pad_id, to_text
from training.retrieving.hybrid import HybridSearch
from training.retrieving.rerank import Reranking
from training.retrieving.retrieve import dense_search

WIDTH = 100  # characters of a passage that are printed


@dataclass(frozen=True)
class Retrieved:
    """What was found for the first question, and how: best first."""

    hits: Hits  # of one question [1, k]
    dense: (
        np.ndarray
    )  # int32 [phrasings, k]: place in the dense ranking of each phrasing, from 1; 0: not among its hits
    words: np.ndarray  # int32 [phrasings, k]: likewise in the lexical one


def answer_question(settings: Settings, root: Path, checkpoint: str, questions: Sequence[str]) -> str:
    """The answer to the first of `questions`, then the passages that were read: p(z|q), score, where they came from,
    id, title, text. The others are further ways of putting the same question: each is searched, and the rankings are
    fused by reciprocal rank. Raises ValueError without a question."""
    if not questions or not all(question.strip() for question in questions):
        raise ValueError("ask needs a question")
    folder = Path(checkpoint)
    tokenizers = (
        load_tokenizer(folder / "tokenizers" / "retriever"),
        load_tokenizer(folder / "tokenizers" / "generator"),
    )
    prepared = prepare_data(settings, root, lambda _: None, splits=[])
    store = LiveStore.open_with(prepared.passages, folder.parent.parent / "corpus")
    encoder = with_towers_of(settings.encoder, saved_names(folder))
    system = build_system(
        encoder,
        settings.generator,
        train="none",
        tokenizers=tokenizers,
        seed=settings.run.seed,
        objective=None,
        retrieval=settings.retrieval,
        reranker=settings.reranker,
    ).eval()
    load_weights_into(system, fit_weights(load_weights(folder), system))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        sides = [
            retriever_question_side(tokenizers[0], settings.encoder),
            generator_question_side(tokenizers[1], settings.generator),
            *reranker_sides(settings, root)[1:],
        ]
        asked = write_questions(
            Path(scratch) / "asked",
            [Question(id=f"asked-{number}", text=question, answers=[""]) for number, question in enumerate(questions)],
            sides=sides,
            answer_side=generator_answer_side(tokenizers[1], settings.generator),
            store=store,
            render=QuestionText(tokenizers[1], settings.generator),
        )
        collator = Collator(store, asked, system.generator, pad_id(tokenizers[0]))
        collator.pairing = make_pairing(settings.reranker, tokenizers[0], root / "tokenizers")
        found = _retrieve(settings, system, collator=collator, store=store, checkpoint=folder, prepared=prepared)
        answers = _answer(settings, system, collator, found.hits)
    passages = [store.passage(int(row)) for row in found.hits.ids[0]]
    texts = [to_text(tokenizers[1], tokens) for tokens in answers.decoded.tokens]
    sources = [f"{passage.title} {passage.text}" for passage in passages]
    fused = settings.evaluation.decoding.mode == "fused"
    texts = [restore_spelling(text, sources if fused else [sources[i]]) for i, text in enumerate(texts)]
    match settings.evaluation.decoding.mode:
        case "fused":
            answer = texts[0]
        case "top1":
            answer = top1_answers(texts, answers.log_prior)[0]
        case _:
            answer = marginal_answers(texts, answers.decoded.log_probs, answers.log_prior)[0]
    origins = _origins(settings, found)
    lines = [answer, "", f"from {checkpoint}; p(z|q), index score, {'places, ' if origins[0] else ''}passage:"]
    prior = answers.log_prior.exp()[0].tolist()
    for share, score, origin, passage in zip(prior, found.hits.scores[0].tolist(), origins, passages, strict=True):
        text = passage.text if len(passage.text) <= WIDTH else f"{passage.text[:WIDTH]}..."
        lines.append(f"  {share:.3f}  {score:.3f}  {origin}{passage.id}  {passage.title}: {text}")
    return "\n".join(lines)


def _retrieve(
    settings: Settings, system: System, *, collator: Collator, store: LiveStore, checkpoint: Path, prepared: Prepared
) -> Retrieved:
    """Search every phrasing as training does, fuse the rankings, re-rank by the first phrasing, keep the best k."""
    retrieval, reranker = settings.retrieval, settings.reranker
    questions = collator.stored
    numbers = np.arange(len(questions))
    index = OneGeneration(
        settings,
        store,
        checkpoint=checkpoint,
        encode=encode_function(system.retriever.passage_encoder),
        lexical=prepared.lexical,
    )
    queries = system("encode_questions", *collator.question_tensors(numbers)).numpy()
    k = min(retrieval.k, index.num_passages)
    rankings = 1 if index.lexical is None else 2  # every candidate of each phrasing counts when these are fused
    several = rankings * max(retrieval.candidates, k) if len(questions) > 1 else k
    depth = min(max(several, reranker.candidates if reranker.mode != "off" else k), index.num_passages)
    hybrid = None
    if index.lexical is not None:
        hybrid = HybridSearch(
            index,
            index.lexical,
            text_of=questions.text,
            config=retrieval,
            weight=lambda: float(system("lexical_weight")),
        )
    hits = (hybrid or dense_search(index))(numbers, queries, depth).result()
    if hits.places is None:
        places = np.broadcast_to(np.arange(1, depth + 1, dtype=np.int32), hits.ids.shape)
        hits = replace(hits, places=np.stack([places, np.zeros_like(places)], axis=-1))
    first = _first(hits, questions, hybrid=hybrid, constant=retrieval.rrf_constant, depth=depth)
    if reranker.mode != "off":
        select = Reranking(lambda batch: system("rank", batch), collator, reranker.candidates, 1)
        first = select(numbers[:1], first)
    first = chosen(first, np.arange(k)[None])
    return Retrieved(first, *(_places(first.ids, hits, ranking) for ranking in (0, 1)))


def _first(hits: Hits, questions: QuestionStore, *, hybrid: HybridSearch | None, constant: float, depth: int) -> Hits:
    """Hits of the first question: its own, or those of all phrasings fused."""
    if len(hits.ids) == 1:
        return replace(hits, places=None)
    scores, ids = reciprocal_rank_fusion([row[None] for row in hits.ids], constant, depth)
    lexical = None if hybrid is None else hybrid.scores(np.arange(1), list(ids), hits.corpus)
    return replace(hits, ids=ids, scores=scores, lexical=lexical, vectors=None, versions=None, places=None)


def _places(ids: np.ndarray, hits: Hits, ranking: int) -> np.ndarray:
    """int32 [phrasings, k]: place of each of `ids` [1, k] in one ranking of every phrasing, 0: nowhere."""
    assert hits.places is not None
    rows = np.repeat(ids, len(hits.ids), axis=0)
    at = places_of(rows, hits.ids)
    known = np.take_along_axis(hits.places[:, :, ranking], np.maximum(at - 1, 0), axis=1)
    return np.where(at > 0, known, 0)


def _origins(settings: Settings, found: Retrieved) -> list[str]:
    """Where each passage came from, as it is printed; empty where there was but one ranking."""
    hybrid = settings.retrieval.hybrid != "none"
    if not hybrid and len(found.dense) == 1:
        return [""] * found.dense.shape[1]

    def shown(places: np.ndarray) -> str:
        return "/".join(str(place) if place else "-" for place in places.tolist())

    lines = []
    for dense, words in zip(found.dense.T, found.words.T, strict=True):
        lexical = f"  words {shown(words)}" if hybrid else ""
        lines.append(f"dense {shown(dense)}{lexical}  ")
    return lines


def _answer(settings: Settings, system: System, collator: Collator, hits: Hits) -> Answers:
    batch = collator(np.array([0]), list(hits.ids), with_answers=False, lexical=hits.lexical)
    bias = settings.objective.name == "fused" and settings.objective.score_bias
    return system("answer", batch, settings.evaluation.decoding, settings.objective.temperature, bias)


def encode_function(encoder: TextEncoder) -> Encode:
    """`encoder` as `indexing.dense.encode` calls it: numpy in, numpy out."""

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()

    return encode
