"""InfoNCE over two real gloo ranks: gathered passages have the gradient of the whole batch."""

import pytest
import torch
from torch import Tensor, distributed

from tests.helpers.distributed import spawn
from tests.helpers.objective_inputs import CONTRASTIVE, Pairs, contrastive_loss_of, random_pairs
from training.objectives.contrastive import gather_rows


def encoded(weight: Tensor, pairs: Pairs) -> Pairs:
    """Pairs whose two sides went through one shared linear encoder."""
    return Pairs(pairs.queries.detach() @ weight, pairs.passages.detach() @ weight, pairs.numbers)


def shared_weight() -> Tensor:
    """The encoder's weights, equal on every rank."""
    return torch.eye(4, dtype=torch.float64).mul(0.5).add(0.1).requires_grad_()


def on_rank(rank: int, world_size: int) -> tuple[float, list[list[float]]]:
    """Loss and gradient of the shared weights, averaged over ranks as an engine does."""
    weight = shared_weight()
    share = 8 // world_size
    mine = encoded(weight, random_pairs().rows(rank * share, (rank + 1) * share))
    loss, _ = contrastive_loss_of(CONTRASTIVE[0], mine, gather_rows)
    loss.backward()
    assert weight.grad is not None
    averaged = [loss.detach(), weight.grad]
    for value in averaged:
        distributed.all_reduce(value)
        value /= world_size
    return averaged[0].item(), averaged[1].tolist()


def test_two_ranks_equal_the_whole_batch() -> None:
    weight = shared_weight()
    whole, _ = contrastive_loss_of(CONTRASTIVE[0], encoded(weight, random_pairs()))
    whole.backward()
    assert weight.grad is not None
    for loss, gradient in spawn(on_rank, 2):
        assert loss == pytest.approx(whole.item())
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), weight.grad)


def test_without_a_group_the_rows_are_all_there_are() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) == (rows, 0)
