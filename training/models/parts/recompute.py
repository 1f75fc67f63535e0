"""Compute a part without keeping its activations, and compute it again for its gradient.

The checkpointing of torch fails under ZeRO 3 without re-entering (the weights that a repeated forward gathers are
released before its backward) and, with re-entering, under ZeRO 2 if several parts share weights (the gradient of a
weight would be reduced once for each part). Here the weights are inputs of one autograd function: a part hands on the
gradients of its weights as any operation does, and the engine sees each weight's sum once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Run = Callable[..., Tensor]


def recomputed(run: Run, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return `run(*inputs)` without keeping activations. `parameters` are all weights that `run` uses and that may
    train. The repetition draws the same random numbers and computes in the same precision. Without gradient, `run` is
    just called."""
    if not torch.is_grad_enabled():
        return run(*inputs)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return cast(Tensor, _Recomputed.apply(run, len(inputs), *inputs, *trained))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, num_inputs: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:num_inputs]
        ctx.run, ctx.parameters, ctx.conditions = run, tensors[num_inputs:], _Conditions(inputs[0].device)
        ctx.save_for_backward(*inputs)
        with ctx.conditions.precision():
            return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad(), ctx.conditions.again():
            output = ctx.run(*inputs)
        wanted = [t for t, need in zip([*inputs, *ctx.parameters], needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)


class _Conditions:
    """Remembers the random states and the precision of the moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = torch.get_rng_state()
        self.device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    def precision(self) -> torch.autocast:
        """Set the precision without autocast's cache: a 16-bit copy made without gradient must not serve with one."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.autocast, cache_enabled=False)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore the states inside the block; afterwards all is as if nothing had been drawn."""
        devices = [self.device] if self.device_state is not None else []
        with torch.random.fork_rng(devices=devices), self.precision():
            torch.set_rng_state(self.state)
            if self.device_state is not None:
                torch.cuda.set_rng_state(self.device_state, self.device)
            yield
