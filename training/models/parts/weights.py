"""Turn weights into numpy arrays, which Ray shares between processes without copying; bfloat16 becomes uint16."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from training.training_settings import DTYPES


def to_numpy(state: Mapping[str, Tensor], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Copy `state` to the host: floating tensors as float32, or as bfloat16 viewed as uint16; others as they are.
    Raises ValueError for another dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"weights cannot be handed out as {dtype!r}; allowed: {', '.join(DTYPES)}")
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        host = tensor.detach().to("cpu")
        if not host.is_floating_point():
            arrays[name] = host.numpy().copy()
        elif dtype == "float32":
            arrays[name] = host.to(torch.float32).contiguous().numpy().copy()
        else:
            arrays[name] = host.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().copy()
    return arrays


def from_numpy(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Invert `to_numpy`: return float32 tensors (uint16 arrays are bfloat16) on the host, as copies."""
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        copy = torch.from_numpy(np.array(array, copy=True))
        state[name] = copy.view(torch.bfloat16).to(torch.float32) if copy.dtype == torch.uint16 else copy
    return state
