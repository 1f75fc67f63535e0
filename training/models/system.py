"""The trained module holds retriever and generator, so that one engine and one backward pass serve both.

An engine calls a method of the system as `engine(System.likelihoods, batch, ...)`. The call passes through
`System.forward`, so that the hooks of the engine gather sharded weights whichever part runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from training.models.answer_candidates import score_answers
from training.models.generators.generator import Decoded, Generator, GeneratorBatch
from training.models.model_inputs import CandidateBatch, ContrastBatch, RetrievalBatch
from training.models.parts.modes import evaluating
from training.models.retriever.encoder import Retriever
from training.models.retriever.reranker import Reranker
from training.objectives.contrastive import gather_rows, in_batch
from training.objectives.inputs import Likelihoods, Needs, mixture_log_probs, retrieval_log_probs
from training.objectives.preference import Candidates
from training.training_settings import DecodingConfig

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Scored = TypeVar("Scored", Tensor, tuple[Tensor, Tensor])


@dataclass
class Answers:
    """Answers that the system writes for a batch of questions."""

    log_prior: Float[Tensor, "batch k"]  # log p(z|q), -inf at padded passages
    log_likelihood: Float[Tensor, " batch"]  # log p(gold answer|q), marginal over the passages or fused
    decoded: Decoded  # batch answers if fused, else batch * k


class System(nn.Module):
    """Retriever and generator as one module."""

    def __init__(self, retriever: Retriever, generator: Generator, reranker: Reranker | None = None) -> None:
        super().__init__()
        self.retriever = retriever
        self.generator = generator
        self.reranker = reranker

    def forward(
        self,
        method: Callable[Concatenate["System", Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Return `method(self, *args, **kwargs)`: the one entrance through which an engine calls a method."""
        return method(self, *args, **kwargs)

    def outputs(self, batch: RetrievalBatch | ContrastBatch, needs: Needs, temperature: float) -> Likelihoods:
        """Return what the objective of this batch is computed from; only `likelihoods` reads the last two arguments."""
        match batch:
            case ContrastBatch():
                return self.contrast(batch)
            case CandidateBatch():
                return self.candidates(batch)
        return self.likelihoods(batch, needs, temperature)

    def encode_questions(
        self, ids: Int[Tensor, "batch tokens"], mask: Shaped[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the vectors [batch, dim] of questions, given as int64 ids and mask (bool or integer) [batch, t]."""
        return self.retriever.encode_queries(ids, mask)

    def encode_passages(
        self, ids: Int[Tensor, "batch tokens"], mask: Shaped[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the vectors [batch, dim] of passages, given as int64 ids and mask (bool or integer) [batch, t]."""
        return self.retriever.encode_passages(ids, mask)

    def lexical_weight(self) -> Float[Tensor, "1"]:
        """Return what a lexical score of 1 adds to an inner product, float32 [1]. The retriever must have a weight."""
        assert self.retriever.lexical is not None
        return self.retriever.lexical(torch.ones(1, device=self.retriever.lexical.raw.device))

    @torch.no_grad()
    def sample(self, batch: GeneratorBatch, max_tokens: int, temperature: float) -> Decoded:
        """Return one sampled answer for each passage of `batch`."""
        reading = self.generator.read(batch)
        return self.generator.write(
            reading, batch, fused=False, max_tokens=max_tokens, num_beams=1, temperature=temperature
        )

    def scores(self, batch: RetrievalBatch) -> Float[Tensor, "batch k"]:
        """Return the passages' scores, float32 [batch, k]: inner products of fresh vectors plus weighted lexical
        scores, over the temperature. The re-ranker's score is added to them or replaces them. If the passage encoder
        does not change, the vectors of the index are fresh."""
        if self.reranker is None:
            return self._retriever_scores(batch)
        assert batch.pairs is not None, "a batch without pairs for a system with a re-ranker"
        reranked = self.reranker(batch.pairs).unflatten(0, (len(batch.question_ids), -1))
        return reranked if self.reranker.replaces else self._retriever_scores(batch) + reranked

    def _retriever_scores(self, batch: RetrievalBatch) -> Float[Tensor, "batch k"]:
        queries = self.retriever.encode_queries(batch.question_ids, batch.question_mask)
        if batch.passage_vectors is not None:
            passages = batch.passage_vectors
        else:
            encoded = self.retriever.encode_passages(batch.passage_ids, batch.passage_token_mask)
            passages = encoded.unflatten(0, (queries.shape[0], -1))
        return self.retriever.fused(self.retriever.scores(queries, passages), batch.lexical)

    def candidates(self, batch: CandidateBatch) -> Candidates:
        """Return the scores of fresh encoders and the log-probabilities of all answers of each question."""
        return score_answers(self.generator, self.scores(batch), batch)

    @torch.no_grad()
    def prior(self, batch: RetrievalBatch, temperature: float) -> Float[Tensor, "batch k"]:
        """Return log p(z|q), float32 [batch, k]; -inf at padded passages."""
        return retrieval_log_probs(self.scores(batch), batch.generator_batch.passage_mask, temperature)

    def likelihoods(self, batch: RetrievalBatch, needs: Needs, temperature: float) -> Likelihoods:
        """Return scores and the log-probabilities that the objective needs; every passage is encoded once."""
        scores = self.scores(batch)
        inputs = batch.generator_batch
        reading = self.generator.read(inputs)
        per_passage = fused = attention = left_out = null = null_score = None
        if needs.attention:
            fused, attention = self._fused_with_attention(reading, inputs)
        elif needs.fused:
            bias = retrieval_log_probs(scores, inputs.passage_mask, temperature) if needs.score_bias else None
            fused = self.generator.fused_log_probs(reading, inputs, bias)
        if needs.per_passage and needs.per_passage_gradient:
            per_passage = self.generator.per_passage_log_probs(reading, inputs)
        elif needs.per_passage:  # after the fused pass, whose projections of the passages it may use again
            per_passage = self._detached(self.generator.per_passage_log_probs, reading, inputs)
        if needs.left_out:
            left_out = self._detached(self.generator.left_out_log_probs, reading, inputs)
        if needs.null:
            null = self.generator.null_log_probs(reading, inputs)
            null_score = self.retriever.null_scores(scores)
        return Likelihoods(
            scores=scores,
            per_passage=per_passage,
            fused=fused,
            answer_mask=inputs.answer_mask,
            passage_mask=inputs.passage_mask,
            left_out=left_out,
            attention=attention,
            null=null,
            null_score=null_score,
            noise=gumbel_noise(scores, needs.num_draws) if needs.num_draws else None,
            contrast=None if batch.contrast is None else self.contrast(batch.contrast),
            contrast_share=batch.contrast_share,
        )

    @torch.no_grad()
    def _detached(self, score: Callable[[Any, Any], Scored], reading: object, batch: GeneratorBatch) -> Scored:
        """Compute a distillation target without dropout; passages are encoded again only if dropout touched them."""
        if not (self.generator.training and has_dropout(self.generator)):
            return score(reading, batch)
        with evaluating(self.generator):
            return score(self.generator.read(batch), batch)

    def _fused_with_attention(self, reading: object, batch: GeneratorBatch) -> tuple[Tensor, Tensor]:
        """Compute both in one pass, or the attention in a second pass without dropout if there is dropout."""
        if not (self.generator.training and has_dropout(self.generator)):
            return self.generator.fused_with_attention(reading, batch)
        _, attention = self._detached(self.generator.fused_with_attention, reading, batch)
        return self.generator.fused_log_probs(reading, batch), attention

    def contrast(self, batch: ContrastBatch) -> Likelihoods:
        """Score the spans against the passages of all trainers' batches."""
        queries = self.retriever.encode_queries(batch.query_ids, batch.query_mask)
        passages = self.retriever.encode_passages(batch.passage_ids, batch.passage_token_mask)
        return in_batch(
            queries,
            passages,
            passage_numbers=batch.passage_numbers,
            temperature=self.retriever.temperature,
            gather=gather_rows,
        )

    @torch.no_grad()
    def answer(self, batch: RetrievalBatch, decoding: DecodingConfig, temperature: float, score_bias: bool) -> Answers:
        """Write answers. With `score_bias`, log p(z|q) biases the attention of a fused generator, as in training."""
        prior = retrieval_log_probs(self.scores(batch), batch.generator_batch.passage_mask, temperature)
        reading = self.generator.read(batch.generator_batch)
        fused = decoding.mode == "fused"
        bias = prior if fused and score_bias else None
        if batch.generator_batch.answer_ids.shape[1] == 0:
            log_likelihood = torch.zeros(prior.shape[0])
        elif fused:
            log_likelihood = self.generator.fused_log_probs(reading, batch.generator_batch, bias).sum(dim=1)
        else:
            per_passage = self.generator.per_passage_log_probs(reading, batch.generator_batch).sum(dim=2)
            log_likelihood = mixture_log_probs(prior, per_passage, batch.generator_batch.passage_mask)
        decoded = self.generator.write(
            reading,
            batch.generator_batch,
            fused=fused,
            max_tokens=decoding.max_tokens,
            num_beams=decoding.num_beams,
            passage_bias=bias,
        )
        return Answers(prior, log_likelihood, decoded)

    @torch.no_grad()
    def score(
        self,
        batch: RetrievalBatch,
        answers: Sequence[tuple[Tensor, Tensor]],
        *,
        mode: str,
        temperature: float,
        score_bias: bool,
    ) -> Float[Tensor, "batch answers"]:
        """Return the log-probabilities float32 [batch, len(answers)] of several answers to every question. Each answer
        is ids and mask [batch, tokens] with end-of-sequence; the passages are read once. `mode` is marginal, fused or
        top1."""
        prior = retrieval_log_probs(self.scores(batch), batch.generator_batch.passage_mask, temperature)
        bias = prior if mode == "fused" and score_bias else None
        if mode == "top1":
            best = torch.zeros_like(prior, dtype=torch.bool).scatter(1, prior.argmax(dim=1, keepdim=True), True)
            prior = torch.zeros_like(prior).masked_fill(~best, float("-inf"))
        reading = self.generator.read(batch.generator_batch)
        columns: list[Tensor] = []
        for ids, mask in answers:
            inputs = replace(batch.generator_batch, answer_ids=ids, answer_mask=mask)
            if mode == "fused":
                columns.append(self.generator.fused_log_probs(reading, inputs, bias).sum(dim=1))
            else:
                totals = self.generator.per_passage_log_probs(reading, inputs).sum(dim=2)
                columns.append(mixture_log_probs(prior, totals, inputs.passage_mask))
        return torch.stack(columns, dim=1)


def gumbel_noise(scores: Float[Tensor, "batch k"], num_draws: int) -> Float[Tensor, "batch {num_draws} k"]:
    """Draw standard Gumbel noise, float32 [batch, num_draws, k], for scores [batch, k]."""
    uniform = torch.rand(scores.shape[0], num_draws, scores.shape[1], device=scores.device)
    return -(-uniform.clamp_min(1e-20).log()).log()


def has_dropout(module: nn.Module) -> bool:
    """Return true if some part drops values in training: an `nn.Dropout`, or a module of transformers with a positive
    attribute such as `attention_dropout` or `layerdrop`."""
    for part in module.modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            return True
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                return True
    return False
