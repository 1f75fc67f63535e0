"""Low-rank adapters: what trains, what leaves the trainer, and the system without them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing.indexing_settings import WorldConfig
from tests.helpers.families import CAUSAL, FUSION, generator_config, write_families, write_family, write_tokenizer
from tests.helpers.local_index import LocalIndex
from tests.helpers.tiny_world import TinyWorld, make_world, tiny_encoder
from training.checkpoint import load_weights, newest_checkpoint
from training.models.build import build_generator, build_system, parameter_groups
from training.models.parts.adapters import adapters_disabled, has_adapters, merged
from training.models.parts.named_weights import load_weights_into
from training.models.retriever.encoder import build_encoder, load_encoder_state, passage_state
from training.models.system import System
from training.models.text.tokenizers import load_tokenizer
from training.refreshing.policy import RefreshPlan
from training.stage import Stage
from training.training_settings import CheckpointConfig, EncoderConfig, FreshEncoderConfig, LoraConfig, TrainingConfig

LORA = LoraConfig(rank=2, alpha=6.0)
ENCODER = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32), max_passage_tokens=16
)
ROWS = np.random.default_rng(0)
QUESTIONS = [ROWS.integers(10, 100, n) for n in (2, 5)]
PASSAGES = [[ROWS.integers(10, 100, n) for n in lengths] for lengths in ((3, 12, 7), (9, 1))]
ANSWERS = [ROWS.integers(10, 100, n) for n in (1, 4)]
IDS = torch.arange(10, 30).view(4, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_families(folder, load_tokenizer(write_tokenizer(folder)), FUSION + CAUSAL)
    return folder


def make(
    family: str, folder: Path, lora: LoraConfig = LORA, train: str = "both", towers: str = "shared", seed: int = 1
) -> System:
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoder = replace(ENCODER, lora=lora, towers=towers)
    generator = generator_config(family, folder, lora=lora)
    return build_system(encoder, generator, train=train, tokenizers=(tokenizer, tokenizer), seed=seed).eval()


def train_adapters(system: System) -> None:
    """As if they had been trained: B is no longer zero."""
    torch.manual_seed(9)
    with torch.no_grad():
        for group in parameter_groups(system).values():
            for parameter in group:
                parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def outputs(system: System) -> tuple[torch.Tensor, ...]:
    """Vectors of both towers, and log-probabilities."""
    batch = system.generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    fused = system.generator.fused_log_probs(system.generator.read(batch), batch)
    mask = torch.ones_like(IDS)
    return system.retriever.encode_queries(IDS, mask), system.retriever.encode_passages(IDS, mask), fused


def equal(one: tuple[torch.Tensor, ...], two: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", FUSION + CAUSAL)
def test_only_adapters_train_and_merging_leaves_the_outputs(family: str, folder: Path) -> None:
    plain, system = make(family, folder, LoraConfig()), make(family, folder)
    start = outputs(system)
    assert equal(start, outputs(plain))  # fresh adapters change nothing
    trained = [name for name, weight in system.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"retriever", "generator"}
    groups = parameter_groups(system)
    assert sum(len(group) for group in groups.values()) == len(trained)
    train_adapters(system)
    after = outputs(system)
    for old, new in zip(start, after, strict=True):
        assert not torch.allclose(old, new, atol=1e-2)
    state = merged(system, system.state_dict())
    assert state.keys() == plain.state_dict().keys()
    load_weights_into(plain, state)
    assert not has_adapters(plain)
    assert equal(outputs(plain), after)
    with adapters_disabled(system):
        assert equal(outputs(system), start)
    assert equal(outputs(system), after)


def test_what_is_loaded_goes_below_new_adapters(folder: Path) -> None:
    """So that "adapters disabled" is the system as its stage started."""
    first, second = make("gpt2", folder), make("gpt2", folder, seed=2)
    train_adapters(first)
    train_adapters(second)
    load_weights_into(second, merged(first, first.state_dict()))
    assert equal(outputs(second), outputs(first))
    with adapters_disabled(second):
        assert equal(outputs(second), outputs(first))
    batch = second.generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    second.generator.fused_log_probs(None, batch).sum().backward()
    moved = [w.grad for w in parameter_groups(second)["generator"] if w.grad is not None and w.grad.abs().sum() > 0]
    assert moved  # A is not zero: B can learn
    state = merged(first, first.state_dict())
    del state["generator.model.transformer.wte.weight"], state["generator.model.lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing generator\.model\.transformer\.wte\.weight, unknown none"):
        load_weights_into(second, state)


def test_without_adapters_nothing_else_changes(folder: Path) -> None:
    system = make("llama", folder, train="retriever_only")
    assert not has_adapters(system.generator)  # it does not train
    before = [weight.requires_grad for weight in system.parameters()]
    with adapters_disabled(system):
        assert [weight.requires_grad for weight in system.parameters()] == before
    with pytest.raises(KeyError), adapters_disabled(system):
        raise KeyError("inside")
    train_adapters(system)
    start = make("llama", folder, LoraConfig())
    assert not equal(outputs(system), outputs(start))  # on again after an error
    with adapters_disabled(system), adapters_disabled(system.retriever):
        assert equal(outputs(system), outputs(start))
    assert not has_adapters(make("llama", folder, train="none"))


@pytest.mark.parametrize(("train", "towers"), [("both", "shared"), ("both", "separate"), ("query_only", "shared")])
def test_published_weights_fit_a_refresh_worker(train: str, towers: str, folder: Path) -> None:
    system = make("llama", folder, train=train, towers=towers)
    train_adapters(system)
    vocabulary = len(load_tokenizer(folder / "tokenizer"))
    worker = build_encoder(replace(ENCODER, lora=LORA), vocabulary).eval()  # as a worker does
    load_encoder_state(worker, passage_state(system.retriever))
    queries, passages, _ = outputs(system)
    with torch.no_grad():
        torch.testing.assert_close(worker(IDS, torch.ones_like(IDS)), passages, rtol=1e-4, atol=1e-5)
    assert torch.allclose(queries, passages, atol=1e-4) == (towers == "shared" and train == "both")


def test_target_modules(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")

    def targets(family: str, *modules: str) -> set[str]:
        lora = replace(LORA, target_modules=list(modules))
        generator: Any = build_generator(generator_config(family, folder), tokenizer)
        from training.models.parts.adapters import add_adapters

        add_adapters(generator.model, lora, "generator.lora")
        return {name.partition(".lora_")[0] for name, w in generator.model.named_parameters() if w.requires_grad}

    ends = {name.rpartition(".")[2] for name in targets("llama", "auto")}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets("llama", "q_proj", "self_attn.v_proj") == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"
    }
    assert targets("mamba", "auto") == {f"backbone.layers.{layer}.mixer.in_proj" for layer in range(2)}
    assert all("lm_head" not in name for family in CAUSAL for name in targets(family, "auto"))
    with pytest.raises(ValueError, match=r"generator\.lora\.target_modules=w_proj: must be auto, or some of"):
        targets("llama", "w_proj")
    with pytest.raises(ValueError, match=r"generator\.lora\.target_modules=lm_head: must be auto"):
        targets("llama", "lm_head")


# ---------------------------------------------------------------- a whole stage


@pytest.fixture(scope="module")
def lora_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A world whose generator is a Llama from a folder."""
    folder = tmp_path_factory.mktemp("lora")
    generator = generator_config("llama", folder, max_passage_tokens=48)
    world = make_world(folder, WorldConfig(num_people=10, num_values=8), tiny_encoder(16, 400), generator)
    write_family("llama", folder, len(world.tokenizer), sharpen=1.0)
    return world


def test_a_stage_with_adapters_and_what_follows_it(lora_world: TinyWorld, tmp_path: Path) -> None:
    world = replace(
        lora_world,
        encoder=replace(lora_world.encoder, lora=LORA),
        generator=replace(lora_world.generator, lora=LORA),
    )
    training = TrainingConfig(steps=4, batch_size=4, warmup_steps=0, lr_retriever=0.02, lr_generator=0.02)
    job = world.job(tmp_path / "trained", training=training, refresh=RefreshPlan(every_steps=2))
    stage = Stage(job, world.index())  # the index takes what is published as it takes any encoder's
    trained = stage.run()["metrics"]
    path = newest_checkpoint(tmp_path / "trained", print)
    assert path is not None
    weights = load_weights(path)
    assert not any("lora" in name or "base_layer" in name for name in weights)
    sections = (lora_world.encoder, lora_world.generator)
    tokenizers = (world.tokenizer, world.tokenizer)
    plain = build_system(*sections, train="none", tokenizers=tokenizers, seed=0).eval()  # as `ask` builds it
    load_weights_into(plain, weights)
    stage.system.eval()
    assert equal(outputs(plain), outputs(stage.system))
    # Evaluated by a stage that trains nothing, with and without the setting, it is the same system.
    for name, source in (("with", world), ("without", lora_world)):
        again = source.job(tmp_path / name, init_from=str(path), training=replace(training, train="none", steps=0))
        found = Stage(again, source.index()).run()["metrics"]
        assert found == pytest.approx(trained, rel=1e-3, abs=1e-3)
    # The next stage starts from there, with adapters of its own.
    following = world.job(tmp_path / "next", init_from=str(path), training=training)
    follower = Stage(following, world.index())
    follower.restore()
    follower.system.eval()
    assert equal(outputs(follower.system), outputs(plain))
    with adapters_disabled(follower.system):
        assert equal(outputs(follower.system), outputs(plain))


def test_a_resume_is_as_if_nothing_had_happened(lora_world: TinyWorld, tmp_path: Path) -> None:
    world = replace(lora_world, generator=replace(lora_world.generator, lora=LORA))
    runs: dict[str, dict[str, torch.Tensor]] = {}
    indexes: dict[str, LocalIndex] = {}
    for name, steps in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        training = TrainingConfig(steps=steps, batch_size=4, warmup_steps=0, schedule="constant")
        job = world.job(tmp_path / name, training=training, checkpoint=CheckpointConfig(index=False))
        if name not in indexes:  # of the start, for the whole run: a resume would build one of its own weights
            indexes[name] = world.index(max_generations=1)
        stage = Stage(job, indexes[name])
        stage.run()
        runs[name] = stage.system.state_dict()
    for name, weight in runs["whole"].items():
        torch.testing.assert_close(runs["resumed"][name], weight, rtol=1e-5, atol=1e-6, msg=name)
