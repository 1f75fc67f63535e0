"""From settings to the system that trains: the one place that chooses among kinds of generators."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.adapters import add_adapters
from training.models.copy_reader import CopyReader
from training.models.encoder import build_retriever
from training.models.generator import Generator
from training.models.system import System
from training.models.tokenizers import end_id, pad_id, start_id
from training.settings import EncoderConfig, GeneratorConfig


def build_system(
    encoder: EncoderConfig,
    generator: GeneratorConfig,
    train: str,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    seed: int,
) -> System:
    """The system with `requires_grad` set for `train`; fresh weights depend on `seed` alone, not on what ran before.

    With `lora.rank`, what trains are adapters, and what does not train has none.

    `tokenizers` are the retriever's and the generator's. Raises ValueError that names the setting.
    """
    torch.manual_seed(seed)
    retriever = build_retriever(encoder, train, len(tokenizers[0]))
    torch.manual_seed(seed + 1)
    reader = build_generator(generator, tokenizers[1])
    trains = train in ("both", "query_only", "generator_only")
    reader.requires_grad_(trains)
    if generator.lora.rank and trains:
        assert isinstance(reader.model, PreTrainedModel)
        add_adapters(reader.model, generator.lora, "generator.lora")
    return System(retriever, reader)


def build_generator(config: GeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> Generator:
    """The generator of `config.kind`. Raises ValueError for another kind."""
    match config.kind:
        case "copy":
            start = start_id(tokenizer)
            return CopyReader(
                config,
                len(tokenizer),
                end_id(tokenizer) if start is None else start,
                end_id(tokenizer),
                pad_id(tokenizer),
            )
        case "fusion":
            from training.models.fusion import FusionGenerator

            return FusionGenerator(config, tokenizer)
        case "causal":
            from training.models.causal import CausalGenerator

            return CausalGenerator(config, tokenizer)
    raise ValueError(f"generator.kind is {config.kind!r}; allowed: copy, fusion, causal")


def parameter_groups(system: System) -> dict[str, Sequence[nn.Parameter]]:
    """What trains, as the two groups with their own learning rate, norm and clip."""
    return {
        "retriever": [p for p in system.retriever.parameters() if p.requires_grad],
        "generator": [p for p in system.generator.parameters() if p.requires_grad],
    }
