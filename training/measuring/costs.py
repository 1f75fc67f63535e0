"""Computes the costs of an answer: prompt tokens, floating-point operations, and bytes that are kept while it is
written.

These are estimates from shapes and lengths, not measurements. One multiplication with its addition is two operations. A
token costs 2 operations a weight (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1).
Attention costs 4 * attention_dim a layer and pair of tokens, the square of the prompt, as dense kernels compute it
(Chowdhery et al. 2022, "PaLM", appendix B). A state-space layer costs 6 a number of its state (decay, input and output,
each a multiplication and an addition: Gu and Dao 2023, "Mamba", equation 2). Writing counts with a cache, one token at
a time. Retrieval is counted apart: the question is encoded, every vector of the index multiplied (an upper bound for
IVF), and the hits that are read are encoded anew for their scores; a re-ranker scores its candidates, and once more
those that are read. A lexical search, a few additions a posting, is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.models.arithmetic import Shape, Stack, classifier_stack, encoder_stack, shape_of
from training.models.generators.causal import CausalBatch
from training.models.generators.copy_reader import CopyBatch
from training.models.generators.fusion_in_decoder import FusionBatch
from training.models.generators.generator import GeneratorBatch
from training.models.model_inputs import RetrievalBatch
from training.models.system import System

OPERATIONS_PER_STATE = 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The costs of one question."""

    prompt_tokens: int  # Number of tokens of all prompts that the generator reads
    flops: float  # Operations of the generator
    retrieval_flops: float
    kv_cache_bytes: int  # Bytes of keys and values at the end of the prompt
    state_bytes: int  # Bytes of state-space layers, the same at every length


class CostModel:
    """The costs of one system. `value_bytes` is the size of a number that is kept while writing, `num_indexed` the
    number of passages in the index, `num_reranked` the number of candidates that a re-ranker puts in order."""

    def __init__(self, system: System, value_bytes: int, num_indexed: int, num_reranked: int = 0) -> None:
        self.reranker = None if system.reranker is None else classifier_stack(system.reranker.model)
        self.num_reranked = num_reranked
        self.shape = shape_of(system.generator)
        self.query = encoder_stack(system.retriever.query_encoder)
        self.passage = encoder_stack(system.retriever.passage_encoder)
        self.dim, self.value_bytes, self.num_indexed = system.retriever.dim, value_bytes, num_indexed

    def __call__(
        self, batch: RetrievalBatch, written: Sequence[Sequence[int]], fused: bool, retrieved: bool
    ) -> list[Cost]:
        """Return the costs of each question of `batch`. `written` holds `Decoded.tokens`: one answer a question if
        `fused`, else one a passage. `retrieved` says that its passages came from the index."""
        prompts = prompt_lengths(batch.generator_batch, fused)
        places = batch.generator_batch.passage_mask.shape[1]
        searched = self._search(batch) if retrieved else [0.0] * len(prompts)
        costs = []
        for question, lengths in enumerate(prompts):
            if fused:
                answers = [len(written[question])]
            else:  # those of the real passages, in the order of `lengths`
                real = batch.generator_batch.passage_mask[question].nonzero().flatten().tolist()
                answers = [len(written[question * places + place]) for place in real]
            cache, state = kept_bytes(self.shape, lengths, self.value_bytes)
            flops = answer_flops(self.shape, lengths, answers, fused)
            costs.append(
                Cost(
                    prompt_tokens=sum(lengths),
                    flops=flops,
                    retrieval_flops=searched[question],
                    kv_cache_bytes=cache,
                    state_bytes=state,
                )
            )
        return costs

    def _search(self, batch: RetrievalBatch) -> list[float]:
        """Return the operations of retrieval for each question."""
        questions = batch.question_mask.sum(dim=1).tolist()
        real = batch.generator_batch.passage_mask
        encoded = [0.0] * len(questions)
        if batch.passage_vectors is None:
            lengths = batch.passage_token_mask.sum(dim=1).view(real.shape) * real.to(batch.passage_token_mask.device)
            encoded = [sum(read_flops(self.passage, length) for length in row if length) for row in lengths.tolist()]
        if self.reranker is not None and batch.pairs is not None:
            pairs = batch.pairs.mask.sum(dim=1).view(real.shape).tolist()
            for i, lengths in enumerate(pairs):
                read = [read_flops(self.reranker, length) for length in lengths]
                encoded[i] += sum(read) + self.num_reranked * sum(read) / len(read)
        products = 2.0 * self.dim * self.num_indexed
        return [read_flops(self.query, n) + products + more for n, more in zip(questions, encoded, strict=True)]


def prompt_lengths(batch: GeneratorBatch, fused: bool) -> list[list[int]]:
    """Return the tokens of each sequence that is read for each question, real passages only: one prompt of a fused
    causal model, otherwise one sequence a passage."""
    real = batch.passage_mask
    match batch:
        case CausalBatch() if fused:
            return [[length] for length in batch.joint_mask.sum(dim=1).tolist()]
        case CausalBatch():
            lengths = batch.single_mask.sum(dim=1)
        case FusionBatch() | CopyBatch():
            lengths = batch.source_mask.sum(dim=1)
        case _:
            raise AssertionError(f"no prompt in a {type(batch).__name__}")
    return [_chosen(row, mask) for row, mask in zip(lengths.view(real.shape), real, strict=True)]


def _chosen(lengths: Tensor, real: Tensor) -> list[int]:
    return torch.masked_select(lengths, real).tolist()


def read_flops(stack: Stack, tokens: int) -> float:
    """Return the operations of reading all tokens of a sequence at once."""
    attention = 4.0 * stack.attention_layers * stack.attention_dim * tokens * tokens
    return 2.0 * stack.weights * tokens + attention + _scan_flops(stack, tokens)


def write_flops(stack: Stack, before: int, tokens: int) -> float:
    """Return the operations of `tokens` more, one after another. Each sees the `before` cached ones, those written
    before it, and itself."""
    pairs = tokens * before + tokens * (tokens + 1) / 2
    attention = 4.0 * stack.attention_layers * stack.attention_dim * pairs
    return 2.0 * stack.weights * tokens + attention + _scan_flops(stack, tokens)


def answer_flops(shape: Shape, prompts: Sequence[int], answers: Sequence[int], fused: bool) -> float:
    """Return the operations of reading the `prompts` and writing answers of the given lengths, each with an end token:
    one from all prompts if `fused`, else one from each."""
    memories = [sum(prompts)] if fused else list(prompts)
    output = sum(2.0 * shape.output * (answer + 1) for answer in answers)
    if shape.encoder is None:
        read = sum(read_flops(shape.decoder, prompt) for prompt in memories)
        pairs = zip(memories, answers, strict=True)
        return read + sum(write_flops(shape.decoder, prompt, answer) for prompt, answer in pairs) + output
    read = sum(read_flops(shape.encoder, prompt) + 2.0 * shape.memory_weights * prompt for prompt in prompts)
    written = 0.0
    for memory, answer in zip(memories, answers, strict=True):  # the decoder sees the start token, too
        written += write_flops(shape.decoder, 0, answer + 1) + 2.0 * shape.cross_products * memory * (answer + 1)
    return read + written + output


def kept_bytes(shape: Shape, prompts: Sequence[int], value_bytes: int) -> tuple[int, int]:
    """Return the bytes of keys and values, and of states, at the end of the prompts, before the first token is
    written."""
    if shape.encoder is not None:
        return sum(prompts) * shape.memory_kept * value_bytes, 0
    stack = shape.decoder
    cache = 2 * stack.attention_layers * stack.kv_dim * sum(prompts) * value_bytes
    return cache, len(prompts) * stack.state_layers * stack.state_kept * value_bytes


def _scan_flops(stack: Stack, tokens: int) -> float:
    return float(OPERATIONS_PER_STATE * stack.state_layers * stack.state_scanned * tokens)
