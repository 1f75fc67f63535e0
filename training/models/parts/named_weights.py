"""List and load weights by name; one tensor may have several names (shared towers, tied embeddings)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, each once, under the first of its names in `state_dict` order. They are
    no copies (under ZeRO 3: parameters whose data may lie elsewhere)."""
    return {names[0]: tensor for names, tensor in _tensors(module)}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Map every further name of a tensor to the first one, under which `named_weights` lists it; adapters are left
    out of the names."""
    weights = [names for names, _ in _tensors(module) if not is_adapter(names[0])]
    return {plain_name(name): plain_name(names[0]) for names in weights for name in names[1:]}


def is_adapter(name: str) -> bool:
    """Return true if this is a weight of a low-rank adapter (`training/models/parts/adapters.py`)."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """Return the name that the weight of an adapted layer has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def match_weights(module: nn.Module, state: Mapping[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """Return the entries of `state` under the names of `named_weights`; a tied weight may stand under any of its names.

    `state` has no adapters: its weights go below those of `module`, whose second factors become zero. Raises ValueError
    naming the weights if shapes differ, one weight has two values or, if `strict`, names are missing or unknown.
    """
    matched, missing, known = {}, [], set()
    for names, tensor in _tensors(module):
        shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO 3 keeps the whole shape here
        if is_adapter(names[0]):
            if ".lora_B." in names[0]:
                matched[names[0]] = torch.zeros(shape)
            continue
        plain = [plain_name(name) for name in names]
        known.update(plain)
        present = [name for name in plain if name in state]
        if not present:
            missing.append(plain[0])
            continue
        value = state[present[0]]
        for other in present[1:]:
            if state[other] is not value and not torch.equal(state[other], value):
                raise ValueError(f"{present[0]} and {other} are one weight of this model and differ in what is loaded")
        if value.shape != shape:
            raise ValueError(f"{plain[0]} has shape {tuple(shape)} in this model and {tuple(value.shape)} in the file")
        matched[names[0]] = value
    unknown = sorted(state.keys() - known)
    if strict and (missing or unknown):
        raise ValueError(f"weights do not fit this model: missing {_some(missing)}, unknown {_some(unknown)}")
    return matched


def load_weights_into(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy `state` into a module that no engine owns; errors as `match_weights`."""
    weights = named_weights(module)
    with torch.no_grad():
        for name, value in match_weights(module, state, strict).items():
            weights[name].copy_(value)


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
