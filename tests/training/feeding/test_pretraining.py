"""Examples cut from the corpus while training: determinism, proportions, what is never read for them, whole stages."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.duplicates import duplicate_groups
from indexing.corpus.stores.passages import Store, write_store
from indexing.indexing_settings import LexicalConfig
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld, with_changes
from training.checkpoint import load_weights, newest_checkpoint
from training.data import Collator, Stream
from training.example_settings import PretrainingConfig
from training.feeding.batches import RetrievedBatches
from training.feeding.mixture import TASKS
from training.feeding.pretraining import TRAINING, CorpusQuestions, FairSearch, example_sides, split_passages
from training.job import StageJob, StageSettings
from training.models.build import build_generator, build_system
from training.models.model_inputs import RetrievalBatch
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import passage_state
from training.models.text.token_rows import generator_passage_side, retriever_passage_side
from training.objectives.contrastive import info_nce
from training.objectives.dispatch import compute, needs
from training.refreshing.policy import RefreshPlan
from training.retrieving.retrieve import Prefetcher
from training.run_text import RunText
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TrainingConfig,
)

ALL = PretrainingConfig(
    span_corruption=0.2, salient_span=0.4, prefix_lm=0.3, title_to_section=0.1, context_words=14, held_out_examples=12
)


def text_of(world: TinyWorld, generator: GeneratorConfig, tokenizer: Any = None) -> RunText:
    settings = StageSettings(encoder=world.encoder, generator=generator)
    return RunText(settings, world.tokenizer, tokenizer or world.tokenizer)


def corpus_questions(
    world: TinyWorld, config: PretrainingConfig = ALL, seed: int = 3, store: Store | None = None, **models: Any
) -> CorpusQuestions:
    store = store or world.store()
    generator = models.get("generator", world.generator)
    sides = example_sides(text_of(world, generator, models.get("tokenizer")))
    return CorpusQuestions(store, np.arange(len(store)), config=config, sides=sides, seed=seed, purpose=TRAINING)


# ---------------------------------------------------------------- examples by number


def test_an_example_is_a_function_of_seed_and_number(world):
    first, again, other = corpus_questions(world), corpus_questions(world), corpus_questions(world, seed=4)
    numbers = np.random.default_rng(0).permutation(40)
    for number in map(int, numbers):  # in another order than the second
        first.example(number)
    for number in range(40):
        a, b = first.example(number), again.example(number)
        assert (a.task, a.source, a.question, a.answer) == (b.task, b.source, b.question, b.answer)
    assert [first.example(n).question for n in range(9)] != [other.example(n).question for n in range(9)]


def test_examples_are_cut_from_their_source_and_tokenised_as_questions_are(world):
    made = corpus_questions(world)
    sides = example_sides(text_of(world, world.generator))
    for number in range(60):
        example = made.example(number)
        passage = world.store().passage(example.source)
        match example.task:
            case "prefix_lm":
                assert f"{example.question} {example.answer}" == passage.text
            case "title_to_section":
                assert example.question == passage.title
                assert passage.text.startswith(example.answer)
            case _:
                assert "[MASK]" in example.question
                assert all(span in passage.text for span in example.answer.split(" [MASK] "))
                assert world.tokenizer.mask_token_id in example.tokens["generator"]
                assert world.tokenizer.mask_token_id in example.tokens["retriever"]
        for name, side in (("retriever", sides.retriever), ("generator", sides.generator)):
            assert example.tokens[name].tolist() == side.tokenize([("", example.question)])[0]
            assert made.tokens(name).rows([number])[0].tolist() == example.tokens[name].tolist()
        assert made.answer_tokens(number)[0].tolist() == sides.answer.tokenize([("", example.answer)])[0]
        assert len(made.gold_rows(number)) == made.target(number) == 0


def test_the_mixture_has_its_proportions(world):
    made = corpus_questions(world)
    counted = Counter(made.example(number).task for number in range(1500))
    for task, share in (("span_corruption", 0.2), ("salient_span", 0.4), ("prefix_lm", 0.3), ("title_to_section", 0.1)):
        assert counted[task] / 1500 == pytest.approx(share, abs=4 * (share * (1 - share) / 1500) ** 0.5)


def test_a_question_is_never_cut_by_a_tokeniser(world):
    """Longer contexts than the tokens can hold are cut from fewer words, so that no mask is lost."""
    made = corpus_questions(world, replace(ALL, context_words=60, title_to_section=None, prefix_lm=None))
    for number in range(40):
        example = made.example(number)
        assert len(example.tokens["retriever"]) < world.encoder.max_question_tokens
        assert len(example.tokens["generator"]) < world.generator.max_question_tokens
        assert world.tokenizer.mask_token_id in example.tokens["generator"]


def test_encoder_decoders_with_sentinels_get_them(world, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.tokenizers / "generator")
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in range(5)], special_tokens=True)
    config = PretrainingConfig(span_corruption=1.0, context_words=14, mask_share=0.3)
    fusion = GeneratorConfig(kind="fusion", fresh=world.generator.fresh)
    example = corpus_questions(world, config, generator=fusion, tokenizer=tokenizer).example(0)
    assert "<extra_id_0>" in example.question
    assert example.answer.startswith("<extra_id_0> ")
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert first in example.tokens["generator"]
    assert example.answer_tokens[0] == first
    assert world.tokenizer.mask_token_id in example.tokens["retriever"]  # a token of its own, not of the generator
    plain = corpus_questions(world, config, generator=replace(fusion, kind="causal"), tokenizer=tokenizer).example(0)
    assert "[MASK]" in plain.question
    assert "<extra_id_0>" not in plain.answer


def test_a_corpus_without_what_a_task_needs_is_refused(world, tmp_path):
    passages = [Passage(str(i), "", "lower case words without any name") for i in range(4)]
    store = write_store(tmp_path / "store", passages, [])
    for task, needed in (("title_to_section", "a title"), ("salient_span", "a span")):
        with pytest.raises(ValueError, match=rf"pretraining\.{task}=1\.0: 200 passages in a row .*{needed}"):
            corpus_questions(world, replace(PretrainingConfig(), **{task: 1.0}), store=store).example(0)
    with pytest.raises(ValueError, match=r"pretraining\.held_out"):
        CorpusQuestions(
            store,
            np.empty(0, np.int64),
            config=ALL,
            sides=example_sides(text_of(world, world.generator)),
            seed=0,
            purpose=1,
        )


def test_held_out_passages_take_their_near_duplicates_along():
    groups = np.array([0, 1, 0, 3, 4, 1, 6, 7, 8, 9] * 20)
    groups = groups + 10 * (np.arange(200) // 10)
    train, out = split_passages(groups, 0.1)
    assert sorted([*train, *out]) == list(range(200))
    assert not set(groups[train]) & set(groups[out])
    assert 20 <= len(out) <= 40
    assert len(split_passages(groups, 0.0)[1]) == 0
    assert len(split_passages(np.arange(30), 0.001)[1]) == 1


# ---------------------------------------------------------------- what is never read for an example


class Recording(Collator):
    """Remembers which passages were read for which example."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[int, list[int]]] = []

    def __call__(self, numbers: np.ndarray, passages: Any, *rest: Any, **more: Any) -> RetrievalBatch:
        self.seen += [(int(n), row.tolist()) for n, row in zip(numbers, passages, strict=True)]
        return super().__call__(numbers, passages, *rest, **more)


def planted_store(world: TinyWorld, folder: Path) -> Store:
    """60 passages of the world, and near-duplicates of a third of them: with a word more, a word less, none changed.
    One passage has 25 of them, more than k and the margin together."""
    store = world.store()
    passages = [store.passage(row) for row in range(60)]
    copies: list[Passage] = []
    for row in range(0, 60, 3):
        original, many = passages[row], 25 if row == 30 else 3
        for copy in range(many):
            words = original.text.split()
            words = [words[1:], [*words, "Indeed."], words][copy % 3]
            copies.append(Passage(f"{original.id}-copy-{copy}", original.title, " ".join(words)))
    mixed = [*passages, *copies]
    order = np.random.default_rng(0).permutation(len(mixed))
    generator = world.generator
    sides = [
        retriever_passage_side(world.tokenizer, world.encoder),
        generator_passage_side(world.tokenizer, generator, world.encoder.max_title_tokens),
    ]
    return write_store(folder / "planted", [mixed[i] for i in order], sides)


def trigrams(row: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + 3].tolist()) for i in range(len(row) - 2)}


@pytest.mark.parametrize("depth", [0, 2])
def test_the_source_and_its_near_duplicates_are_never_read(world, tmp_path, depth):
    """Brute force over every (example, passage read): and what is read are the best of all others, none is missing."""
    store, k, margin, threshold = planted_store(world, tmp_path), 4, 2, 0.6
    groups = duplicate_groups(store.tokens("generator"), threshold)
    rows = store.tokens("generator").rows(np.arange(len(store)))
    sets = [trigrams(row) for row in rows]
    near = np.array([[len(a & b) / len(a | b) >= threshold for b in sets] for a in sets])
    assert near.sum() > len(store) + 150  # duplicates there are

    system = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    ).eval()
    index = LocalIndex(store, world.encoder, len(world.tokenizer))
    index.publish(0, to_numpy(passage_state(system.retriever)))
    questions = corpus_questions(world, replace(ALL, margin=margin), store=store)
    collator = Recording(store, questions, system.generator, 0)
    vectors: dict[int, np.ndarray] = {}

    def encode(numbers: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = system.encode_questions(*collator.question_tensors(numbers)).numpy()
        vectors.update(zip(map(int, numbers), found, strict=True))
        return found

    stream = Stream(len(store), 8, seed=3)
    search = FairSearch(index, questions, groups=groups, margin=margin)
    prefetcher = Prefetcher(index, stream.places, encode_questions=encode, k=k, depth=depth, search=search)
    source = RetrievedBatches(
        prefetcher, collator, config=RetrievalConfig(k=k), device=torch.device("cpu"), stream=stream
    )
    for _ in range(60):
        source.next()
    assert [number for number, _ in collator.seen] == list(range(480))

    everything = {number: index.submit(vectors[number][None], len(store)).result().ids[0] for number in vectors}
    otherwise_read = deeper = 0
    for number, read in collator.seen:
        own = questions.example(number).source
        assert not near[own][read].any()
        allowed = [row for row in everything[number].tolist() if groups[row] != groups[own]]
        assert read == allowed[:k]
        best = everything[number]
        otherwise_read += bool(near[own][best[:k]].any())
        deeper += bool((groups[best[: k + margin]] == groups[own]).sum() > margin)
    assert otherwise_read > 200  # a plain search would have read them for many of the 480 examples
    assert deeper > 5  # and sometimes the margin was too small


def test_where_nothing_else_is_left_fewer_are_read(world, tmp_path):
    store = planted_store(world, tmp_path)
    questions = corpus_questions(world, store=store)
    groups = np.zeros(len(store), dtype=np.int64)
    groups[[5, 9]] = 1
    index = LocalIndex(store, world.encoder, len(world.tokenizer))
    system = build_system(
        world.encoder, world.generator, train="both", tokenizers=(world.tokenizer, world.tokenizer), seed=0
    )
    index.publish(0, to_numpy(passage_state(system.retriever)))
    numbers = np.array([number for number in range(200) if groups[questions.example(number).source] == 0][:3])
    queries = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    hits = FairSearch(index, questions, groups=groups, margin=1)(numbers, queries, 4).result()
    assert [sorted(row) for row in hits.ids.tolist()] == [[-1, -1, 5, 9]] * 3
    assert np.isneginf(hits.scores[:, 2:]).all()
    collator = Collator(store, questions, system.generator, 0)
    batch = collator(numbers, [row[row >= 0] for row in hits.ids])
    assert batch.generator_batch.passage_mask.tolist() == [[True, True]] * 3


# ---------------------------------------------------------------- whole stages


def pretrain_job(world: TinyWorld, run_dir: Path, **changes: Any) -> StageJob:
    job = world.job(
        run_dir,
        train_questions="",
        pretraining=ALL,
        training=TrainingConfig(steps=4, batch_size=4, warmup_steps=1),
        evaluation=EvaluationConfig(k=20, batch_size=16),
    )
    return with_changes(job, **changes)


def losses(run_dir: Path) -> dict[int, float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("copy", "rag_sequence"), ("copy", "emdr2"), ("copy", "fused"), ("fusion", "emdr2"), ("causal", "rag_sequence")],
)
def test_every_family_pretrains_and_is_measured(world, tmp_path, kind, objective):
    generator = replace(world.generator, kind=kind)
    job = pretrain_job(
        world, tmp_path, generator=generator, objective=ObjectiveConfig(name=objective), evaluate_questions=""
    )
    before = Stage(replace(job, run_dir=str(tmp_path / "before")), world.index()).system.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    result = Stage(job, world.index()).run()
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    after = load_weights(found)
    for part in ("retriever.query_encoder.", "generator."):
        assert any(name.startswith(part) and not torch.equal(after[name], before[name]) for name in before)
    assert all(np.isfinite(value) for value in losses(tmp_path).values())
    assert result["metrics"]["held_out/log_likelihood"] < 0 < result["metrics"]["held_out/loss"]
    assert "held_out/salient_span/log_likelihood" in result["metrics"]
    assert "exact_match" not in result["metrics"]


def test_pretraining_learns_and_the_questions_are_measured_too(world, tmp_path):
    job = pretrain_job(
        world,
        tmp_path,
        training=TrainingConfig(steps=40, batch_size=8, warmup_steps=4),
        evaluation=EvaluationConfig(every_steps=20, max_questions=8, k=20, batch_size=16),
        refresh=RefreshPlan(every_steps=20),
    )
    result = Stage(job, world.index()).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = {row["step"]: row["eval/held_out/loss"] for row in rows if "eval/held_out/loss" in row}
    assert sorted(held_out) == [0, 20, 40]
    assert held_out[40] < held_out[0] - 0.5
    assert {"recall@1", "recall@20", "exact_match"} <= set(result["metrics"])
    assert {row["step"] for row in rows if "eval/test/recall@20" in row} == {0, 20, 40}


@pytest.mark.parametrize("depth", [0, 2])
def test_a_resumed_pretraining_equals_an_uninterrupted_one(world, tmp_path, depth):
    changes = {
        "evaluate_questions": "",
        "training": TrainingConfig(steps=8, batch_size=3, warmup_steps=2, schedule="constant"),
        "engine": EngineConfig(gradient_accumulation=2),
        "checkpoint": CheckpointConfig(every_steps=4, index=False),
        "retrieval": RetrievalConfig(k=3, prefetch_depth=depth),
        "pretraining": replace(ALL, held_out_examples=0),
    }
    whole = pretrain_job(world, tmp_path / "whole", **changes)
    Stage(whole, world.index(max_generations=1)).run()
    parts = pretrain_job(world, tmp_path / "parts", **changes)
    Stage(with_changes(parts, training=replace(parts.settings.training, steps=4)), world.index(max_generations=1)).run()
    index = world.index(max_generations=1)
    Stage(replace(parts, run_dir=str(tmp_path / "first")), index).serve_index(fresh=True)  # of the weights of step 0
    Stage(parts, index).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = (newest_checkpoint(tmp_path / name, print) for name in ("parts", "whole"))
    assert first is not None
    assert second is not None
    left, right = load_weights(first), load_weights(second)
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_contrastive_tasks_of_a_mixture_train_the_retriever_beside_the_others(world, tmp_path):
    mixed = replace(ALL, inverse_cloze=2.0, independent_cropping=2.0, contrast_passages=12, held_out_examples=0)
    changes = {
        "evaluate_questions": "",
        "training": TrainingConfig(steps=30, batch_size=4, warmup_steps=3, schedule="constant"),
        "checkpoint": CheckpointConfig(every_steps=15, index=False),
    }
    Stage(pretrain_job(world, tmp_path / "mixed", pretraining=mixed, **changes), world.index()).run()
    rows = [json.loads(line) for line in (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()]
    contrast = [row["loss/contrast"] for row in rows if "loss/contrast" in row]
    assert len(contrast) == 30
    assert np.mean(contrast[-8:]) < np.mean(contrast[:4]) - 0.2

    # A resume cuts the same pairs: the first part alone, then the rest.
    parts = pretrain_job(world, tmp_path / "parts", pretraining=mixed, **changes)
    Stage(
        with_changes(parts, training=replace(parts.settings.training, steps=15)), world.index(max_generations=1)
    ).run()
    index = world.index(max_generations=1)
    Stage(replace(parts, run_dir=str(tmp_path / "first")), index).serve_index(fresh=True)
    Stage(with_changes(parts, training=replace(parts.settings.training, steps=20)), index).run()
    whole = pretrain_job(world, tmp_path / "whole", pretraining=mixed, **changes)
    Stage(
        with_changes(whole, training=replace(whole.settings.training, steps=20)), world.index(max_generations=1)
    ).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_pairs_are_cut_from_training_passages_alone_and_weigh_their_share(world, tmp_path):
    mixed = replace(ALL, held_out=0.4, held_out_examples=0, inverse_cloze=sum(vars(ALL)[task] or 0.0 for task in TASKS))
    stage = Stage(pretrain_job(world, tmp_path, pretraining=mixed, evaluate_questions=""), world.index())
    stage.serve_index(fresh=True)
    assert stage.corpus is not None
    source, allowed = stage.make_source(None), set(stage.corpus.training.candidates.tolist())
    batches: list[RetrievalBatch] = []
    for _ in range(4):
        batch = source.next().batch
        assert isinstance(batch, RetrievalBatch)
        assert batch.contrast is not None
        assert batch.contrast_share == pytest.approx(0.5)
        assert set(batch.contrast.passage_numbers.tolist()) <= allowed
        batches.append(batch)
    batch = batches[-1]
    needed = needs(stage.job.settings.objective)
    outputs = stage.system.likelihoods(batch, needed, 1.0)
    alone = stage.system.likelihoods(replace(batch, contrast=None), needed, 1.0)
    assert batch.contrast is not None
    pairs, _ = info_nce(stage.system.contrast(batch.contrast))
    together = compute(stage.job.settings.objective, outputs)[0]
    apart = 0.5 * float(compute(stage.job.settings.objective, alone)[0]) + 0.5 * float(pairs)
    assert float(together) == pytest.approx(apart, rel=1e-5)


def test_the_source_is_not_read_where_candidates_are_scored_again(world, tmp_path):
    """Nor does the probe of the drift, whose questions are examples, touch training."""
    plan = RefreshPlan(every_steps=2, probe_questions=5, partial=0.1, whole_every=0)
    retrieval = RetrievalConfig(k=3, rescore=60)
    job = pretrain_job(world, tmp_path, evaluate_questions="", retrieval=retrieval, refresh=plan)
    stage = Stage(job, index := world.index())
    stage.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in rows if "drift/overlap" in row] == [2, 4]
    assert all("retrieval/rescore_overlap" in row for row in rows)
    assert [None if only is None else len(only) for only in index.partial] == [None, 18, 18, None]
    assert stage.corpus is not None
    source = stage.make_source(None)
    for number in range(6):
        fetched = source.next()
        examples = np.arange(number * 4, number * 4 + 4)
        own = stage.corpus.groups[stage.corpus.training.sources(examples)]
        assert fetched.passages is not None
        assert not (stage.corpus.groups[fetched.passages.reshape(4, -1)] == own[:, None]).any()


@pytest.mark.parametrize("rescore", [0, 10])
def test_examples_are_searched_by_words_too_and_their_scores_are_part_of_the_loss(world, tmp_path, rescore):
    """Beside pairs of a contrastive task; the source of an example is found by neither index."""
    mixed = replace(ALL, held_out=0.4, held_out_examples=6, inverse_cloze=1.0)
    retrieval = RetrievalConfig(k=3, hybrid="learned", candidates=40, rescore=rescore, lexical_weight=1.0)
    job = pretrain_job(world, tmp_path, pretraining=mixed, evaluate_questions="", retrieval=retrieval)
    stage = Stage(job, index := world.index(lexical=LexicalConfig()))
    stage.run()
    assert index.lexical is not None
    assert stage.corpus is not None
    source = stage.make_source(None)
    fetched = source.next()
    batch = fetched.batch
    assert isinstance(batch, RetrievalBatch)
    assert batch.contrast is not None
    assert batch.lexical is not None
    assert fetched.passages is not None
    passages, examples = fetched.passages.reshape(4, -1), np.arange(4)
    questions = stage.corpus.training
    own = stage.corpus.groups[questions.sources(examples)]
    assert not (stage.corpus.groups[passages] == own[:, None]).any()
    texts = [questions.text(int(number)) for number in examples]
    words = index.lexical.index.scores(texts, np.tile(np.arange(index.num_passages), (4, 1)))
    expected = np.take_along_axis(words, passages, axis=1) / words.max(axis=1, keepdims=True)
    np.testing.assert_allclose(batch.lexical.numpy(), expected, rtol=1e-5)
    assert (expected > 0).any()
    outputs = stage.system.likelihoods(batch, needs(job.settings.objective), 1.0)
    lexical = stage.system.retriever.lexical
    assert lexical is not None
    (gradient,) = torch.autograd.grad(compute(job.settings.objective, outputs)[0], [lexical.raw])
    assert float(gradient.abs().sum()) > 0


def test_closed_book_pretraining_reads_no_passage(world, tmp_path):
    job = pretrain_job(
        world,
        tmp_path,
        retrieval=RetrievalConfig(source="none"),
        training=TrainingConfig(train="generator_only", steps=3, batch_size=4),
        evaluate_questions="",
    )
    result = Stage(job, None).run()
    assert result["metrics"]["held_out/loss"] > 0
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_generators_of_every_kind_collate_examples(world):
    for kind in ("copy", "fusion", "causal"):
        config = replace(world.generator, kind=kind)
        questions = corpus_questions(world, generator=config)
        collator = Collator(world.store(), questions, build_generator(config, world.tokenizer), 0)
        batch = collator(np.arange(5), [np.array([1, 2])] * 5)
        lengths = batch.generator_batch.answer_mask.sum(dim=1).tolist()
        assert lengths == [len(questions.example(n).answer_tokens) + 1 for n in range(5)]


def test_two_trainers_make_the_examples_of_one():
    alone = Stream(50, 6, seed=3)
    pair = [Stream(50, 3, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for number in range(4):
        assert [*pair[0].places(number), *pair[1].places(number)] == list(alone.places(number))
    assert list(alone.places(2)) == list(range(12, 18))
