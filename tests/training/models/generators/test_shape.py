"""What a configuration says of a generator before it is loaded, and the passage budgets that are refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import ATTENTION, CAUSAL, COPY, FUSION, family_config, generator_config
from training.models.generators.shape import Shape, check_context, context_of, has_attention, read_shape
from training.training_settings import FreshGeneratorConfig, GeneratorConfig


def write_config(family: str, folder: Path, **changes: Any) -> None:
    config = family_config(family, 100)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder / family)


@pytest.mark.parametrize("family", CAUSAL + FUSION)
def test_which_families_attend(family: str, tmp_path: Path) -> None:
    write_config(family, tmp_path)
    shape = read_shape(generator_config(family, tmp_path))
    assert shape is not None
    assert shape.attention == (family in (*ATTENTION, *FUSION, "jamba", "bamba"))
    limits = {"gpt2": 128, "bart": 64, "llama": 2048, "mamba": None, "mamba2": None, "t5": None}
    if family in limits:
        assert shape.context == limits[family]


def test_a_hybrid_without_an_attending_layer() -> None:
    config: Any = family_config("jamba", 100)
    assert has_attention(config)
    config.num_hidden_layers = 1  # the second layer would attend
    assert not has_attention(config)
    assert context_of(config) is None


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("llama", 1, Shape(True, 8192)),
        ("gpt2", 1, Shape(True, 1024)),
        ("mamba", 2, Shape(False, None)),
        ("mamba2", 2, Shape(False, None)),
        ("jamba", 2, Shape(True, 8192)),
        ("jamba", 1, Shape(False, None)),
    ],
)
def test_fresh_generators(family: str, layers: int, expected: Shape) -> None:
    fresh = FreshGeneratorConfig(family=family, num_decoder_layers=layers)
    assert read_shape(GeneratorConfig(kind="causal", fresh=fresh)) == expected
    assert read_shape(GeneratorConfig(kind="copy")) == Shape(True, None)
    assert read_shape(GeneratorConfig(kind="fusion")) == Shape(True, None)
    assert read_shape(GeneratorConfig(kind="causal", name="nobody/has-this")) is None


def test_budgets_larger_than_the_context(tmp_path: Path) -> None:
    write_config("gpt2", tmp_path)  # 128 tokens
    write_config("bart", tmp_path)  # 64 a passage
    write_config("mamba", tmp_path)
    gpt2 = generator_config("gpt2", tmp_path)  # 16 a passage, 8 a question, 8 and an end an answer
    check_context(gpt2, 6, fused=True)  # 6 x 16 + 17 = 113
    check_context(gpt2, 100, fused=False)
    message = r"7 x generator\.max_passage_tokens=16 \+ generator\.max_question_tokens=8 \+ "
    message += r"generator\.max_answer_tokens=8 \+ 1 = 129 tokens, the generator's context is 128: "
    message += r"lower generator\.max_passage_tokens or retrieval\.k"
    with pytest.raises(ValueError, match=message):
        check_context(gpt2, 7, fused=True)
    with pytest.raises(ValueError, match=r"1 x generator\.max_passage_tokens=112 .* lower generator\.max_passage_tok"):
        check_context(generator_config("gpt2", tmp_path, max_passage_tokens=112), 4, fused=False)
    check_context(generator_config("bart", tmp_path, max_passage_tokens=56), 100, fused=True)  # each passage alone
    with pytest.raises(ValueError, match=r"65 tokens, the generator's context is 64"):
        check_context(generator_config("bart", tmp_path, max_passage_tokens=57), 1, fused=True)
    check_context(generator_config("mamba", tmp_path), 100_000, fused=True)
    check_context(GeneratorConfig(kind="causal", name="nobody/has-this"), 100_000, fused=True)


@pytest.mark.parametrize("family", COPY)
def test_a_copy_reader_takes_encoders(family: str, tmp_path: Path) -> None:
    write_config(family, tmp_path)
    shape = read_shape(generator_config(family, tmp_path))
    assert shape == Shape(attention=True, context=40)
    config = generator_config(family, tmp_path, fresh=FreshGeneratorConfig(num_heads=3))
    with pytest.raises(ValueError, match=r"generator\.fresh\.num_heads=3: must divide 16, the width of"):
        read_shape(config)


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "mamba"])
def test_a_copy_reader_refuses_what_is_no_encoder(family: str, tmp_path: Path) -> None:
    write_config(family, tmp_path)
    kind = "fusion" if family in FUSION else "causal"
    config = generator_config(family, tmp_path, kind="copy")
    with pytest.raises(ValueError, match=rf"generator\.name=.*must be an encoder.*takes generator\.kind={kind}"):
        read_shape(config)
