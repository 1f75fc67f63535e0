"""`ask` with several phrasings: what is fused, what is printed, what is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.ask import answer_question
from cluster.config.settings import RunConfig, Settings
from cluster.prepare.corpus_changes import passage_sides
from cluster.prepare.stores import prepare_data
from cluster.stage.run_stage import make_job
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.passages import Store
from indexing.indexing_settings import CorpusConfig, WorldConfig
from indexing.lexical.lexical import LexicalIndex
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import tiny_encoder, tiny_generator
from training.models.text.tokenizers import load_tokenizer
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    DecodingConfig,
    EvaluationConfig,
    FreshEncoderConfig,
    MonitorConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)

K = 4
WORLD = CorpusConfig(world=WorldConfig(num_people=30, num_values=20))


def trained(root: Path, **changes: Any) -> tuple[Settings, str, LocalIndex]:
    """A stage of one step with these sections: settings, checkpoint, and its index."""
    settings = replace(
        Settings(
            run=RunConfig(name="run", directory=str(root)),
            corpus=WORLD,
            encoder=tiny_encoder(),
            generator=tiny_generator(),
            retrieval=RetrievalConfig(k=K, candidates=30),
            training=TrainingConfig(steps=1, batch_size=2),
            checkpoint=CheckpointConfig(index=False),
            evaluation=EvaluationConfig(decoding=DecodingConfig(max_tokens=4)),
            monitor=MonitorConfig(console=False, wandb="off"),
        ),
        **changes,
    )
    prepared = prepare_data(settings, root, lambda _: None)
    job = replace(make_job(settings, prepared, "", root / "run"), evaluate_questions="")
    store = Store.open(prepared.passages)
    words = settings.lexical if settings.retrieval.hybrid != "none" else None
    vocabulary = len(load_tokenizer(prepared.tokenizers / "retriever"))
    index = LocalIndex(store, settings.encoder, vocabulary, lexical=words)
    Stage(job, index).run()
    return settings, str(root / "run" / "checkpoints" / "step-1"), index


def test_one_question_is_printed_as_before_and_several_are_fused(tmp_path: Path) -> None:
    settings, checkpoint, _ = trained(tmp_path)
    store = Store.open(next((tmp_path / "data").glob("*/passages")))
    titles = [store.passage(row).title for row in (0, 60, 120)]
    questions = [f"where was {titles[0]} born?", f"what does {titles[1]} do?", f"{titles[2]} of all people"]
    alone = answer_question(settings, tmp_path, checkpoint, questions[:1])
    assert "p(z|q), index score, passage:" in alone
    assert "dense" not in alone
    several = answer_question(settings, tmp_path, checkpoint, questions)
    assert "p(z|q), index score, places, passage:" in several
    shares = [float(line.split()[0]) for line in several.split("passage:\n")[1].splitlines()]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    lines = several.split("passage:\n")[1].splitlines()
    assert len(lines) == K
    for line in lines:
        places = line.split("dense ")[1].split("  ")[0].split("/")
        assert len(places) == 3
        score = sum(1 / (60 + int(place)) for place in places if place != "-")
        assert float(line.split()[1]) == pytest.approx(score, abs=6e-4)
    with pytest.raises(ValueError, match="ask needs a question"):
        answer_question(settings, tmp_path, checkpoint, [questions[0], " "])


@pytest.mark.parametrize("hybrid", ["rrf", "learned"])
def test_words_and_vectors_and_a_reranker(tmp_path: Path, hybrid: str) -> None:
    """The passages are those of the fusion computed apart; the re-ranker puts them in another order."""
    fresh = FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32)
    retrieval = RetrievalConfig(k=K, hybrid=hybrid, candidates=30, lexical_weight=5.0)
    reranker = RerankerConfig(mode="add", fresh=fresh, candidates=K)
    settings, checkpoint, _ = trained(tmp_path, retrieval=retrieval, reranker=reranker)
    path = next((tmp_path / "data").glob("*/passages"))
    store, words = Store.open(path), LexicalIndex.load(next(path.parent.glob("lexical-*")))
    questions = [f"where was {store.passage(0).title} born?", f"{store.passage(0).title} birth place"]
    answer = answer_question(settings, tmp_path, checkpoint, questions)
    for line in answer.split("passage:\n")[1].splitlines():
        dense, lexical = (line.split(f"{name} ")[1].split("  ")[0].split("/") for name in ("dense", "lexical"))
        passage = next(row for row in range(len(store)) if f"  {store.passage(row).id}  " in line)
        for question, place in zip(questions, lexical, strict=True):
            ranking = words.search([question], 30)[1][0].tolist()
            assert place == (str(ranking.index(passage) + 1) if passage in ranking else "-")
        assert any(place != "-" for place in (*dense, *lexical))


def test_an_answer_is_from_the_corpus_as_it_is_now(tmp_path: Path) -> None:
    """Words, vectors and re-ranker over what was added; nothing of what was deleted, put in one way or in two."""
    fresh = FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32)
    retrieval = RetrievalConfig(k=K, hybrid="learned", candidates=30, lexical_weight=20.0)
    reranker = RerankerConfig(mode="add", fresh=fresh, candidates=K)
    settings, checkpoint, _ = trained(tmp_path, retrieval=retrieval, reranker=reranker)
    path = next((tmp_path / "data").glob("*/passages"))
    store = LiveStore.open_with(path, tmp_path / "run" / "corpus")
    question = f"where was {store.passage(0).title} born?"
    questions = [question, f"{store.passage(0).title} birth place"]
    before = ids_in(answer_question(settings, tmp_path, checkpoint, questions[:1]), store)
    put = [Passage("added", "", question)]
    change_corpus(store, Wanted(put=put, delete=before), sides=passage_sides(settings, tmp_path / "tokenizers"))
    for asked in (questions[:1], questions):
        found = ids_in(answer_question(settings, tmp_path, checkpoint, asked), store)
        assert len(found) == K
        assert "added" in found
        assert not set(found) & set(before)


def ids_in(answer: str, store: LiveStore) -> list[str]:
    """The ids of the passages that were read."""
    words = {word for line in answer.split("passage:\n")[1].splitlines() for word in line.split()}
    return [id for id in store.ids(range(len(store))) if id in words]
