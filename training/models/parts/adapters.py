"""Train low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) through `peft`: y = W x + alpha / rank * B A x,
where A and B are trained and W is fixed. B starts at zero, so that an adapter changes nothing until it is trained.

There are no adapters outside of the trainer: weights that are published, saved or exported are `merged`, that is,
alpha / rank * B A is added to W. Weights that are loaded go into W, and B starts at zero again. So with its adapters
disabled, a system computes as at the start of its stage.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from indexing.declare import refuse
from training.models.parts.named_weights import is_adapter
from training.training_settings import LoraConfig

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, config: LoraConfig, setting: str) -> None:
    """Freeze `model` and put trainable adapters on its linear layers. Raises ValueError naming `setting` if none of
    `target_modules` is a layer that can have one."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = target_names(model, config.target_modules, setting)
    model.requires_grad_(False)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    inject_adapter_in_model(peft_config, model, ADAPTER)


def target_names(model: PreTrainedModel, targets: list[str], setting: str) -> list[str]:
    """Return the full names of the layers that get an adapter. `["auto"]` selects every linear layer that computes by
    being called, but no output head. Kernels of state-space layers read the weights of all but `in_proj` directly."""
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    mixers = {name for name, module in model.named_modules() if hasattr(module, "conv1d")}

    def fits(name: str) -> bool:
        parent, _, last = name.rpartition(".")
        return layers[name] is not head and (parent not in mixers or last == "in_proj")

    possible = [name for name in layers if fits(name)]
    if targets == ["auto"]:
        return possible
    wrong = [end for end in targets if not any(f".{name}".endswith(f".{end}") for name in possible)]
    if wrong:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in possible}))
        raise refuse(f"{setting}.target_modules", wrong[0], f"must be auto, or some of {known}")
    return [name for name in possible if any(f".{name}".endswith(f".{end}") for end in targets)]


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and layer of every layer below `module` with an adapter; shared layers come under all their names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


def has_adapters(module: nn.Module) -> bool:
    """Return true if some layer below `module` has an adapter."""
    return next(adapted(module), None) is not None


def trains_adapters_only(module: nn.Module) -> bool:
    """Return true if some weights train, and all of them are those of adapters."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(is_adapter(name) for name in trained)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Compute without adapters inside the block, as the system did when its stage started. `requires_grad` stays."""
    layers = list({id(layer): layer for _, layer in adapted(module)}.values())
    # The switch of peft sets requires_grad as well, of adapters that are not trained, too.
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@torch.no_grad()
def merged(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state`, the whole weights of `module`, as that of a model without adapters: each adapter is added to the
    weight of its layer. Shared weights may stand under any of their names."""
    result = dict(state)
    for name, layer in adapted(module):
        if f"{name}.base_layer.weight" not in result:
            continue
        a = result.pop(f"{name}.lora_A.{ADAPTER}.weight")
        b = result.pop(f"{name}.lora_B.{ADAPTER}.weight")
        change = layer.scaling[ADAPTER] * (b @ a)
        weight = result.pop(f"{name}.base_layer.weight")
        result[f"{name}.weight"] = weight + (change.T if layer.fan_in_fan_out else change)
        if f"{name}.base_layer.bias" in result:
            result[f"{name}.bias"] = result.pop(f"{name}.base_layer.bias")
    return result
