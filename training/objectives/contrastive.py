"""Contrastive warm start of the retriever: InfoNCE over the passages of the batch, of all ranks where wanted.

InfoNCE is van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", equation 4. The tasks
that cut queries from passages (inverse cloze of Lee et al. 2019, independent cropping of Izacard et al. 2021) differ
in their data only.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

from training.objectives.inputs import (
    Likelihoods,
    Stats,
    entropy,
    in_full_precision,
    mean_over_questions,
    retrieval_log_probs,
)

Gather = Callable[[Tensor], tuple[Tensor, int]]


def info_nce(outputs: Likelihoods, temperature: float = 1.0) -> tuple[Float[Tensor, ""], Stats]:
    """Compute the loss -log softmax(scores / temperature)[positive], mean over questions. Candidates that
    `passage_mask` leaves out are neither positive nor negative; a question whose positive is left out costs nothing."""
    assert outputs.positives is not None
    mask, positives = outputs.passage_mask, outputs.positives.unsqueeze(-1)
    prior = retrieval_log_probs(outputs.scores, mask, temperature)
    chosen = prior.masked_fill(~mask, 0.0).gather(1, positives).squeeze(-1)
    loss = -mean_over_questions(chosen, outputs.num_questions)
    first = (prior.detach().argmax(dim=-1, keepdim=True) == positives).float().mean()
    return loss, {
        "loss/retriever": loss.detach(),
        "retrieval/entropy": entropy(prior, mask),
        "retrieval/in_batch_accuracy": first,
    }


def in_batch(
    queries: Float[Tensor, "batch dim"],
    passages: Float[Tensor, "rows dim"],
    *,
    passage_numbers: Int[Tensor, " rows"],
    temperature: float | Tensor,
    gather: Gather | None = None,
    num_questions: float | int | None = None,
) -> Likelihoods:
    """Return the input of `info_nce`: every query against every passage.

    `queries` [batch, dim]; `passages` [rows, dim], row i the positive of query i, further rows hard negatives;
    `passage_numbers` int64 [rows], equal for two rows of one passage, which then are no negatives of each other.
    `temperature` is the encoder's, fixed or learned. `gather` (`gather_rows`) adds the passages of the other ranks.
    """
    offset = 0
    if gather is not None:
        passages, offset = gather(passages)
        passage_numbers, _ = gather(passage_numbers)
    positives = torch.arange(queries.shape[0], device=queries.device) + offset
    with torch.autocast(queries.device.type, enabled=False):  # 16-bit scores move the loss
        scores = in_full_precision(queries) @ in_full_precision(passages).T / temperature
    fair = passage_numbers.unsqueeze(0) != passage_numbers[positives].unsqueeze(1)
    fair.scatter_(1, positives.unsqueeze(-1), True)
    return Likelihoods(scores=scores, passage_mask=fair, positives=positives, num_questions=num_questions)


def gather_rows(rows: Shaped[Tensor, " rows *shape"]) -> tuple[Shaped[Tensor, " gathered *shape"], int]:
    """Return the rows of all ranks in rank order, [world size * rows, ...], and the place of this rank's first. Every
    rank calls it with the same shape. Gradient flows back to the rank that each row came from, summed over the ranks,
    so that losses averaged over ranks (as data parallelism does) have the gradient of the whole batch."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows, 0
    gathered = _GatherRows.apply(rows)
    assert isinstance(gathered, Tensor)
    return gathered, distributed.get_rank() * rows.shape[0]


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums each rank's gradients of the gathered rows and keeps its own part."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        """Return rows [n, ...] of all ranks as [world size * n, ...]."""
        parts = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """Return the gradient [world size * n, ...] as this rank's [n, ...]."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]
