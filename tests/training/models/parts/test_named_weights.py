"""Weights by name: shared tensors, and states that do not fit."""

import pytest
import torch

from tests.helpers.toy import ToySystem
from training.models.parts.named_weights import load_weights_into, match_weights, named_weights, tied_names


def test_a_shared_tensor_stands_under_its_first_name() -> None:
    system = ToySystem()
    assert not any("passage_encoder" in name for name in named_weights(system))
    assert tied_names(system)["retriever.passage_encoder.layer.bias"] == "retriever.query_encoder.layer.bias"
    assert tied_names(ToySystem(shared=False)) == {}


def test_shared_and_separate_towers_load_each_other() -> None:
    shared, separate = ToySystem(seed=7), ToySystem(seed=3, shared=False)
    load_weights_into(separate, shared.state_dict())
    weights = separate.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in shared.state_dict().items())
    separate.retriever.query_encoder.layer.bias.data += 1.0
    with pytest.raises(ValueError, match="are one weight of this model and differ"):
        load_weights_into(shared, separate.state_dict())


def test_weights_that_do_not_fit() -> None:
    system, state = ToySystem(), dict(ToySystem().state_dict())
    bias = state.pop("generator.layer.bias")
    with pytest.raises(ValueError, match=r"missing generator.layer.bias, unknown none"):
        match_weights(system, state, strict=True)
    assert "generator.layer.bias" not in match_weights(system, state, strict=False)
    with pytest.raises(ValueError, match=r"generator.layer.bias has shape \(12,\) in this model and \(1, 12\)"):
        match_weights(system, state | {"generator.layer.bias": bias[None]}, strict=False)
