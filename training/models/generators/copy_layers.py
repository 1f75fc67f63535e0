"""Build the copy reader of layers that use plain matrix products, and whose weights are gathered by being called."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexing.declare import refuse

MASKED = -1e9  # finite, so that a row of padding stays finite


class Seen:
    """Records what each layer's queries take from the memory. DeepSpeed would hand modules a copy of a bare list."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []


class Attention(nn.Module):
    """Attends with several heads by matrix products: on a CPU the fused kernel's backward with a mask is slower."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        if hidden % num_heads:
            raise refuse("generator.fresh.hidden", hidden, f"must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)

    def split(self, x: Tensor) -> Tensor:
        """Split [rows, tokens, hidden] into [rows, heads, tokens, head_dim]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of `x`."""
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, seen: Seen | None = None) -> Tensor:
        """Attend with `bias` added to the logits, which broadcasts to [rows, heads, queries, keys]. `seen` records what
        each query takes from each key, [rows, queries, keys] without gradient: probability times norm of the value,
        mean over heads."""
        queries = self.split(self.query(x))
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        weights = (logits + bias.to(logits.dtype)).softmax(dim=-1)
        if seen is not None:
            norms = torch.linalg.vector_norm(values.detach().float(), dim=-1)
            seen.parts.append((weights.detach().float() * norms[:, :, None]).mean(dim=1))
        return self.output((weights @ values).transpose(1, 2).flatten(2))


class TiedEmbedding(nn.Embedding):
    """Embeds tokens and is the output layer too; called for both, so that sharded weights are gathered."""

    def forward(self, input: Tensor, as_output: bool = False) -> Tensor:
        """Embed ids, or map states [..., hidden] to logits [..., vocabulary]."""
        return F.linear(input, self.weight) if as_output else super().forward(input)


class Layer(nn.Module):
    """A pre-norm transformer layer; in a decoder, it attends to the memory between self-attention and feed-forward."""

    def __init__(self, hidden: int, num_heads: int, intermediate: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, num_heads)
        self.cross_norm = nn.LayerNorm(hidden) if cross else None
        self.cross_attention = Attention(hidden, num_heads) if cross else None
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None = None,
        seen: Seen | None = None,
    ) -> Tensor:
        """Transform `x`. `memory` is keys, values and bias of the memory; `seen` records what is taken from it."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, *self.attention.project(normed), bias))
        if memory is not None and self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), *memory, seen))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the memory's states."""
        assert self.cross_attention is not None
        return self.cross_attention.project(states)


def mask_bias(mask: Tensor) -> Tensor:
    """Return 0 inside `mask` and a large negative number outside, float32 of its shape."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, MASKED)


def initialise(module: nn.Module) -> None:
    """Initialise embeddings by Normal(0, 0.02), so that tied ones do not predict their input, and linear layers."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
