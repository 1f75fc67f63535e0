"""Loss over the vocabulary in chunks: the same numbers and gradients, and no tensor of tokens x vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from tests.helpers.families import CAUSAL, FUSION, family_config, generator_config, write_families, write_tokenizer
from training.models.build import build_generator
from training.models.generators import head
from training.models.generators.head import find_head
from training.models.text.tokenizers import load_tokenizer

ROWS = np.random.default_rng(0)
QUESTIONS = [ROWS.integers(10, 100, n) for n in (2, 5)]
PASSAGES = [[ROWS.integers(10, 100, n) for n in lengths] for lengths in ((3, 12, 7), (9, 1))]
ANSWERS = [ROWS.integers(10, 100, n) for n in (1, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_families(folder, load_tokenizer(write_tokenizer(folder)), FUSION + CAUSAL)
    return folder


def make(family: str, folder: Path, chunk: int) -> Any:
    config = generator_config(family, folder, loss_chunk_tokens=chunk)
    return build_generator(config, load_tokenizer(folder / "tokenizer")).train()


def measured(generator: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Both kinds of log-probabilities and the gradient of a mixture of them."""
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    reading = generator.read(batch)
    fused = generator.fused_log_probs(reading, batch)
    per_passage = generator.per_passage_log_probs(reading, batch)
    loss = (fused * torch.arange(1.0, 8.0)).sum() - per_passage.square().sum()
    loss.backward()
    return fused.detach(), per_passage.detach(), [weight.grad for weight in generator.parameters()]


@pytest.mark.parametrize("family", FUSION + CAUSAL)
def test_chunks_change_neither_values_nor_gradients(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(make(family, folder, 0))
    monkeypatch.setattr(head, "WHOLE_ELEMENTS", 0)
    for chunk in (1, 5):
        found = measured(make(family, folder, chunk))
        torch.testing.assert_close(found[:2], whole[:2], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(found[2], whole[2], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max() + 1))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gemma2", "mamba"])
def test_no_tensor_of_tokens_by_vocabulary(
    family: str, fused: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, with a vocabulary of 5,000 and 8 rows of 8 answer tokens."""
    vocabulary, rows, tokens, chunk = 5000, 8, 8, 8
    monkeypatch.setattr(head, "WHOLE_ELEMENTS", 100_000)
    tokenizer = load_tokenizer(folder / "tokenizer")
    large = folder / "large"
    write_families(large, _Length(vocabulary), (family,))  # type: ignore[arg-type]
    found = {}
    for setting in (0, chunk):
        # Rows of one length in one group: all their tokens reach the head at once.
        config = generator_config(family, large, length_groups=1, loss_chunk_tokens=setting)
        generator: Any = build_generator(config, tokenizer).train()
        k = 1 if fused else 2
        questions = [np.full(2, 20)] * (rows // k)
        answers = [np.full(tokens - 1, 30)] * (rows // k)
        batch = generator.collate(questions, [[np.full(3, 40)] * k] * (rows // k), answers)
        with Largest() as largest:
            score = generator.fused_log_probs if fused else generator.per_passage_log_probs
            score(generator.read(batch), batch).sum().backward()
        found[setting] = largest.elements
    assert found[0] >= rows * tokens * vocabulary
    assert found[chunk] <= 2 * chunk * vocabulary  # which the weight of 16 x vocabulary has, too


class _Length:
    """As many tokens as a vocabulary has."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_small_batches_are_computed_at_once(folder: Path) -> None:
    generator = make("llama", folder, 1)
    targets = torch.zeros(2, 3, dtype=torch.int64)
    assert generator.head._num_chunks(targets) == 1
    assert generator.head._num_chunks(targets.expand(2, 3).repeat(200_000, 1)) == 1_200_000


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "mamba"])
def test_a_rank_without_tokens_left_takes_part(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO 3 a chunk is a collective: the rank with fewer tokens has empty ones."""
    cut: Any = make(family, folder, 1).head
    states = torch.randn(1, 2, 16, requires_grad=True)
    targets, mask = torch.tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    expected = cut.log_probs(states, targets, mask)
    monkeypatch.setattr(cut, "_num_chunks", lambda targets: 5)
    found = cut.log_probs(states, targets, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), [states])[0] for x in (found, expected)))


class InputInLogits(LlamaForCausalLM):
    """Adds what the body never sees: no head can be cut off."""

    def forward(self, input_ids: Any = None, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits + input_ids[..., None]
        return output


class MoreWeights(LlamaForCausalLM):
    """Has a weight behind the body that is not the output embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("kind", [InputInLogits, MoreWeights])
def test_a_head_that_cannot_be_told_from_the_rest(kind: Any) -> None:
    config: Any = family_config("llama", 50)
    assert find_head(LlamaForCausalLM(config), 4) is not None
    assert find_head(LlamaForCausalLM(config), 0) is None
    assert find_head(kind(config), 4) is None
