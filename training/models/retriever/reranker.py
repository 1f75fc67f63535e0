"""Score question and passage together by a cross-encoder, as part of p(z|q), with the gradient of the answer.

A bi-encoder must put everything about a passage into one vector before any question is known. A cross-encoder compares
word with word (Nogueira & Cho 2019, arXiv:1901.04085). It cannot search a corpus, so it scores the hits of the
retriever. Its weights train in the retriever's group.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
)

from indexing.declare import refuse
from training.models.parts.pretrained import choose_attention, load_pretrained, num_positions
from training.models.retriever.encoder import bert_config
from training.models.text.packing import length_groups, restore_order
from training.models.text.pairs import PairBatch
from training.training_settings import EncoderConfig, RerankerConfig

HEAD = "ForSequenceClassification"
SPARE_TOKENS = 8  # number of special tokens of a pair, at most


class Reranker(nn.Module):
    """Scores pairs by a sequence classifier of one label."""

    def __init__(self, model: PreTrainedModel, replaces: bool, num_groups: int) -> None:
        """If it `replaces` the retriever's score, p(z|q) comes from its score alone."""
        super().__init__()
        self.model, self.replaces, self.num_groups = model, replaces, num_groups
        self.has_segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1

    def train(self, mode: bool = True) -> "Reranker":
        """Set the mode, but a frozen re-ranker stays in evaluation mode: it scores without dropout."""
        trains = any(parameter.requires_grad for parameter in self.parameters())
        super().train(mode and trains)
        return self

    def forward(self, pairs: PairBatch) -> Float[Tensor, " pairs"]:
        """Return the logits of all pairs, float32 [pairs], computed in groups of like length. Padding changes none."""
        groups = length_groups(pairs.mask, self.num_groups)
        scores: list[Tensor] = []
        for rows, length in groups:
            ids, mask = pairs.ids[rows][:, :length], pairs.mask[rows][:, :length]
            options: dict[str, Any] = {}
            if self.has_segments:
                columns = torch.arange(length, device=ids.device)
                options["token_type_ids"] = ((columns >= pairs.first[rows][:, None]) & mask).to(torch.int64)
            logits = self.model(input_ids=ids, attention_mask=mask.to(torch.int64), **options).logits
            scores.append(logits.squeeze(-1).to(torch.float32))
        return restore_order(scores, groups)


def build_reranker(config: RerankerConfig, encoder: EncoderConfig, vocab_size: int) -> Reranker | None:
    """Return the re-ranker that `config` describes, None if it is off; a fresh one reads the `vocab_size` tokens of the
    retriever. Raises ValueError that names the setting if the checkpoint cannot be read, is no cross-encoder, or is too
    short."""
    if config.mode == "off":
        return None
    attention = choose_attention(config.attention, "reranker.attention")
    model = _checkpoint(config, attention) if config.name else _fresh(config, encoder, vocab_size, attention)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Reranker(model, config.mode == "replace", config.length_groups)


def has_tokenizer(config: RerankerConfig) -> bool:
    """Return true if the re-ranker has another tokeniser than the retriever, as every checkpoint has."""
    return config.mode != "off" and bool(config.name)


def check_cross_encoder(config: RerankerConfig) -> None:
    """Raises ValueError for a checkpoint without a head of one label: a head with random weights would go unnoticed."""
    try:
        found = AutoConfig.from_pretrained(config.name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise refuse("reranker.name", config.name, f"must be a model that can be loaded: {why}") from error
    kinds = list(found.architectures or [])
    if not any(kind.endswith(HEAD) for kind in kinds) or found.num_labels != 1:
        found_kind = f"this one is {', '.join(kinds) or 'of no named kind'} with {found.num_labels} labels"
        allowed = f"must be a cross-encoder, a model ...{HEAD} with one label; {found_kind}"
        raise refuse("reranker.name", config.name, allowed)


def _checkpoint(config: RerankerConfig, attention: str) -> PreTrainedModel:
    check_cross_encoder(config)
    model = load_pretrained(
        AutoModelForSequenceClassification,
        config.name,
        "reranker.name",
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
    )
    limit, longest = num_positions(model), config.max_question_tokens + config.max_passage_tokens + SPARE_TOKENS
    if limit is not None and longest > limit:
        most = limit - config.max_question_tokens - SPARE_TOKENS
        allowed = f"must be at most {most}, with {config.max_question_tokens} of the question in {config.name}"
        raise refuse("reranker.max_passage_tokens", config.max_passage_tokens, allowed)
    return model


def _fresh(config: RerankerConfig, encoder: EncoderConfig, vocab_size: int, attention: str) -> PreTrainedModel:
    """Return a BERT of `reranker.fresh`'s size with random weights; its first scores are near 0."""
    longest = encoder.max_question_tokens + encoder.max_passage_tokens
    shape = bert_config(config.fresh, vocab_size, longest, attn_implementation=attention, num_labels=1)
    return cast(PreTrainedModel, BertForSequenceClassification(shape))
