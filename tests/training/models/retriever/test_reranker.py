"""A cross-encoder inside p(z|q): what it reads, what gradient it gets, which candidates go on, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from indexing.corpus.stores.passages import write_store
from indexing.corpus.stores.questions import write_questions
from indexing.indexing_settings import LexicalConfig
from tests.helpers.tiny_world import TinyWorld, with_changes
from tests.training.test_stage import FailingIndex, Failure, final_weights, part, rows_by_step, run_stage, same
from training.data import Collator
from training.models.build import build_system, built_parts, fit_weights, parameter_groups
from training.models.retriever.reranker import Reranker, build_reranker
from training.models.system import System
from training.models.text.pairs import reranker_pairing, retriever_pairing
from training.models.text.token_rows import (
    generator_answer_side,
    generator_passage_side,
    generator_question_side,
    reranker_side,
    retriever_passage_side,
    retriever_question_side,
)
from training.models.text.tokenizers import load_tokenizer
from training.objectives.dispatch import compute, needs
from training.refreshing.policy import RefreshPlan
from training.retrieving.rerank import Reranking, reordered
from training.stage import Stage
from training.training_settings import (
    CheckpointConfig,
    FreshEncoderConfig,
    ObjectiveConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)

FRESH = FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32)
CONFIG = RerankerConfig(mode="add", fresh=FRESH, candidates=9)
NUMBERS = np.arange(6)
NAMES = ["input_ids", "token_type_ids", "attention_mask"]  # of BERT's own tokeniser


def make(world: TinyWorld, config: RerankerConfig = CONFIG, train: str = "both", seed: int = 3) -> System:
    tokenizers = (world.tokenizer, world.tokenizer)
    system = build_system(
        world.encoder,
        world.generator,
        train=train,
        tokenizers=tokenizers,
        seed=seed,
        objective=ObjectiveConfig(),
        retrieval=RetrievalConfig(),
        reranker=config,
    )
    with torch.no_grad():  # a fresh head says next to nothing
        for parameter in system.reranker.model.classifier.parameters() if system.reranker else ():  # type: ignore
            parameter.normal_(std=3.0)
    return system.eval()


def collator_of(world: TinyWorld, system: System) -> Collator:
    collator = Collator(world.store(), world.question_store("test"), system.generator, 0)
    collator.pairing = retriever_pairing(world.tokenizer)
    return collator


def hits_of(number: int = 4, seed: int = 0) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.choice(180, number, replace=False) for _ in NUMBERS]


# ---------------------------------------------------------------- what it reads


def test_shared_pairs_are_what_the_tokeniser_makes(world: TinyWorld) -> None:
    """`[CLS] question [SEP] title [SEP] text [SEP]` of the store's own rows."""
    pairing = retriever_pairing(world.tokenizer)
    question = world.question_store("test").tokens("retriever").rows([0])
    passages = world.store().tokens("retriever").rows([5, 7])
    pairs = pairing(question, [passages], 3)
    assert pairs.ids.shape[0] == 3
    for row, passage in enumerate(passages):
        expected = [*question[0].tolist(), *passage[1:].tolist()]
        assert pairs.ids[row][pairs.mask[row]].tolist() == expected
    assert pairs.ids[2][pairs.mask[2]].tolist() == question[0].tolist()
    assert pairs.first.tolist() == [len(question[0])] * 3


def roberta_like(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """`<s> A </s></s> B </s>`, with this vocabulary's special tokens in their places."""
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.backend_tokenizer.post_processor = template  # type: ignore
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_own_pairs_are_what_the_tokeniser_makes(world: TinyWorld, tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(world.tokenizers / "retriever")
    if kind == "roberta":
        tokenizer = roberta_like(tokenizer, tmp_path)
    tokenizer.model_input_names = NAMES
    pairing, side = reranker_pairing(tokenizer), reranker_side(tokenizer, 12)
    texts = ("where was it born?", "Title", "a text of some words that is longer than the limit allows")
    question = side.tokenize([("", texts[0])])[0]
    passage = side.tokenize([(texts[1], texts[2])])[0]
    assert len(passage) == 12
    pairs = pairing([np.array(question)], [[np.array(passage)]], 1)
    expected = tokenizer(texts[0], f"{texts[1]} {texts[2]}")["input_ids"]
    cut = len(expected) - len(pairs.ids[0])
    assert cut > 0
    types = tokenizer(texts[0], texts[1])["token_type_ids"]
    assert pairing.segments == (max(types) == 1) == (kind == "bert")
    assert pairs.first.tolist() == ([types.count(0)] if kind == "bert" else [len(pairs.ids[0])])
    assert pairs.ids[0].tolist() == [*expected[: -cut - 1], expected[-1]]


@pytest.fixture(scope="module")
def cross_encoder(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face writes it."""
    folder = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(0)
    labels: dict[str, Any] = {"num_labels": 1}
    shape = BertConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=200,
        initializer_range=0.4,
        **labels,
    )
    model = BertForSequenceClassification(shape)
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(world.tokenizers / "retriever")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": NAMES}))
    assert load_tokenizer(folder)("a", "b")["token_type_ids"][-2:] == [1, 1]
    return folder


def own_world(world: TinyWorld, cross_encoder: Path, folder: Path) -> TinyWorld:
    """The same world with the re-ranker's side in its stores and its tokeniser beside the others."""
    import shutil

    shutil.copytree(world.tokenizers, folder / "tokenizers")
    tokenizer = load_tokenizer(cross_encoder)
    tokenizer.save_pretrained(folder / "tokenizers" / "reranker")
    made = replace(world, folder=folder)
    store = world.store()
    write_store(
        made.passages,
        (store.passage(row) for row in range(len(store))),
        [
            retriever_passage_side(world.tokenizer, world.encoder),
            generator_passage_side(world.tokenizer, world.generator, world.encoder.max_title_tokens),
            reranker_side(tokenizer, 100),
        ],
    )
    for split in ("train", "test"):
        asked = world.question_store(split)
        write_questions(
            made.questions(split),
            [asked.question(number) for number in range(len(asked))],
            sides=[
                retriever_question_side(world.tokenizer, world.encoder),
                generator_question_side(world.tokenizer, world.generator),
                reranker_side(tokenizer, 40),
            ],
            answer_side=generator_answer_side(world.tokenizer, world.generator),
            store=made.store(),
        )
    return made


def test_a_checkpoint_scores_as_transformers_does(world: TinyWorld, cross_encoder: Path, tmp_path: Path) -> None:
    """Own tokeniser, own rows, segments, any number of length groups; padding changes nothing."""
    own = own_world(world, cross_encoder, tmp_path)
    config = replace(CONFIG, name=str(cross_encoder), max_question_tokens=40, max_passage_tokens=100)
    system = make(world, replace(config))
    assert system.reranker is not None
    reranker = build_reranker(config, world.encoder, 1)
    assert reranker is not None
    reranker.eval()
    collator = Collator(own.store(), own.question_store("test"), system.generator, 0)
    collator.pairing = reranker_pairing(load_tokenizer(cross_encoder))
    passages = hits_of()
    batch = collator(NUMBERS, passages)
    assert batch.pairs is not None
    tokenizer, model = load_tokenizer(cross_encoder), reranker.model
    with torch.no_grad():
        found = reranker(batch.pairs).unflatten(0, (6, 4))
        for row, some in enumerate(passages):
            question = own.question_store("test").text(row)
            for column, number in enumerate(some):
                passage = own.store().passage(int(number))
                inputs = tokenizer(question, f"{passage.title} {passage.text}", return_tensors="pt")
                expected = model(**inputs).logits.item()
                assert found[row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.std() > 0.05


# ---------------------------------------------------------------- p(z|q)


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("name", ["rag_sequence", "pdist", "emdr2", "fused"])
def test_scores_and_gradients_are_those_of_the_formula(world: TinyWorld, mode: str, name: str) -> None:
    """p(z|q) = softmax of retriever + re-ranker, or of the re-ranker alone; its gradient through every objective that
    uses p(z|q) is that of scores computed apart."""
    system = make(world, replace(CONFIG, mode=mode))
    assert system.reranker is not None
    batch = collator_of(world, system)(NUMBERS, hits_of())
    assert batch.pairs is not None
    objective = ObjectiveConfig(name=name)
    outputs = system.likelihoods(batch, needs(objective), 1.0)
    dense = System(system.retriever, system.generator).scores(batch)
    reranked = system.reranker(batch.pairs).unflatten(0, (6, 4))
    expected = reranked if mode == "replace" else dense + reranked
    torch.testing.assert_close(outputs.scores, expected)
    loss, _ = compute(objective, outputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in system.reranker.named_parameters() if p.grad is not None}
    system.zero_grad()
    apart = system.reranker(batch.pairs).unflatten(0, (6, 4))
    if name == "fused":  # the scores stand in the reader's attention: by differences
        weight = system.reranker.model.get_parameter("classifier.bias")
        values = []
        with torch.no_grad():
            direction = torch.zeros_like(system.reranker.model.get_parameter("classifier.weight"))
            direction[0, 0] = 1.0
            for step in (1e-2, -1e-2):
                system.reranker.model.get_parameter("classifier.weight").add_(step * direction)
                values.append(compute(objective, system.likelihoods(batch, needs(objective), 1.0))[0].item())
                system.reranker.model.get_parameter("classifier.weight").sub_(step * direction)
        slope = (values[0] - values[1]) / 2e-2
        assert gradients["model.classifier.weight"][0, 0].item() == pytest.approx(slope, rel=5e-2, abs=2e-4)
        assert weight.shape == (1,)
        return
    scores = apart if mode == "replace" else dense.detach() + apart
    again = replace(outputs, scores=scores)
    again.per_passage = None if outputs.per_passage is None else outputs.per_passage.detach()
    again.fused = None if outputs.fused is None else outputs.fused.detach()
    compute(objective, again)[0].backward()
    for key, parameter in system.reranker.named_parameters():
        assert parameter.grad is not None, key
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-3, atol=1e-6)
    assert max(float(value.abs().max()) for value in gradients.values()) > 1e-5


def test_one_that_replaces_trains_in_the_retrievers_place(world: TinyWorld) -> None:
    system = make(world, replace(CONFIG, mode="replace"))
    assert not any(parameter.requires_grad for parameter in system.retriever.parameters())
    group = parameter_groups(system)["retriever"]
    assert {id(one) for one in group} == {id(one) for one in system.reranker.parameters()}  # type: ignore
    batch = collator_of(world, system)(NUMBERS, hits_of())
    calls: list[int] = []
    system.retriever.query_encoder.register_forward_hook(lambda *_: calls.append(1))
    system.scores(batch)
    assert not calls
    frozen = make(world, CONFIG, train="generator_only")
    assert not parameter_groups(frozen)["retriever"]
    assert not frozen.train().reranker.training  # type: ignore


# ---------------------------------------------------------------- which candidates go on


def test_the_best_candidates_by_their_score_go_on(world: TinyWorld) -> None:
    """Those of brute force; what stands behind the candidates stays, and vectors and lexical scores move along."""
    system = make(world)
    with torch.no_grad():
        system.reranker.model.classifier.weight.mul_(30)  # type: ignore
    collator = collator_of(world, system)
    index = world.index(lexical=LexicalConfig())
    tower = system.retriever.passage_encoder.state_dict()
    index.publish(0, {name: tensor.numpy() for name, tensor in tower.items()})
    with torch.no_grad():
        queries = system.retriever.encode_queries(*collator.question_tensors(NUMBERS)).numpy()
    hits = index.submit(queries, 12, 12).result()
    hits = replace(hits, lexical=hits.scores * 2)
    with torch.no_grad():
        found = Reranking(lambda batch: system.scores(batch), collator, 9, 4)(NUMBERS, hits)
        for row in range(len(NUMBERS)):
            scores = system.scores(collator(NUMBERS[row : row + 1], [hits.ids[row, :9]]))[0].numpy()
            order = np.argsort(-scores, kind="stable")
            np.testing.assert_array_equal(found.ids[row], [*hits.ids[row, order], *hits.ids[row, 9:]])
    assert (found.ids != hits.ids).any()
    assert found.lexical is not None
    np.testing.assert_array_equal(found.lexical, found.scores * 2)
    np.testing.assert_array_equal(found.vectors, index.indexed(found.ids, index.generation).vectors)


def test_a_question_with_few_hits_keeps_them_first() -> None:
    from indexing.hits import Hits

    hits = Hits(
        ids=np.array([[4, 2, -1]]), scores=np.array([[0.9, 0.8, -np.inf]], np.float32), generation=1, weights_version=1
    )
    moved = reordered(hits, np.array([[1, 0, 2]]))
    assert moved.ids.tolist() == [[2, 4, -1]]


# ---------------------------------------------------------------- a stage


def reranking_job(world: TinyWorld, run_dir: Path, **changes: Any) -> Any:
    job = world.job(
        run_dir,
        reranker=CONFIG,
        evaluate_questions="",
        training=TrainingConfig(steps=6, batch_size=3, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=3, index=False),
    )
    return with_changes(job, **changes)


def test_a_resumed_run_equals_an_uninterrupted_one(world: TinyWorld, tmp_path: Path) -> None:
    whole = reranking_job(world, tmp_path / "whole")
    stage, _ = run_stage(whole, world.index(max_generations=1))
    parts = reranking_job(world, tmp_path / "parts")
    index = FailingIndex(world.store(), world.encoder, len(world.tokenizer), max_generations=1)
    index.fails_at = 6
    with pytest.raises(Failure):
        run_stage(parts, index)
    frozen = world.index(max_generations=1)
    Stage(reranking_job(world, tmp_path / "first"), frozen).serve_index(fresh=True)
    run_stage(parts, frozen)
    assert rows_by_step(parts) == rows_by_step(whole)
    assert same(final_weights(parts), final_weights(whole))
    before = part(dict(make_fresh(world).state_dict()), "reranker.")
    assert not same(part(final_weights(whole), "reranker."), before)
    source: Any = stage.source
    assert source.prefetcher.k == CONFIG.candidates


def make_fresh(world: TinyWorld) -> System:
    """As the stage builds it."""
    tokenizers = (world.tokenizer, world.tokenizer)
    return build_system(
        world.encoder,
        world.generator,
        train="both",
        tokenizers=tokenizers,
        seed=3,
        objective=ObjectiveConfig(),
        retrieval=RetrievalConfig(),
        reranker=CONFIG,
    )


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_evaluation_reads_what_the_reranker_chose(world: TinyWorld, tmp_path: Path, mode: str) -> None:
    """The rows' hits are the best k of the candidates by p(z|q); a replacing one leaves the index where it is."""
    changes = {"reranker": replace(CONFIG, mode=mode), "evaluate_questions": str(world.questions("test"))}
    training = TrainingConfig(steps=2, batch_size=3, warmup_steps=0, lr_retriever=0.05)
    job = reranking_job(world, tmp_path / "run", training=training, refresh=RefreshPlan(every_steps=1), **changes)
    index = world.index()
    stage, result = run_stage(job, index)
    assert index.published == ([0] if mode == "replace" else [0, 1, 2])
    assert stage.measures.evaluator is not None
    rows = stage.measures.evaluator(NUMBERS).rows
    collator = stage.measures.evaluator.collator
    stage.system.eval()
    with torch.no_grad():
        queries = stage.system.retriever.encode_queries(*collator.question_tensors(NUMBERS)).numpy()
        hits = index.submit(queries, 9).result()
        scores = stage.system.scores(collator(NUMBERS, list(hits.ids))).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal([row["hits"] for row in rows], np.take_along_axis(hits.ids, order, axis=1))
    assert result["costs"]["marginal"]["retrieval_flops"] > 0


def test_own_tokens_through_a_stage(world: TinyWorld, cross_encoder: Path, tmp_path: Path) -> None:
    own = own_world(world, cross_encoder, tmp_path / "world")
    config = replace(CONFIG, name=str(cross_encoder), max_question_tokens=40, max_passage_tokens=100)
    job = reranking_job(own, tmp_path / "run", reranker=config, training=TrainingConfig(steps=2, batch_size=3))
    before = part(final_weights_of(world, config), "reranker.")
    run_stage(job, own.index())
    assert not same(part(final_weights(job), "reranker."), before)
    assert (Path(job.run_dir) / "checkpoints" / "step-2" / "tokenizers" / "reranker" / "tokenizer.json").is_file()


def final_weights_of(world: TinyWorld, config: RerankerConfig) -> dict[str, torch.Tensor]:
    tokenizers = (world.tokenizer, world.tokenizer)
    system = build_system(
        world.encoder,
        world.generator,
        train="both",
        tokenizers=tokenizers,
        seed=3,
        objective=ObjectiveConfig(),
        retrieval=RetrievalConfig(),
        reranker=config,
    )
    return dict(system.state_dict())


def test_a_stage_starts_from_one_without_a_reranker_and_the_other_way(world: TinyWorld, tmp_path: Path) -> None:
    plain = reranking_job(world, tmp_path / "plain", reranker=RerankerConfig(), training=TrainingConfig(steps=1))
    run_stage(plain, world.index())
    start = str(Path(plain.run_dir) / "checkpoints" / "step-1")
    changes = {"init_from": start, "training": TrainingConfig(train="none", steps=0)}
    stage, _ = run_stage(reranking_job(world, tmp_path / "next", **changes), world.index())
    found, fresh = dict(stage.system.state_dict()), make_fresh(world)
    assert same(part(found, "reranker."), part(dict(fresh.state_dict()), "reranker."))
    assert same(part(found, "generator."), part(final_weights(plain), "generator."))
    assert not any(name.startswith("reranker.") for name in fit_weights(found, make(world, RerankerConfig())))
    assert built_parts(make(world, RerankerConfig())) == {}


# ---------------------------------------------------------------- what is refused


def test_a_model_without_a_head_is_no_cross_encoder(world: TinyWorld, tmp_path: Path) -> None:
    """Transformers would add a head of random weights, and only warn."""
    shape = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(shape).save_pretrained(tmp_path / "plain")
    shape.num_labels = 3
    BertForSequenceClassification(shape).save_pretrained(tmp_path / "three")
    for name, why in (("plain", "BertModel with 2 labels"), ("three", "BertForSequenceClassification with 3 labels")):
        config = replace(CONFIG, name=str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"reranker\.name=.*must be a cross-encoder.*{why}"):
            build_reranker(config, world.encoder, 50)
    with pytest.raises(ValueError, match=r"reranker\.name=.*: must be a model that can be loaded"):
        build_reranker(replace(CONFIG, name=str(tmp_path / "nothing")), world.encoder, 50)


def test_a_model_that_is_too_short_is_refused(world: TinyWorld, cross_encoder: Path) -> None:
    config = replace(CONFIG, name=str(cross_encoder), max_question_tokens=32, max_passage_tokens=190)
    with pytest.raises(ValueError, match=r"max_passage_tokens=190: must be at most 160, with 32 of the question"):
        build_reranker(config, world.encoder, 50)


def test_off_is_nothing(world: TinyWorld) -> None:
    assert build_reranker(RerankerConfig(), world.encoder, 50) is None
    assert isinstance(make(world).reranker, Reranker)
