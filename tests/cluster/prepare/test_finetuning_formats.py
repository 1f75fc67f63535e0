"""Every format of fine-tuning, from its files to its metrics, on a corpus of a few towns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.experiment import load
from cluster.config.settings import Settings
from cluster.prepare.stores import prepare_data
from cluster.stage.run_stage import make_job
from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from tests.helpers.local_index import LocalIndex
from training.data import Stream
from training.feeding.answers import TrainingAnswers
from training.models.system import System
from training.models.text.tokenizers import load_tokenizer
from training.stage import Stage

COLOURS = ("red", "blue", "green", "white")
TOWNS = [f"{first}{last}" for first in ("Bar", "Lo", "Mi", "Tan", "Ul", "Ve") for last in ("dor", "gan", "res", "tis")]
SETTINGS = (
    *("encoder.fresh.num_layers=1", "encoder.fresh.hidden=32", "encoder.fresh.num_heads=2"),
    *("generator.fresh.num_encoder_layers=1", "generator.fresh.hidden=32", "generator.fresh.num_heads=2"),
    *("encoder.fresh.intermediate=64", "generator.fresh.intermediate=64", "encoder.tokenizer.vocabulary=400"),
    *("retrieval.k=2", "training.batch_size=6", "training.steps=3", "training.warmup_steps=1", "evaluation.k=10"),
    *("engine.precision=fp32", "checkpoint.index=false", "monitor.wandb=off", "monitor.console=false"),
    *("evaluation.decoding.max_tokens=6", "generator.max_answer_tokens=8", "refresh.every_steps=0"),
)


def colour(town: str) -> str:
    return COLOURS[TOWNS.index(town) % 4]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def corpus(folder: Path, make: Any, **splits: list[dict[str, Any]]) -> Path:
    """Towns with their colours; the questions that `make` makes of each town, the first 16 for training."""
    folder.mkdir(parents=True, exist_ok=True)
    write(
        folder / "corpus.jsonl",
        [{"_id": t, "title": t, "text": f"{t} is a town. The gate of {t} is {colour(t)}."} for t in TOWNS],
    )
    (folder / "qrels").mkdir(exist_ok=True)
    for split, towns in (("train", TOWNS[:16]), ("test", TOWNS[16:])):
        write(folder / f"queries-{split}.jsonl", [{"_id": f"q-{t}", **make(t)} for t in towns])
        lines = ["query-id\tcorpus-id\tscore", *(f"q-{t}\t{t}\t1" for t in towns)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, rows in splits.items():
        write(folder / f"queries-{split}.jsonl", rows)
    return folder


def settings_for(tmp_path: Path, *overrides: str) -> Settings:
    (tmp_path / "a.yaml").write_text("", encoding="utf-8")
    paths = (f"corpus.path={tmp_path / 'corpus'}", f"run.directory={tmp_path / 'runs'}")
    return load([str(tmp_path / "a.yaml")], [*SETTINGS, *paths, *overrides]).settings


def stage_of(settings: Settings, tmp_path: Path, init_from: str = "") -> Stage:
    root = Path(settings.run.directory) / settings.run.name
    prepared = prepare_data(settings, root, lambda _: None)
    store = Store.open(prepared.passages)
    vocabulary = len(load_tokenizer(prepared.tokenizers / "retriever"))
    job = make_job(settings, prepared, init_from, tmp_path / "run")
    return Stage(replace(job, wait_timeout_s=60.0), LocalIndex(store, settings.encoder, vocabulary))


def predictions(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]


def choice(town: str) -> dict[str, Any]:
    number = 2 + TOWNS.index(town) % 3  # questions have two, three or four options
    options = [colour(town), *(c for c in COLOURS if c != colour(town))][:number]
    return {"text": f"Which colour has the gate of {town}?", "options": sorted(options), "answers": [colour(town)]}


@pytest.mark.parametrize(
    ("kind", "mode", "objective"),
    [("copy", "marginal", "rag_sequence"), ("fusion", "fused", "emdr2"), ("causal", "top1", "rag_sequence")],
)
def test_multiple_choice_takes_the_likeliest_option(tmp_path, kind, mode, objective):
    corpus(tmp_path / "corpus", choice)
    overrides = (f"generator.kind={kind}", f"evaluation.decoding.mode={mode}", f"objective.name={objective}")
    stage = stage_of(settings_for(tmp_path, *overrides, "training.steps=2"), tmp_path)
    result = stage.run()
    rows = predictions(tmp_path)
    assert len(rows) == 8
    assert result["metrics"]["accuracy"] == np.mean([row["prediction"] in row["answers"] for row in rows])
    assert result["metrics"]["exact_match"] == result["metrics"]["accuracy"]

    # each option scored by itself, as the one gold answer of its question
    evaluator = stage.measures.evaluator
    assert evaluator is not None
    stage.engine.module.eval()
    for row in rows:
        question = evaluator.questions.question(row["number"])
        passages = [np.array([stage.store.row_of(identifier) for identifier in row["hits"]])]
        if mode == "top1":  # the one passage with the largest p(z|q), which is the first hit of a fresh index
            passages = [passages[0][:1]]
        scores = []
        for tokens in evaluator.questions.option_tokens(row["number"]):
            batch = evaluator.collator(np.array([row["number"]]), passages, answers=[tokens])
            answers = stage.engine(System.answer, batch, evaluator.config.decoding, 1.0, False)
            scores.append(float(answers.log_likelihood[0]))
        assert row["prediction"] == question.options[int(np.argmax(scores))]
        assert row["log_likelihood"] == pytest.approx(scores[question.options.index(question.answers[0])], abs=1e-4)


def claim(town: str) -> dict[str, Any]:
    right = TOWNS.index(town) % 2 == 0
    stated = colour(town) if right else "black"
    return {"claim": f"The gate of {town} is {stated}.", "label": "SUPPORTS" if right else "REFUTES"}


def test_fact_verification_chooses_among_the_labels(tmp_path):
    corpus(tmp_path / "corpus", claim)
    overrides = ("questions.labels=[SUPPORTS,REFUTES]", "generator.max_question_tokens=64")
    stage = stage_of(settings_for(tmp_path, *overrides), tmp_path)
    result = stage.run()
    rows = predictions(tmp_path)
    assert {row["prediction"] for row in rows} <= {"SUPPORTS", "REFUTES"}
    labels = [claim(town)["label"] for town in TOWNS[16:]]
    right = [row["prediction"] == label for row, label in zip(rows, labels, strict=True)]
    assert result["metrics"]["accuracy"] == np.mean(right)
    assert result["metrics"]["recall@1"] >= 0
    evaluator = stage.measures.evaluator
    assert evaluator is not None
    asked = str(stage.parts.text.generator.decode(evaluator.collator.questions_for_generator.rows([0])[0]))
    assert asked.endswith("options : supports ; refutes")
    asked = str(stage.parts.text.retriever.decode(evaluator.collator.questions_for_retriever.rows([0])[0]))
    assert "options" not in asked  # the retriever looks for the claim


def bare(text: object) -> str:
    """A word-piece tokeniser forgets case and spaces."""
    return "".join(str(text).lower().split())


def chat(town: str) -> dict[str, Any]:
    user = {"role": "user", "content": f"Which colour has the gate of {town}?"}
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    system = [{"role": "system", "content": "Name the colour alone."}] if TOWNS.index(town) % 2 else []
    return {"messages": [*system, *earlier, user, {"role": "assistant", "content": colour(town)}]}


@pytest.mark.parametrize("kind", ["copy", "fusion", "causal"])
def test_chats_train_and_are_measured(tmp_path, kind):
    corpus(tmp_path / "corpus", chat)
    overrides = (f"generator.kind={kind}", "generator.system_prompt=Answer from the passages.", "training.steps=2")
    stage = stage_of(settings_for(tmp_path, *overrides, "generator.max_question_tokens=128"), tmp_path)
    result = stage.run()
    assert {"exact_match", "f1", "recall@1"} <= set(result["metrics"])
    questions = QuestionStore.open(stage.job.train_questions)
    texts = [
        bare(stage.parts.text.generator.decode([token for token in row.tolist() if token >= 0]))
        for row in questions.tokens("generator").rows([0, 1])
    ]
    assert "answerfromthepassages.user:hello.assistant:goodday." in texts[0]
    assert "namethecolouralone.user:hello.assistant:goodday." in texts[1]
    assert "answerfromthepassages" not in texts[1]  # the row's own system prompt takes its place
    assert all(
        text.endswith(bare(f"Which colour has the gate of {town}?")) for text, town in zip(texts, TOWNS, strict=False)
    )
    retriever = stage.parts.text.retriever.decode(questions.tokens("retriever").rows([1])[0], skip_special_tokens=True)
    assert bare(retriever) == bare(f"Which colour has the gate of {TOWNS[1]}?")


def plain(town: str) -> dict[str, Any]:
    return {"text": f"Which colour has the gate of {town}?", "answers": ["unknown hue", colour(town), "tint"]}


def test_refusals_are_taught_and_measured(tmp_path):
    unanswerable = [
        {"_id": f"u{i}", "text": f"How old is the gate of {t}?", "answers": []} for i, t in enumerate(TOWNS)
    ]
    corpus(tmp_path / "corpus", plain, unanswerable=unanswerable[:5])
    overrides = ("questions.refusal=none", "questions.refusal_share=1", "questions.unanswerable=unanswerable")
    result = stage_of(settings_for(tmp_path, *overrides, "training.steps=80"), tmp_path).run()
    rows = predictions(tmp_path)
    assert len(rows) == 8 + 5
    refused = [row["prediction"] == "none" for row in rows]
    assert result["metrics"]["refusal_answerable"] == pytest.approx(np.mean(refused[:8]))
    assert result["metrics"]["refusal_unanswerable"] == pytest.approx(np.mean(refused[8:]))
    assert np.mean(refused) > 0.5  # all of the training says so
    assert all("exact_match" not in row for row in rows[8:])  # does not enter the score of the answerable ones
    assert result["metrics"]["exact_match"] == np.mean([row["exact_match"] for row in rows[:8]])


def test_refused_questions_lose_what_answers_them_and_targets_are_as_asked(tmp_path):
    corpus(tmp_path / "corpus", plain)
    stage = stage_of(settings_for(tmp_path), tmp_path)
    questions = QuestionStore.open(stage.job.train_questions)
    stream, refusal = Stream(len(questions), 200, seed=1), np.array([7], dtype=np.int32)
    answers = TrainingAnswers(
        questions, stage.store, stream=stream, choice="sampled", refusal=refusal, refusal_share=0.3
    )
    refused, rows = answers.refused(0), answers.rows(0, stream.batch(0))
    assert refused.mean() == pytest.approx(0.3, abs=0.1)
    chosen = []
    for question, no_answer, row in zip(stream.batch(0), refused, rows, strict=True):
        if no_answer:
            assert row.tolist() == [7]
        else:
            chosen.append([a.tolist() for a in questions.answer_tokens(int(question))].index(row.tolist()))
    assert min(np.bincount(chosen, minlength=3)) > 25
    again = TrainingAnswers(questions, stage.store, stream=stream, choice="sampled", refusal=refusal, refusal_share=0.3)
    assert [row.tolist() for row in again.rows(0, stream.batch(0))] == [row.tolist() for row in rows]
    for choice_of, place in (("first", 0), ("in_passage", 1)):
        made = TrainingAnswers(questions, stage.store, stream=stream, choice=choice_of).rows(1, stream.batch(1))
        wanted = [questions.answer_tokens(int(question))[place] for question in stream.batch(1)]
        assert [row.tolist() for row in made] == [row.tolist() for row in wanted]
    number = 3
    everything = np.arange(len(stage.store))
    left = answers.without_answer(number, everything, len(everything))
    said = colour(questions.question(number).relevant[0])
    assert sorted(left) == [row for row in everything if colour(stage.store.passage(int(row)).id) != said]
    assert answers.without_answer(number, everything, 2).tolist() == left[:2].tolist()


def test_questions_without_answers_are_not_trained_on_unless_a_refusal_is_taught(tmp_path):
    corpus(tmp_path / "corpus", lambda town: {"text": f"How old is {town}?", "answers": []})
    settings = settings_for(tmp_path)
    with pytest.raises(ValueError, match=r"questions\.train=train: 16 questions have no answer .*questions\.refusal"):
        prepare_data(settings, tmp_path / "runs" / "run", lambda _: None)
    taught = settings_for(tmp_path, "questions.refusal=none")
    prepared = prepare_data(taught, tmp_path / "runs" / "run", lambda _: None)
    questions = QuestionStore.open(prepared.questions["train"])
    assert len(questions.answer_tokens(0)) == 1
    assert questions.question(0).answers == []


def test_a_corpus_without_questions_pretrains(tmp_path):
    corpus(tmp_path / "corpus", plain)
    for file in (tmp_path / "corpus").glob("queries-*"):
        file.unlink()
    weights = ("pretraining.salient_span=1", "pretraining.prefix_lm=1", "pretraining.duplicate_threshold=0.9")
    settings = settings_for(tmp_path, *weights, "questions.train=", "questions.evaluate=", "pretraining.margin=1")
    result = stage_of(settings, tmp_path).run()
    assert result["step"] == 3
    assert "held_out/loss" in result["metrics"]
    folders = [path.name for path in (tmp_path / "runs" / "run" / "data").glob("*/*")]
    assert sorted(folders) == ["duplicates-0.9", "passages"]
