"""Length groups change nothing but the work, and weights survive the trip through numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.models.parts.weights import from_numpy, to_numpy
from training.models.text.packing import by_length, count_groups, pad_rows, row_lengths


def ragged(num_rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width, (num_rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.randint(1, 50, (num_rows, width), generator=generator) * mask
    return ids, mask.long()


@pytest.mark.parametrize("num_rows", [1, 3, 8, 17])
@pytest.mark.parametrize("num_groups", [1, 2, 4, 100])
def test_rows_come_back_in_order_with_the_same_values_and_gradients(num_rows: int, num_groups: int) -> None:
    table = nn.Embedding(50, 6)
    ids, mask = ragged(num_rows, 12)

    def vectors(ids: Tensor, mask: Tensor) -> Tensor:
        return (table(ids) * mask[..., None]).sum(1).tanh()

    weights = torch.randn(num_rows, 6)
    grads = []
    for run in (lambda: vectors(ids, mask), lambda: by_length(vectors, ids, mask, num_groups)):
        table.zero_grad()
        output = run()
        (output * weights).sum().backward()
        assert table.weight.grad is not None
        grads.append((output.detach(), table.weight.grad.clone()))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_token_states_come_back_at_full_width_with_zeros() -> None:
    ids, mask = ragged(16, 12)
    states = by_length(lambda ids, mask: ids[..., None].float() * torch.ones(3), ids, mask, 4)
    torch.testing.assert_close(states, ids[..., None].float() * torch.ones(3))


def test_groups_are_trimmed_and_counted_by_rows_alone() -> None:
    widths: list[int] = []

    def record(ids: Tensor, mask: Tensor) -> Tensor:
        widths.append(ids.shape[1])
        return ids.sum(1, keepdim=True)

    mask = (torch.arange(10) < torch.tensor([[1], [9], [2], [8], [2], [9], [1], [3]])).long()
    output = by_length(record, mask * 5, mask, 2)
    assert output.flatten().tolist() == [5, 45, 10, 40, 10, 45, 5, 15]
    assert widths == [2, 9]
    assert [count_groups(rows, 4) for rows in (0, 1, 7, 8, 15, 16, 1000)] == [1, 1, 1, 2, 3, 4, 4]


def test_a_row_without_tokens_and_no_rows() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert row_lengths(mask).tolist() == [2, 0]
    assert by_length(lambda i, m: i.float(), mask[1:], mask[1:], 4).shape == (1, 1)
    assert by_length(lambda i, m: i.float(), mask[:0], mask[:0], 4).shape[0] == 0


def test_padded_rows() -> None:
    ids, mask = pad_rows([np.array([5, 6]), np.array([], dtype=np.int32), np.array([7])], 9)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert pad_rows([], 9)[0].shape == (0, 0)


def test_weights_round_trip() -> None:
    state = {"a": torch.randn(3, 2, requires_grad=True), "scalar": torch.tensor(1.5), "steps": torch.tensor([3, 4])}
    back = from_numpy(to_numpy(state))
    assert all(torch.equal(state[name], back[name]) for name in state)
    half = to_numpy(state, "bfloat16")
    assert half["a"].dtype == np.uint16
    assert torch.equal(from_numpy(half)["a"], state["a"].detach().bfloat16().float())
    assert to_numpy({"h": state["a"].detach().bfloat16()})["h"].dtype == np.float32
    with pytest.raises(ValueError, match="float16"):
        to_numpy(state, "float16")


def test_arrays_do_not_share_memory_with_the_model() -> None:
    weight = torch.ones(2)
    arrays = to_numpy({"w": weight})
    weight.zero_()
    assert arrays["w"].tolist() == [1.0, 1.0]
    arrays["w"].flags.writeable = False  # as Ray hands them out
    assert from_numpy(arrays)["w"].add_(1).tolist() == [2.0, 2.0]
