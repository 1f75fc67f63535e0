"""From settings to the system that trains: the one place that chooses among kinds of generators."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.adapters import add_adapters
from training.models.copy_reader import CopyReader
from training.models.encoder import NullScore, Retriever, build_retriever, set_trainable
from training.models.generator import Generator
from training.models.system import System
from training.models.tokenizers import end_id, pad_id, start_id
from training.objectives.choose import needs
from training.settings import EncoderConfig, GeneratorConfig, ObjectiveConfig

NULL_SCORE = "retriever.null.score"  # its name in a state dict


def build_system(
    encoder: EncoderConfig,
    generator: GeneratorConfig,
    train: str,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    seed: int,
    objective: ObjectiveConfig | None = None,
) -> System:
    """The system with `requires_grad` set for `train`; fresh weights depend on `seed` alone, not on what ran before.

    `tokenizers` are the retriever's and the generator's. `objective`: what it will be trained with, for what only that
    needs. With `lora.rank`, what trains are adapters, and what does not train has none. Raises ValueError that names
    the setting.
    """
    torch.manual_seed(seed)
    retriever = build_retriever(encoder, train, len(tokenizers[0]))
    torch.manual_seed(seed + 1)
    reader = build_generator(generator, tokenizers[1])
    if objective is not None:
        _fit_objective(objective, retriever, reader, train)
    trains = train in ("both", "query_only", "generator_only")
    reader.requires_grad_(trains)
    if generator.lora.rank and trains:
        assert isinstance(reader.model, PreTrainedModel)
        add_adapters(reader.model, generator.lora, "generator.lora")
    return System(retriever, reader)


def _fit_objective(objective: ObjectiveConfig, retriever: Retriever, reader: Generator, train: str) -> None:
    """Add what `objective` alone learns; refuse a generator that cannot serve it."""
    if objective.name == "realm" and objective.null_score == "learned":
        retriever.null = NullScore()
        set_trainable(retriever, train)
    if needs(objective).attention:
        reader.check_attention(objective.name)


def fit_weights(state: Mapping[str, Tensor], system: System) -> dict[str, Tensor]:
    """Weights of a system that was trained with another objective, for `system`: a score of reading no passage that is
    not known here is left out, one that is not in `state` starts as it was built."""
    fitted = {name: tensor for name, tensor in state.items() if name != NULL_SCORE}
    if system.retriever.null is not None:
        fitted[NULL_SCORE] = state.get(NULL_SCORE, torch.zeros(1))
    return fitted


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
