"""Read and change the attention of transformers' models without changing their code.

Models of transformers fetch the function that attends (eager, SDPA, ...) from one table at every call. `rerouted` puts
another function between a model and that one. It gets queries, keys and values as they are multiplied, after rotation
and caching, so that it works for every architecture and every kernel. `AttentionMass` measures what a query takes from
each key, even if the kernel gives no probabilities; `fold_queries` runs many queries over one copy of keys and values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from indexing.declare import refuse

Attend = Callable[..., tuple[Tensor, Tensor | None]]
# (attend, module, query, key, value, mask, options) -> what attend(module, query, key, value, mask, **options) returns:
# output [rows, queries, heads, head_dim] and probabilities [rows, heads, queries, keys] or None. query [rows, heads,
# queries, head_dim], key and value [rows, key heads, keys, head_dim], mask [rows, 1, queries or 1, keys] or None.
Route = Callable[
    [Attend, nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], tuple[Tensor, Tensor | None]
]
NO_PROBABILITIES = ("flash_attention_2",)  # implementations whose masks are no tensors of queries x keys


def has_attention(model: nn.Module) -> bool:
    """Return true if some layer of `model` attends: false for a state-space model, true for a hybrid. The names of its
    parts decide; `AttentionMass.per_key` refuses what only looks like attention."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def check_attention(model: nn.Module, attention: str, objective: str) -> None:
    """Raise ValueError if `model` cannot tell what its tokens attend to, which `objective` needs."""
    if not has_attention(model):
        allowed = f"must be another one, such as pdist or loop: {type(model).__name__} (a state-space model) has no"
        raise refuse("objective.name", objective, f"{allowed} attention that could be read")
    if attention in NO_PROBABILITIES:
        allowed = f"must be auto, eager or sdpa with objective.name={objective}, which needs attention probabilities"
        raise refuse("generator.attention", attention, allowed)


@contextmanager
def rerouted(model: nn.Module, route: Route) -> Iterator[None]:
    """Send every attention of `model` through `route` inside the block; other models are left alone."""
    inside = {id(module) for module in model.modules()}
    table: Any = ALL_ATTENTION_FUNCTIONS
    find, outer = table.get_interface, vars(table).get("get_interface")

    def find_rerouted(implementation: str, default: Attend) -> Attend:
        attend = find(implementation, default)

        def attend_rerouted(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            if id(module) not in inside:
                return attend(module, query, key, value, mask, **options)
            return route(attend, module, query, key, value, mask, options)

        return attend_rerouted

    table.get_interface = find_rerouted
    try:
        yield
    finally:
        if outer is None:
            del table.get_interface
        else:  # inside another rerouting
            table.get_interface = outer


class AttentionMass:
    """A route that measures for each key, without gradient, the attention probability times the norm of the value
    vector, averaged over heads, summed over layers and chosen queries.

    `places` int64 [rows, n] are the chosen queries, of which `counted` bool [rows, n] count. With `cross`, only
    attention to the states of an encoder is measured, otherwise all attention.
    """

    def __init__(self, places: Tensor, counted: Tensor, cross: bool) -> None:
        self.places, self.counted, self.cross = places, counted, cross
        self._total: Tensor | None = None

    def __call__(
        self,
        attend: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(module, query, key, value, mask, **options)
        if not (self.cross and is_causal(module)):
            with torch.no_grad():
                if weights is None:
                    chosen = self._weights(module, query, key=key, mask=mask, options=options)
                else:
                    chosen = _pick(weights, self.places)
                self._add(chosen.float(), value)
        return output, weights

    def per_key(self) -> Tensor:
        """Return the sums, float32 [rows, keys]. Raises ValueError if no layer attended."""
        if self._total is None:
            allowed = "must be another one, such as pdist or loop: no layer of this generator attends in a way that can"
            raise refuse("objective.name", "adist", f"{allowed} be read")
        return self._total

    def _add(self, weights: Tensor, value: Tensor) -> None:
        """Add the mass of one layer: weights [rows, heads, n, keys], value [rows, key heads, keys, head_dim]."""
        counted = self.counted[:, None, None, :].to(weights.dtype)
        taken = (counted @ weights).squeeze(2)  # [rows, heads, keys]
        norms = torch.linalg.vector_norm(value.float(), dim=-1)
        norms = norms.repeat_interleave(taken.shape[1] // norms.shape[1], dim=1)
        mass = (taken * norms).mean(dim=1)
        self._total = mass if self._total is None else self._total + mass

    def _weights(
        self, module: nn.Module, query: Tensor, *, key: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Compute the probabilities of the chosen queries, for a kernel that does not return them."""
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        chosen = _pick(query, self.places)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = (chosen @ keys.transpose(-1, -2)).float() * scaling
        if options.get("position_bias") is not None:
            logits = logits + _pick(options["position_bias"], self.places)
        if mask is None and is_causal(module):  # the kernel makes the mask itself
            later = torch.arange(key.shape[2], device=key.device) > self.places[:, None, :, None]
            return logits.masked_fill(later, torch.finfo(logits.dtype).min).softmax(dim=-1)
        if mask is None:
            return logits.softmax(dim=-1)
        mask = _pick(mask, self.places)[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return (logits + mask).softmax(dim=-1)


def fold_queries(times: int) -> Route:
    """Return a route for rows that come `times` in a row for each row of an encoder's states: their queries stand side
    by side over one copy of its keys and values, which would be repeated otherwise."""

    def route(
        attend: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal(module) or key.shape[0] == query.shape[0]:
            return attend(module, query, key, value, mask, **options)
        tokens = query.shape[2]
        if options.get("position_bias") is not None:
            options = {**options, "position_bias": fold(options["position_bias"], times, tokens, len(query))}
        mask = fold(mask, times, tokens, len(query)) if mask is not None else None
        output, _ = attend(module, fold(query, times, tokens, len(query)), key, value, mask, **options)
        return output.unflatten(1, (times, tokens)).flatten(0, 1), None

    return route


def fold(tensor: Tensor, times: int, tokens: int, rows: int) -> Tensor:
    """Fold [rows, heads, tokens, n] to [rows / times, heads, times * tokens, n]; an axis of 1 stands for all rows or
    all tokens."""
    tensor = tensor.expand(-1, -1, tokens, -1)
    if tensor.shape[0] != rows:
        return tensor.repeat(1, 1, times, 1)
    return tensor.unflatten(0, (rows // times, times)).transpose(1, 2).flatten(2, 3)


def is_causal(module: nn.Module) -> bool:
    """Return true if a layer attends to earlier tokens of its sequence; the other layers of a decoder attend to the
    states of an encoder."""
    return bool(getattr(module, "is_causal", False))


def _pick(tensor: Tensor, places: Tensor) -> Tensor:
    """Pick the queries `places` [rows, n] of [rows, heads, queries, m]; axes of 1 stay."""
    if tensor.shape[2] == 1:
        return tensor
    tensor = tensor.expand(len(places), -1, -1, -1)
    index = places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)
