"""Answer one question from a checkpoint, in this process: no Ray, no engine."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.prepare import prepare_data
from cluster.settings import Settings
from cluster.snapshots import fits_changes
from indexing.corpus import Question
from indexing.encode import Encode, encode_numbers
from indexing.filters import parse_filter
from indexing.live import LiveStore
from indexing.merge import Hits, merge
from indexing.metadata import MetadataColumns
from indexing.questions import write_questions
from indexing.shard import Shard, shard_ranges
from training.checkpoint import load_weights
from training.data import Collator
from training.models.build import build_system, fit_weights
from training.models.decode import marginal_answers, restore_spelling, top1_answers
from training.models.encoder import TextEncoder
from training.models.prompts import QuestionText
from training.models.sides import (
    generator_answer_side,
    generator_question_side,
    retriever_question_side,
)
from training.models.system import Answers, System
from training.models.tokenizers import load_tokenizer, pad_id, to_text
from training.named_weights import load_weights_into

WIDTH = 100  # characters of a passage that are printed


def answer_question(settings: Settings, root: Path, checkpoint: str, question: str) -> str:
    """The answer, then the passages that were read: p(z|q), id, title, text. Raises ValueError without a question."""
    if not question.strip():
        raise ValueError("ask needs a question")
    folder = Path(checkpoint)
    tokenizers = (
        load_tokenizer(folder / "tokenizers" / "retriever"),
        load_tokenizer(folder / "tokenizers" / "generator"),
    )
    prepared = prepare_data(settings, root, lambda _: None, splits=[])
    store = LiveStore.open_with(prepared.passages, folder.parent.parent / "corpus")
    system = build_system(settings.encoder, settings.generator, "none", tokenizers, settings.run.seed).eval()
    load_weights_into(system, fit_weights(load_weights(folder), system))
    with tempfile.TemporaryDirectory() as scratch:
        sides = [
            retriever_question_side(tokenizers[0], settings.encoder),
            generator_question_side(tokenizers[1], settings.generator),
        ]
        asked = write_questions(
            Path(scratch) / "asked",
            [Question("asked", question, [""])],
            sides,
            generator_answer_side(tokenizers[1], settings.generator),
            store,
            QuestionText(tokenizers[1], settings.generator),
        )
        collator = Collator(store, asked, system.generator, pad_id(tokenizers[0]))
        numbers = np.array([0])
        with torch.inference_mode():
            queries = system("encode_questions", *collator.question_tensors(numbers)).numpy()
            hits = _search(settings, store, system.retriever.passage_encoder, folder, queries)
            if not hits.ids.size:
                raise ValueError(f"no passage passes the filter retrieval.where={settings.retrieval.where}")
            answers = _answer(settings, system, collator, hits.ids)
    passages = [store.passage(int(row)) for row in hits.ids[0]]
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
    prior = answers.log_prior.exp()[0].tolist()
    lines = [answer, "", f"from {checkpoint}; p(z|q), index score, passage:"]
    for share, score, passage in zip(prior, hits.scores[0].tolist(), passages, strict=True):
        text = passage.text if len(passage.text) <= WIDTH else f"{passage.text[:WIDTH]}..."
        lines.append(f"  {share:.3f}  {score:.3f}  {passage.id}  {passage.title}: {text}")
    return "\n".join(lines)


def _answer(settings: Settings, system: System, collator: Collator, hits: np.ndarray) -> Answers:
    numbers = np.array([0])
    batch = collator(numbers, list(hits), with_answers=False)
    bias = settings.objective.name == "fused" and settings.objective.score_bias
    return system("answer", batch, settings.evaluation.decoding, settings.objective.temperature, bias)


def _search(settings: Settings, store: LiveStore, encoder: TextEncoder, checkpoint: Path, queries: np.ndarray) -> Hits:
    """Search the generation that the checkpoint names, brought up to the corpus as it is now; where it is not on disk,
    the whole corpus is encoded."""
    config, where = replace(settings.index, device="cpu"), parse_filter(settings.retrieval.where)
    generation = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["generation"]
    directory = checkpoint.parent.parent / "index" / f"generation-{generation}"
    saved = generation >= 0 and fits_changes(directory, store.log)
    table, encode, log = store.tokens("retriever"), encode_function(encoder), store.log
    tokens = settings.refresh.batch_tokens
    ranges = shard_ranges(log.num_base, config.num_shards)
    metadata = [MetadataColumns(store, *bounds, number, len(ranges)) for number, bounds in enumerate(ranges)]
    shards = [Shard(number, *bounds, config, metadata=metadata[number]) for number, bounds in enumerate(ranges)]
    for number, shard in enumerate(shards):
        shard.hide(log.version, log.deleted_at())
        owned = log.owned(number, len(shards), shard.start, shard.stop, log.version)
        if saved:
            shard.load(generation, directory)
            origin, known = generation, log.num_numbers(shard.status().corpora[generation])
            mine = np.empty(0, np.int64) if owned is None else owned[owned >= known]
            shard.derive(generation + 1, origin, mine, corpus_version=log.version)
        else:
            mine = np.arange(shard.start, shard.stop) if owned is None else owned
            shard.begin(generation + 1, 0, owned, log.version)
        if len(mine):
            shard.stage(generation + 1, 0, mine, encode_numbers(table, mine, encode, tokens))
        shard.prepare(generation + 1)
        shard.commit(generation + 1)
    found = [shard.search(queries, settings.retrieval.k, where=where) for shard in shards]
    return merge(found, settings.retrieval.k, allow_fewer=where is not None)


def encode_function(encoder: TextEncoder) -> Encode:
    """`encoder` as `indexing.encode` calls it: numpy in, numpy out."""

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()

    return encode
