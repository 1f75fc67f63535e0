"""Build the system that trains from its settings; only here is a kind of generator chosen."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.models.generators.copy_reader import CopyReader
from training.models.generators.generator import Generator
from training.models.parts.adapters import add_adapters
from training.models.retriever.encoder import LexicalWeight, NullScore, Retriever, build_retriever, set_trainable
from training.models.retriever.reranker import build_reranker
from training.models.system import System
from training.models.text.tokenizers import end_id, pad_id, start_id
from training.objectives.dispatch import needs
from training.training_settings import EncoderConfig, GeneratorConfig, ObjectiveConfig, RerankerConfig, RetrievalConfig

NULL_SCORE = "retriever.null.score"  # name in a state dict
LEXICAL_WEIGHT = "retriever.lexical.raw"
RERANKER = "reranker."
TRAINS_RETRIEVER = ("both", "query_only", "retriever_only")


def build_system(
    encoder: EncoderConfig,
    generator: GeneratorConfig,
    *,
    train: str,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    seed: int,
    objective: ObjectiveConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    reranker: RerankerConfig | None = None,
) -> System:
    """Return the system with `requires_grad` set for `train`; fresh weights depend on `seed` alone.

    `tokenizers` are the retriever's and the generator's. `objective` may add weights that it alone learns, `retrieval`
    a learned lexical weight. With `lora.rank`, only adapters train, and a part that does not train has none. A
    `reranker` trains where the retriever does; one that replaces the retriever's score trains in its place. Raises
    ValueError that names the setting.
    """
    torch.manual_seed(seed)
    retriever = build_retriever(encoder, train, len(tokenizers[0]))
    torch.manual_seed(seed + 1)
    language_model = build_generator(generator, tokenizers[1])
    if objective is not None:
        _fit_objective(objective, retriever, language_model, train)
    trains = train in ("both", "query_only", "generator_only")
    language_model.requires_grad_(trains)
    if generator.lora.rank and trains:
        assert isinstance(language_model.model, PreTrainedModel)
        add_adapters(language_model.model, generator.lora, "generator.lora")
    if objective is not None and needs(objective).in_batch:  # searches nothing: there is no hit to score
        retrieval = reranker = None
    if retrieval is not None and retrieval.hybrid == "learned":
        retriever.lexical = LexicalWeight(retrieval.lexical_weight)
        retriever.lexical.requires_grad_(train in TRAINS_RETRIEVER)
    torch.manual_seed(seed + 2)
    judge = build_reranker(reranker, encoder, len(tokenizers[0])) if reranker is not None else None
    if judge is not None:
        judge.requires_grad_(train in TRAINS_RETRIEVER)
        if judge.replaces:
            retriever.requires_grad_(False)
    return System(retriever, language_model, judge)


def _fit_objective(objective: ObjectiveConfig, retriever: Retriever, generator: Generator, train: str) -> None:
    """Add what `objective` alone learns; refuse a generator that cannot serve it."""
    if objective.name == "realm" and objective.null_score == "learned":
        retriever.null = NullScore()
        set_trainable(retriever, train)
    if needs(objective).attention:
        generator.check_attention(objective.name)


def fit_weights(
    state: Mapping[str, Tensor], system: System, built: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the weights `state` of a system that had other parts, fitted to `system`: a null score, a lexical weight
    or a re-ranker that `system` lacks is left out; one that `state` lacks starts as it was built. `built` is the result
    of `built_parts` before an engine took the system, None if no engine has."""
    optional = (NULL_SCORE, LEXICAL_WEIGHT)
    fitted = {name: tensor for name, tensor in state.items() if name not in optional and not name.startswith(RERANKER)}
    retriever, reranker = system.retriever, system.reranker
    if retriever.null is not None:
        fitted[NULL_SCORE] = state.get(NULL_SCORE, torch.zeros(1))
    if retriever.lexical is not None:
        fitted[LEXICAL_WEIGHT] = state.get(LEXICAL_WEIGHT, torch.tensor([retriever.lexical.start]))
    if reranker is not None:
        trained = {name: tensor for name, tensor in state.items() if name.startswith(RERANKER)}
        fitted |= trained or (built_parts(system) if built is None else built)
    return fitted


def built_parts(system: System) -> dict[str, Tensor]:
    """Return copies of the re-ranker's weights; an empty dictionary without one."""
    if system.reranker is None:
        return {}
    return {name: tensor.detach().clone() for name, tensor in system.state_dict().items() if name.startswith(RERANKER)}


def build_generator(config: GeneratorConfig, tokenizer: PreTrainedTokenizerFast) -> Generator:
    """Return the generator of `config.kind`. Raises ValueError for a checkpoint that does not fit."""
    match config.kind:
        case "copy":
            start = start_id(tokenizer)
            return CopyReader(
                config,
                len(tokenizer),
                start_id=end_id(tokenizer) if start is None else start,
                end_id=end_id(tokenizer),
                pad_id=pad_id(tokenizer),
            )
        case "fusion":
            from training.models.generators.fusion_in_decoder import FusionGenerator

            return FusionGenerator(config, tokenizer)
        case "causal":
            from training.models.generators.causal import CausalGenerator

            return CausalGenerator(config, tokenizer)
    raise AssertionError(f"check_values let {config.kind!r} through")


def parameter_groups(system: System) -> dict[str, Sequence[nn.Parameter]]:
    """Return the weights that train, as the two groups with their own learning rate, norm and clip."""
    scorers = [system.retriever] + ([system.reranker] if system.reranker is not None else [])
    return {
        "retriever": [p for part in scorers for p in part.parameters() if p.requires_grad],
        "generator": [p for p in system.generator.parameters() if p.requires_grad],
    }
