"""Load models of transformers in the same way for encoder and generators, and check their limits."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from indexing.declare import refuse
from training.training_settings import ATTENTIONS

POSITION_NAMES = ("position_embeddings", "embed_positions", "wpe")


def choose_attention(setting: str, name: str) -> str:
    """Return the attention kernel: `auto` is eager on a CPU, where the backward pass of SDPA with a padding mask is
    slow, and sdpa on a GPU."""
    if setting not in ATTENTIONS:
        raise refuse(name, setting, f"must be one of {', '.join(ATTENTIONS)}")
    if setting == "auto":
        return "sdpa" if torch.cuda.is_available() else "eager"
    return setting


def load_pretrained(auto_class: Any, name: str, setting: str, **options: Any) -> PreTrainedModel:
    """Load `name` in float32, quietly. Raises ValueError that names `setting` if it cannot be loaded."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{setting}={name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def encoder_only(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder of a model without its pooler, whose unused weights would be published, clipped and saved."""
    if model.config.is_encoder_decoder:
        model = cast(PreTrainedModel, model.get_encoder())
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)
    model.config.use_cache = False
    return model


def num_positions(model: nn.Module) -> int | None:
    """Return the number of positions of learned embeddings (RoBERTa's and BART's start late); None for other kinds."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in POSITION_NAMES:
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", padding))
    return None


def is_sharded(model: PreTrainedModel) -> bool:
    """Return true if ZeRO 3 spreads the weights over ranks: every call is a collective; no rank stops early."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_vocabulary(model: PreTrainedModel, num_tokens: int) -> None:
    """Raise ValueError if the tokeniser has more tokens than the model."""
    embeddings = model.get_input_embeddings()
    rows = int(getattr(embeddings, "num_embeddings", num_tokens))
    if num_tokens > rows:
        raise ValueError(f"generator.name: the tokeniser has {num_tokens} tokens, the model only {rows}")
