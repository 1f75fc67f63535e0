"""RAG-sequence and RAG-token against transformers.models.rag, on random weights.

Labels have 3 tokens or more: below that its RAG-sequence loses the document prior.
"""

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BertConfig, RagConfig, RagSequenceForGeneration, RagTokenForGeneration

from training.objectives.dispatch import compute
from training.objectives.inputs import Likelihoods
from training.training_settings import ObjectiveConfig

PAD, BATCH, K = 1, 3, 4


def tiny_config() -> RagConfig:
    """BERT question encoder, never run, and a BART generator of a few thousand weights."""
    question_encoder = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    generator = BartConfig(
        vocab_size=30,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        init_std=1.0,
    )
    config = RagConfig.from_question_encoder_generator_configs(question_encoder, generator, n_docs=K)
    assert isinstance(config, RagConfig)
    return config


@pytest.mark.parametrize(
    ("name", "model_class"), [("rag_sequence", RagSequenceForGeneration), ("rag_token", RagTokenForGeneration)]
)
def test_same_loss_and_gradient(
    name: str, model_class: type[RagSequenceForGeneration] | type[RagTokenForGeneration]
) -> None:
    torch.manual_seed(0)
    model = model_class(tiny_config()).eval()
    scores = (torch.randn(BATCH, K) * 2).requires_grad_()
    context = torch.randint(3, 30, (BATCH * K, 7))
    labels = torch.randint(3, 30, (BATCH, 6))
    for row, length in enumerate((3, 4, 6)):
        labels[row, length:] = PAD
    theirs = model(
        context_input_ids=context,
        context_attention_mask=torch.ones_like(context),
        doc_scores=scores,
        labels=labels,
        n_docs=K,
    )
    outputs = ours(scores, theirs.logits, labels)
    loss, _ = compute(ObjectiveConfig(name=name), outputs)
    torch.testing.assert_close(loss, theirs.loss.mean(), rtol=1e-5, atol=1e-5)
    parameter = dict(model.named_parameters())["rag.generator.model.decoder.layers.0.fc1.weight"]
    expected = torch.autograd.grad(theirs.loss.mean(), (scores, parameter), retain_graph=True)
    for gradient, reference in zip(torch.autograd.grad(loss, (scores, parameter)), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def ours(scores: Tensor, logits: Tensor, labels: Tensor) -> Likelihoods:
    """logits [batch * k, length, vocabulary]; the labels are the decoder's input too, so that logits at i predict
    label i + 1."""
    target = labels[:, 1:]
    answer_mask = target != PAD
    log_probs = torch.log_softmax(logits, dim=-1).view(BATCH, K, labels.shape[1], -1)[:, :, :-1]
    index = target.view(BATCH, 1, -1, 1).expand(-1, K, -1, -1)
    per_passage = log_probs.gather(-1, index).squeeze(-1).masked_fill(~answer_mask.unsqueeze(1), 0.0)
    return Likelihoods(
        scores=scores,
        passage_mask=torch.ones(BATCH, K, dtype=torch.bool),
        answer_mask=answer_mask,
        per_passage=per_passage,
    )
