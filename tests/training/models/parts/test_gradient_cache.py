"""Gradient caching of the passage encoder: the same gradients, and memory that does not grow with the passages."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.models.parts.recompute import recomputed
from training.models.retriever.encoder import Retriever, build_retriever
from training.training_settings import EncoderConfig, FreshEncoderConfig

FRESH = FreshEncoderConfig(num_layers=2, hidden=16, num_heads=2, intermediate=32)
CONFIG = EncoderConfig(fresh=FRESH, max_passage_tokens=16, length_groups=2)


def make(train: str = "both", **changes: Any) -> Retriever:
    torch.manual_seed(0)
    return build_retriever(replace(CONFIG, **changes), train, vocab_size=50).train()


def rows(count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(count)
    ids = torch.randint(1, 50, (count, 16), generator=random)
    lengths = torch.randint(1, 17, (count, 1), generator=random)
    return ids, torch.arange(16) < lengths


def gradients(retriever: Retriever, k: int = 5) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Vectors and gradients of a loss that uses both towers."""
    queries, passages = retriever.encode_queries(*rows(2)), retriever.encode_passages(*rows(2 * k))
    loss = retriever.scores(queries, passages.unflatten(0, (2, k))).log_softmax(-1)[:, 0].square().sum()
    loss.backward()
    return passages.detach(), {name: weight.grad for name, weight in retriever.named_parameters()}


@pytest.mark.parametrize("train", ["both", "query_only"])
@pytest.mark.parametrize("towers", ["shared", "separate"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradients_are_those_of_one_graph(train: str, towers: str, chunk: int) -> None:
    plain, cached = make(train, towers=towers), make(train, towers=towers, gradient_cache_passages=chunk)
    (vectors, expected), (found_vectors, found) = gradients(plain), gradients(cached)
    torch.testing.assert_close(found_vectors, vectors, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        other = expected[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            rounding = 1e-5 * float(other.abs().max())  # sums in another order, over elements that cancel
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 + rounding, msg=name)


def test_the_repetition_drops_what_was_dropped() -> None:
    """Both chunks at once, but with the random numbers of two calls."""
    dropping = replace(FRESH, dropout=0.3)
    cached, plain = make(fresh=dropping, gradient_cache_passages=3), make(fresh=dropping)
    ids, mask = rows(6)
    order = mask.sum(1).argsort(stable=True)
    torch.manual_seed(4)
    found = cached.encode_passages(ids, mask)
    torch.manual_seed(4)
    expected = torch.cat([plain.encode_passages(ids[part], mask[part]) for part in order.split(3)])[order.argsort()]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape)
    before = torch.get_rng_state()
    for vectors in (found, expected):
        (vectors * weights).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)  # a repetition draws nothing from what comes after
    for one, two in zip(cached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


class Live:
    """Bytes that are saved for a backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        box = _Box([tensor.detach() if tensor.is_leaf else tensor])
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self._drop, size)
        return box

    def _drop(self, size: int) -> None:
        self.now -= size


class _Box(list[Tensor]):
    pass


def peak_bytes(retriever: Retriever, num_passages: int) -> int:
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda box: box[0]):
        retriever.encode_passages(*rows(num_passages)).sum().backward()
    return live.peak


def test_memory_does_not_grow_with_the_passages() -> None:
    few, many = (peak_bytes(make(gradient_cache_passages=4), n) for n in (8, 64))
    whole_few, whole_many = (peak_bytes(make(), n) for n in (8, 64))
    assert whole_many > 6 * whole_few  # what would be kept otherwise
    own = 64 * (16 * 8 + 16 + 16 * 4)  # token ids, their mask, and a vector of each passage
    assert many < few + 2 * own
    assert many < whole_many / 4


def test_recomputed_passes_on_what_it_is_given() -> None:
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x).tanh() + frozen(x)

    weights = [*layer.parameters(), *frozen.parameters()]
    expected = torch.autograd.grad(run(x).square().sum(), [x, layer.weight, layer.bias])
    found = torch.autograd.grad(recomputed(run, (x,), weights).square().sum(), [x, layer.weight, layer.bias])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not recomputed(run, (x,), weights).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = recomputed(run, (x,), weights)
        again = run(x)  # no weight's copy without gradient was left behind
    assert half.dtype == torch.bfloat16
    for output in (half, again):
        (gradient,) = torch.autograd.grad(output.float().square().sum(), [layer.weight])
        torch.testing.assert_close(gradient, expected[1], rtol=0.1, atol=0.1)
