"""The shapes that signatures of objectives give are checked while the tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from training.objectives.inputs import mixture_log_probs


def test_a_wrong_shape_is_refused() -> None:
    prior, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert mixture_log_probs(prior, torch.zeros(2, 3, 5), mask).shape == (2, 5)
    with pytest.raises(TypeCheckError, match="values"):
        mixture_log_probs(prior, torch.zeros(2, 4, 5), mask)
