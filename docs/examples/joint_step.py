"""The joint step of Tandem without Ray: one loss trains a retriever and a generator together.

    python docs/examples/joint_step.py

A synthetic world of invented people gives passages and questions. Six passages are about each person, and a question
shares no word with any of them but the name: word overlap cannot tell which of the six answers. Nothing in the training
labels the right passage. The retriever learns it from the answer alone, because the likelihood of the answer is a sum
over the retrieved passages, each weighted by the retriever (RAG-sequence, Lewis et al. 2020, equation 1).

Tandem does the same at scale: see `training/loop.py`. The index is sharded there, and rebuilt beside the training.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from indexing.corpus.files.corpus import read_corpus, read_questions
from indexing.corpus.files.world import write_world
from indexing.corpus.stores.passages import TokenSide
from indexing.dense.exact import search_exactly
from indexing.indexing_settings import CorpusConfig, QuestionsConfig, WorldConfig
from training import training_settings as config
from training.models.build import build_generator
from training.models.generators.generator import Generator
from training.models.retriever.encoder import Retriever, TextEncoder, build_retriever
from training.models.text import token_rows
from training.models.text.packing import pad_rows
from training.models.text.tokenizers import train_wordpiece
from training.objectives.inputs import Likelihoods
from training.objectives.marginal import rag_sequence

K = 8  # passages that the generator reads for each question
BATCH = 32  # questions of one step
STEPS = 40
REFRESH_EVERY = 4  # steps between two encodings of the whole corpus
PAD = 0  # token that fills short rows; always masked

ENCODER = config.EncoderConfig(fresh=config.FreshEncoderConfig(num_layers=1, hidden=64, intermediate=128))
GENERATOR = config.GeneratorConfig(fresh=config.FreshGeneratorConfig(num_encoder_layers=1, hidden=64, intermediate=128))

Rows = list[np.ndarray]  # token ids of texts of unequal length
Models = tuple[Retriever, Generator]


@dataclass(kw_only=True)
class Data:
    """A corpus and its questions as token rows: retriever and generator each have rows of their own."""

    passages: Rows
    passages_to_read: Rows
    questions: Rows
    questions_to_read: Rows
    answers: Rows
    gold: np.ndarray  # int64 [questions]: the passage that answers; measures recall, trains nothing


def prepare(folder: Path) -> tuple[Data, Models]:
    """Write a world to `folder`, train a tokeniser on it, and build fresh models."""
    write_world(WorldConfig(num_people=60, num_values=40), folder)
    passages, _ = read_corpus(CorpusConfig(path=str(folder)))
    questions = read_questions(QuestionsConfig(path=str(folder)), "train")
    pairs = [(passage.title, passage.text) for passage in passages]
    asked, answers = [("", q.text) for q in questions], [("", q.answers[0]) for q in questions]
    tokenizer = train_wordpiece(config.TokenizerConfig(vocabulary=1000), map(" ".join, pairs + asked))
    number = {passage.id: row for row, passage in enumerate(passages)}
    data = Data(
        passages=rows_of(token_rows.retriever_passage_side(tokenizer, ENCODER), pairs),
        passages_to_read=rows_of(token_rows.generator_passage_side(tokenizer, GENERATOR, 24), pairs),
        questions=rows_of(token_rows.retriever_question_side(tokenizer, ENCODER), asked),
        questions_to_read=rows_of(token_rows.generator_question_side(tokenizer, GENERATOR), asked),
        answers=rows_of(token_rows.generator_answer_side(tokenizer, GENERATOR), answers),
        gold=np.array([number[question.relevant[0]] for question in questions]),
    )
    torch.manual_seed(0)
    return data, (build_retriever(ENCODER, "both", len(tokenizer)), build_generator(GENERATOR, tokenizer))


def rows_of(side: TokenSide, pairs: list[tuple[str, str]]) -> Rows:
    """Token rows of (title, text) pairs as one side reads them."""
    return [np.array(row, np.int64) for row in side.tokenize(pairs)]


@torch.no_grad()
def encode(tower: TextEncoder, rows: Rows) -> np.ndarray:
    """Vectors float32 [rows, dim], without gradient: what an index holds, and what is searched with."""
    return tower(*pad_rows(rows, PAD)).numpy()


def joint_loss(data: Data, numbers: np.ndarray, index: np.ndarray, *, models: Models) -> tuple[Tensor, float]:
    """Search `index` for questions `numbers` [batch] and read the K hits. Return the loss, and recall@1."""
    retriever, generator = models
    questions = [data.questions[i] for i in numbers]

    # 1. Search with the vectors of the last refresh: no gradient passes here.
    _, hits = search_exactly(index, encode(retriever.query_encoder, questions), K)  # int64 [batch, K]

    # 2. Score the hits again with both towers as they are now: here the gradient reaches the retriever.
    queries = retriever.encode_queries(*pad_rows(questions, PAD))  # [batch, dim]
    found = retriever.encode_passages(*pad_rows([data.passages[row] for row in hits.reshape(-1)], PAD))
    scores = retriever.scores(queries, found.unflatten(0, hits.shape))  # [batch, K]

    # 3. Read each passage with the question, and score the answer: here the gradient reaches the generator.
    batch = generator.collate(
        [data.questions_to_read[i] for i in numbers],
        [[data.passages_to_read[row] for row in row_hits] for row_hits in hits],
        [data.answers[i] for i in numbers],
    )
    tokens = generator.per_passage_log_probs(generator.read(batch), batch)  # [batch, K, tokens]

    # 4. -log sum_k p(z_k | q) p(answer | q, z_k), mean over the questions: one loss for both models.
    loss, _ = rag_sequence(
        Likelihoods(scores=scores, passage_mask=batch.passage_mask, answer_mask=batch.answer_mask, per_passage=tokens)
    )
    return loss, float((hits[:, 0] == data.gold[numbers]).mean())


def train(data: Data, models: Models) -> list[tuple[float, float]]:
    """Train both models for `STEPS` steps. Print and return loss and recall@1 of 96 questions every ten steps."""
    rates = [{"params": model.parameters(), "lr": rate} for model, rate in zip(models, (1e-3, 2e-3), strict=True)]
    optimizer, random, measured = torch.optim.Adam(rates), np.random.default_rng(0), list[tuple[float, float]]()
    index = encode(models[0].passage_encoder, data.passages)
    for step in range(STEPS + 1):
        if step and step % REFRESH_EVERY == 0:  # the index follows the passage encoder
            index = encode(models[0].passage_encoder, data.passages)
        if step % 10 == 0:
            with torch.no_grad():
                loss, recall = joint_loss(data, np.arange(96), index, models=models)
            print(f"step {step:2}  loss {loss:5.2f}  recall@1 {recall:.2f}", flush=True)
            measured.append((loss.item(), recall))
        loss, _ = joint_loss(data, random.choice(len(data.questions), BATCH, replace=False), index, models=models)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return measured


def main() -> None:
    """Run the example in a temporary folder."""
    torch.set_num_threads(1)  # the matrices are small
    with tempfile.TemporaryDirectory() as folder:
        data, models = prepare(Path(folder) / "world")
    train(data, models)


if __name__ == "__main__":
    main()
