"""Generators, adapters and passage budgets that are refused before a model loads."""

import json
from pathlib import Path

import pytest

from cluster.config.experiment import load, to_yaml
from cluster.config.preflight import changes_since, check_models
from cluster.config.settings import Settings

GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.yaml").write_text("generator: {kind: causal, fresh: {hidden: 16, num_heads: 2}}\n")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(GPT2))
    return str(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generator.fresh.family=mambo"], r"generator\.fresh\.family=mambo: must be one of llama, .*mamba"),
        (["generator.lora.rank=4"], r"generator\.lora\.rank=4: must be 0, or generator\.name or run\.init_from given"),
        (["encoder.lora.rank=4"], r"encoder\.lora\.rank=4: must be 0, or encoder\.name or run\.init_from given"),
        (["generator.lora.rank=4", "generator.kind=copy"], r"generator\.lora\.rank=4: must be 0 with generator\.kind"),
        (["generator.lora.rank=-1"], r"generator\.lora\.rank=-1: must not be negative"),
        (["generator.lora.alpha=0"], r"generator\.lora\.alpha=0.*: must be above 0"),
        (["generator.lora.dropout=2"], r"generator\.lora\.dropout=2.*: must be between 0 and 1"),
        (["generator.lora.dropout=1", "generator.lora.rank=2", "run.init_from=x"], r"lora\.dropout=1.*: must be below"),
        (
            ["generator.lora.target_modules=[auto,q]", "generator.lora.rank=2", "run.init_from=x"],
            r"generator\.lora\.target_modules=.*: must be \[auto\] or names of layers",
        ),
        (["generator.loss_chunk_tokens=-1"], r"generator\.loss_chunk_tokens=-1: must not be negative"),
        (["encoder.gradient_cache_passages=-2"], r"encoder\.gradient_cache_passages=-2: must not be negative"),
        (["generator.lora.ranks=2"], r"generator\.lora\.ranks.*Did you mean"),
    ],
)
def test_refusals(file: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load([file], overrides)


def test_lists_of_layers(file: str) -> None:
    lora = ["generator.lora.rank=2", "generator.lora.target_modules=[q_proj,v_proj]", "run.init_from=other"]
    assert load([file], lora).settings.generator.lora.target_modules == ["q_proj", "v_proj"]
    assert load([file], []).settings.generator.lora.target_modules == ["auto"]


def test_a_passage_budget_larger_than_the_context(file: str) -> None:
    gpt2 = [f"generator.name={Path(file).parent / 'gpt2'}", "objective.score_bias=false"]

    def check(*overrides: str) -> None:
        check_models(load([file], [*gpt2, *overrides]).settings)

    check("retrieval.k=50")  # one passage at a time
    check("retrieval.k=3", "objective.name=emdr2")  # 3 x 64 + 32 + 17 = 241
    for overrides in (
        ["objective.name=emdr2"],
        ["evaluation.decoding.mode=fused"],
        ["evaluation.also=[fused]"],
    ):
        with pytest.raises(
            ValueError, match=r"4 x generator\.max_passage_tokens=64 .* = 305 tokens, .* context is 256"
        ):
            check("retrieval.k=4", *overrides)
        check("retrieval.k=4", "retrieval.source=none", "training.train=generator_only", *overrides)
    check("retrieval.k=4", "generator.name=", "generator.fresh.family=mamba", "objective.name=emdr2")


def test_finished_run_says_what_reopens_it(tmp_path: Path) -> None:
    """Only what decides the outcome counts, and only after the end."""

    def settings(*overrides: str) -> Settings:
        return load([], [f"run.directory={tmp_path}", "run.name=r", *overrides]).settings

    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(settings()), encoding="utf-8")
    later = settings("training.steps=77", "cluster.max_failures=9", "training.lr_generator=0.5")
    assert changes_since(later) == []
    (folder / "evaluation.json").write_text("{}", encoding="utf-8")
    before = settings().training
    assert changes_since(settings()) == []
    assert sorted(changes_since(later)) == [
        f"training.lr_generator {before.lr_generator} -> 0.5",
        f"training.steps {before.steps} -> 77",
    ]
