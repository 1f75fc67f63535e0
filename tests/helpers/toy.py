"""A tiny system with the hard parts of the real one: a tower called twice, tied embeddings, a dataclass as output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from training.engine.engine import Engine, StepResult
from training.training_settings import EngineConfig

Result = TypeVar("Result")

WORDS, DIM, K = 40, 12, 3
RATES = {"retriever": 0.02, "generator": 0.05}
# A large epsilon makes Adam's update follow the size of a gradient, not only its sign.
PLAIN = EngineConfig(clip_norm=0.0, epsilon=0.05, weight_decay=0.01, timeout_s=60.0)
Arrays = dict[str, np.ndarray]


class Tower(nn.Module):
    """Token ids [n, tokens] to vectors [n, DIM]."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, DIM)
        self.layer = nn.Linear(DIM, DIM)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids).mean(1))) * self.scale


class Retriever(nn.Module):
    """Shared towers are one object under two names; separate ones start equal."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.query_encoder = Tower()
        self.passage_encoder = self.query_encoder if shared else Tower()
        self.passage_encoder.load_state_dict(self.query_encoder.state_dict())


class TiedEmbedding(nn.Embedding):
    """Called for input and for output."""

    def forward(self, input: Tensor, as_output: bool = False) -> Tensor:
        return nn.functional.linear(input, self.weight) if as_output else super().forward(input)


class Reader(nn.Module):
    """Log-probability of every word, given a passage [n, tokens]."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = TiedEmbedding(WORDS, DIM)
        self.layer = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.layer(self.embedding(ids).mean(1))))
        return self.embedding(hidden, as_output=True).float().log_softmax(-1)


@dataclass
class Scored:
    """What the engine's forward returns; DeepSpeed does not look into it."""

    scores: Tensor  # [batch, K]
    log_probs: Tensor  # [batch, K]: of the answer, given each passage


class ToySystem(nn.Module):
    """A retriever and a generator whose forward takes a method, as the real system's does."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.retriever = Retriever(shared)
        self.generator = Reader(dropout)

    def forward(self, method: Callable[..., Result], *args: Tensor) -> Result:
        return method(self, *args)

    def encode(self, queries: Tensor) -> Tensor:
        return self.retriever.query_encoder(queries)

    def score(self, queries: Tensor, passages: Tensor, answers: Tensor) -> Scored:
        vectors = self.retriever.passage_encoder(passages.flatten(0, 1)).unflatten(0, passages.shape[:2])
        scores = torch.einsum("bd,bkd->bk", self.retriever.query_encoder(queries), vectors)
        words = self.generator(passages.flatten(0, 1)).unflatten(0, passages.shape[:2])
        log_probs = words.gather(2, answers[:, None, None].expand(-1, K, 1))[..., 0]
        return Scored(scores.float(), log_probs)


Batch = tuple[Tensor, Tensor, Tensor]


def batches(count: int, size: int, seed: int = 1) -> list[Batch]:
    """Questions [size, 4], passages [size, K, 6], answers [size]."""
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(0, WORDS, shape, generator=generator)

    return [(words(size, 4), words(size, K, 6), words(size)) for _ in range(count)]


def part(batch: Batch, index: int, num_parts: int) -> Batch:
    """One of `num_parts` equal parts of a batch."""
    queries, passages, answers = (t.chunk(num_parts)[index] for t in batch)
    return queries, passages, answers


def loss_of(scored: Scored) -> Tensor:
    """RAG-sequence: mean over the batch of -log sum_k p(k|q) p(answer|q, k)."""
    return -torch.logsumexp(scored.scores.log_softmax(-1) + scored.log_probs, -1).mean()


def groups_of(system: ToySystem, train: Sequence[str] = ("retriever", "generator")) -> dict[str, list[nn.Parameter]]:
    """Parameter groups; what does not train is frozen and its group empty."""
    groups = {}
    for name in ("retriever", "generator"):
        module = system.get_submodule(name).requires_grad_(name in train)
        groups[name] = list(module.parameters()) if name in train else []
    return groups


def toy_engine(config: EngineConfig, system: ToySystem | None = None) -> Engine:
    """An engine in which everything trains."""
    system = system or ToySystem()
    return Engine(system, config, groups_of(system))


def train_steps(engine: Engine, data: Sequence[Batch], accumulation: int = 1) -> list[StepResult]:
    """One optimiser step per batch, this rank's part of it cut into `accumulation` micro-batches."""
    results: list[StepResult] = []
    for batch in data:
        mine = part(batch, engine.rank, engine.world_size)
        for index in range(accumulation):
            micro = [t.to(engine.device) for t in part(mine, index, accumulation)]
            engine.backward(loss_of(engine(ToySystem.score, *micro)))
            results.append(engine.step(RATES))
    return [result for result in results if result.at_boundary]


@dataclass
class Reference:
    """Plain autograd on whole batches."""

    weights: dict[str, Tensor]
    grad_norms: list[dict[str, float]]


def reference(data: Sequence[Batch], config: EngineConfig, system: ToySystem | None = None) -> Reference:
    """The same training without an engine: torch's AdamW, each group clipped on its own."""
    system = system or ToySystem()
    groups = groups_of(system)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": RATES[name]} for name, parameters in groups.items()],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    grad_norms = []
    for batch in data:
        optimizer.zero_grad()
        scored = system.score(*batch)
        loss_of(scored).backward()
        limit = config.clip_norm or float("inf")
        norms = {name: torch.nn.utils.clip_grad_norm_(parameters, limit) for name, parameters in groups.items()}
        grad_norms.append({name: float(norm) for name, norm in norms.items()})
        optimizer.step()
    return Reference({name: tensor.clone() for name, tensor in system.state_dict().items()}, grad_norms)


def arrays(state: dict[str, Tensor]) -> Arrays:
    """Tensors as numpy arrays, which travel between processes."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def close(found: Arrays, expected: dict[str, Tensor] | Arrays, atol: float = 2e-6) -> None:
    """Assert that every array found is near the expected one of its name."""
    assert found
    for name, value in found.items():
        np.testing.assert_allclose(value, np.asarray(expected[name]), rtol=1e-5, atol=atol, err_msg=name)
