"""Compute log-probabilities of given tokens from a language model's last hidden states, a part of the tokens at a time.

Logits over a vocabulary of 32,000 to 256,000 are the largest tensor of a step. Here they exist for `chunk_tokens`
tokens at once: each part is computed without keeping it and again in the backward pass, so that neither pass holds a
tensor of tokens x vocabulary. The model's own head is used, with whatever it scales, caps or adds, and called as a
module, so that ZeRO 3 gathers its weight.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from training.models.generators import token_scores
from training.models.parts.recompute import recomputed

WHOLE_ELEMENTS = 2**25  # tokens x vocabulary up to here (128 MiB in float32) are computed once, without repetition


class Head:
    """Cuts `model` in two: its body (decoder or backbone), and the head that makes logits of the last hidden states."""

    def __init__(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        self.model, self.chunk_tokens = model, chunk_tokens
        encoder_decoder = model.config.is_encoder_decoder
        self.body: Any = model.get_decoder() if encoder_decoder else model.base_model
        output: Any = model.get_output_embeddings()
        self.weights: list[nn.Parameter] = list(output.parameters())
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def is_all_else(self) -> bool:
        """Return true if encoder, body and output embeddings together have all weights of the model."""
        parts = [self.body, *([self.model.get_encoder()] if self.model.config.is_encoder_decoder else [])]
        known = {id(weight) for part in parts for weight in part.parameters()} | {id(weight) for weight in self.weights}
        return all(id(weight) in known for weight in self.model.parameters())

    def states(self, **inputs: Any) -> Tensor:
        """Return the body's last hidden states of `inputs`, [rows, tokens, dim]."""
        return self.body(**inputs, use_cache=False).last_hidden_state

    def log_probs(self, states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probabilities float32 [rows, tokens] of `targets` given `states` [rows, tokens, dim]; 0
        outside `mask`. The call is collective under ZeRO 3; ranks may have different numbers of tokens."""
        num_chunks = self._num_chunks(targets)
        if num_chunks == 1:
            return token_scores.token_log_probs(self.logits(states), targets, mask)
        flat = (states.flatten(0, 1), targets.flatten(), mask.flatten())
        chunks = zip(*(tensor.tensor_split(num_chunks) for tensor in flat), strict=True)
        return torch.cat([recomputed(self._chunk, chunk, self.weights) for chunk in chunks]).view(targets.shape)

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits [rows, tokens, vocabulary] of `states`."""
        model: Any = self.model
        with self._body_returns(states):
            if self.model.config.is_encoder_decoder:
                start = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
                encoded = BaseModelOutput(last_hidden_state=cast(Any, states))
                return model(encoder_outputs=encoded, decoder_input_ids=start, use_cache=False).logits
            return model(inputs_embeds=states, use_cache=False).logits

    def _chunk(self, states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return token_scores.token_log_probs(self.logits(states[None]), targets[None], mask[None])[0]

    def _num_chunks(self, targets: Tensor) -> int:
        """Return 1 if everything is small, and under ZeRO 3, where a chunk is a collective, the most of any rank."""
        tokens = targets.numel()
        small = tokens * self.vocabulary <= WHOLE_ELEMENTS
        needed = 1 if small else math.ceil(tokens / self.chunk_tokens)
        if hasattr(self.weights[0], "ds_id") and dist.is_initialized():
            most = torch.tensor(needed, device=targets.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            needed = int(most)
        return needed

    @contextmanager
    def _body_returns(self, states: Tensor) -> Iterator[None]:
        """Make the body return `states` inside the block, whatever it is called with."""
        bound = vars(self.body).get("forward")
        output = _Loose(last_hidden_state=cast(Any, states))
        self.body.forward = lambda *_, **__: output
        try:
            yield
        finally:
            del self.body.forward
            if bound is not None:
                self.body.forward = bound


class _Loose(BaseModelOutputWithPastAndCrossAttentions):
    """An output of a body in which every missing field is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def find_head(model: PreTrainedModel, chunk_tokens: int) -> Head | None:
    """Return the head of `model`, if it gives the logits of the whole model on three tokens; None if `chunk_tokens` is
    0 or the head cannot be separated (then all logits are made at once)."""
    if chunk_tokens == 0:
        return None
    ids = torch.arange(3, device=model.device)[None]
    was_training, call = model.training, cast(Any, model)
    model.eval()
    try:
        head = Head(model, chunk_tokens)
        if not head.is_all_else():
            return None
        if model.config.is_encoder_decoder:
            encoded = model.get_encoder()(input_ids=ids)
            whole = call(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
            states = head.states(input_ids=ids, encoder_hidden_states=encoded.last_hidden_state)
        else:
            whole = call(input_ids=ids, use_cache=False).logits
            states = head.states(input_ids=ids)
        found = head.logits(states)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # the model has another structure
        return None
    finally:
        model.train(was_training)
    same = found.shape == whole.shape and torch.allclose(found, whole, rtol=1e-3, atol=1e-3)
    return head if same else None
