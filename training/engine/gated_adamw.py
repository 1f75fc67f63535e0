"""AdamW that the engine can hold back and clip group by group."""

from typing import Any

import torch


class GatedAdamW(torch.optim.AdamW):
    """AdamW that first scales each group's gradient by its `gradient_scale`, and does nothing while `held`.

    Under every ZeRO stage DeepSpeed calls `step` on its own flat fp32 parts, so that clipping and holding back here
    act on all stages alike, and DeepSpeed's clean-up of gradients and counters runs as after any update.
    """

    # True at first: under one stage DeepSpeed begins with an empty step, which would count as Adam's first.
    held = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights once, or not at all while `held`."""
        if self.held:
            return None
        for group in self.param_groups:
            if group["gradient_scale"] != 1.0:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(group["gradient_scale"])
        return super().step(closure)
