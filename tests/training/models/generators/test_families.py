"""Every family of generator, read from a folder: likelihoods and answers equal one row at a time without padding, and a
joint step reaches every weight of generator and retriever."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tests.helpers.families import CAUSAL, COPY, FUSION, STATE_SPACE, generator_config, write_families, write_tokenizer
from training.models.build import build_generator, build_system
from training.models.generators.causal import CausalBatch
from training.models.generators.fusion_in_decoder import FusionBatch
from training.models.model_inputs import RetrievalBatch
from training.models.text.packing import pad_rows
from training.models.text.tokenizers import load_tokenizer
from training.objectives.dispatch import compute, needs
from training.training_settings import (
    DecodingConfig,
    EncoderConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    ObjectiveConfig,
)

ENCODER = EncoderConfig(fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32))
ROWS = np.random.default_rng(0)
QUESTIONS = [ROWS.integers(10, 100, n) for n in (2, 5, 3)]
PASSAGES = [[ROWS.integers(10, 100, n) for n in lengths] for lengths in ((3, 14, 7), (9, 1), (5, 6, 12))]
ANSWERS = [ROWS.integers(10, 100, n) for n in (1, 4, 2)]
END = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_families(folder, load_tokenizer(write_tokenizer(folder)), FUSION + CAUSAL + COPY)
    return folder


def make(family: str, folder: Path, **changes: Any) -> Any:
    return build_generator(generator_config(family, folder, **changes), load_tokenizer(folder / "tokenizer")).eval()


def next_logits(generator: Any, batch: Any, question: int, passages: list[int], tokens: list[int]) -> Tensor:
    """Logits [len(tokens) + 1, vocabulary] before, between and after `tokens`: one row, no padding, only the model."""
    k = batch.passage_mask.shape[1]
    if isinstance(batch, FusionBatch):
        states = []
        for row in (question * k + number for number in passages):
            ids = batch.source_ids[row][batch.source_mask[row]][None]
            states.append(generator.model.get_encoder()(input_ids=ids).last_hidden_state)
        encoded = BaseModelOutput(last_hidden_state=torch.cat(states, dim=1))  # pyright: ignore[reportArgumentType]
        start = torch.tensor([[generator.decoder_start_id, *tokens]])
        return generator.model(encoder_outputs=encoded, decoder_input_ids=start).logits[0].detach()
    assert isinstance(batch, CausalBatch)
    if len(passages) == 1:
        row = question * k + passages[0]
        prompt = batch.single_ids[row][batch.single_mask[row]]
    else:
        prompt = batch.joint_ids[question][batch.joint_mask[question]]
    ids = torch.cat([prompt, torch.tensor(tokens, dtype=torch.int64)])[None]
    return generator.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].detach()


@pytest.mark.parametrize("chunk", [0, 512])
@pytest.mark.parametrize("family", FUSION + CAUSAL)
def test_log_probs_equal_one_row_without_padding(family: str, chunk: int, folder: Path) -> None:
    generator = make(family, folder, loss_chunk_tokens=chunk)
    assert (generator.head is None) == (chunk == 0)  # of every family here the head can be told from the body
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    reading = generator.read(batch)
    per_passage = generator.per_passage_log_probs(reading, batch).detach()
    fused = generator.fused_log_probs(reading, batch).detach()
    for question, rows in enumerate(PASSAGES):
        answer = [*ANSWERS[question].tolist(), END]
        cases = [(fused[question], list(range(len(rows))))]
        cases += [(per_passage[question, number], [number]) for number in range(len(rows))]
        for found, passages in cases:
            logits = next_logits(generator, batch, question, passages, answer[:-1]).log_softmax(-1)
            expected = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(found[: len(answer)], expected, rtol=1e-4, atol=1e-4)
            assert (found[len(answer) :] == 0).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FUSION + CAUSAL)
def test_greedy_writing_equals_row_by_row(family: str, fused: bool, folder: Path) -> None:
    """Prompts of 20 to 70 tokens in one batch: what stands before a shorter one must not enter a recurrent state."""
    generator = make(family, folder)
    batch = generator.collate(QUESTIONS, PASSAGES, None)
    greedy = generator.write(generator.read(batch), batch, fused=fused, max_tokens=5, num_beams=1)
    beams = generator.write(generator.read(batch), batch, fused=fused, max_tokens=5, num_beams=3)
    for row in range(len(greedy.tokens)):
        question, number = (row, -1) if fused else divmod(row, 3)
        if number >= len(PASSAGES[question]):
            continue
        place = (generator, batch, question, list(range(len(PASSAGES[question]))) if fused else [number])
        written: list[int] = []
        while len(written) < 5 and (best := int(next_logits(*place, written)[-1].argmax())) != END:
            written.append(best)
        assert greedy.tokens[row] == written
        for decoded in (greedy, beams):
            tokens = decoded.tokens[row]
            log_probs = next_logits(*place, tokens).log_softmax(-1)
            total = float(log_probs[:-1].gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None]).sum())
            ends = total + float(log_probs[-1, END])  # an answer that was cut is scored as it stands
            assert float(decoded.log_probs[row]) in (pytest.approx(total, abs=1e-3), pytest.approx(ends, abs=1e-3))


@pytest.mark.parametrize("family", STATE_SPACE)
def test_what_is_masked_never_enters_a_state(family: str, folder: Path) -> None:
    """transformers zeroes masked places before and after the convolution; writing pads on the left and relies on it."""
    model = make(family, folder).model
    ids = torch.randint(10, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(ids, (7, 0), value=50)
    mask = torch.cat([torch.zeros(1, 7), torch.ones(1, 9)], dim=1).long()
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 7:]
        torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        unmasked = model(input_ids=padded, use_cache=False).logits[:, 7:]
    assert not torch.allclose(found, unmasked, atol=1e-2)


@pytest.mark.parametrize("objective", ["rag_sequence", "pdist"])
@pytest.mark.parametrize("family", FUSION + CAUSAL + COPY)
def test_a_joint_step_trains_all_of_it_and_it_answers(family: str, objective: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    system = build_system(
        ENCODER, generator_config(family, folder), train="both", tokenizers=(tokenizer, tokenizer), seed=1
    ).train()
    batch = retrieval_batch(system)
    wanted = ObjectiveConfig(name=objective)
    optimizer = torch.optim.Adam(system.parameters(), lr=5e-3)
    losses = []
    for _ in range(6):
        loss, _ = compute(wanted, system.likelihoods(batch, needs(wanted), 1.0))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            untouched = [name for name, p in system.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert not untouched
            assert sum(float(p.grad.abs().sum()) for p in system.retriever.parameters() if p.grad is not None) > 0
        optimizer.step()
    assert losses[-1] < losses[0]
    system.eval()
    for mode in ("marginal", "fused"):
        answers = system.answer(batch, DecodingConfig(mode, 1, 5), 1.0, False)
        assert answers.log_likelihood.isfinite().all()
        assert len(answers.decoded.tokens) == (3 if mode == "fused" else 9)


def retrieval_batch(system: Any) -> RetrievalBatch:
    filled = [[*rows, *[np.array([0])] * (3 - len(rows))] for rows in PASSAGES]
    reader = system.generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    return RetrievalBatch(*pad_rows(QUESTIONS, 0), *pad_rows([row for rows in filled for row in rows], 0), reader)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mamba", "mamba2", "jamba"])
def test_fresh_families(family: str, folder: Path) -> None:
    size = FreshGeneratorConfig(num_decoder_layers=2, hidden=16, num_heads=2, intermediate=32)
    size.family = family
    config = GeneratorConfig(kind="causal", fresh=size)
    tokenizer = load_tokenizer(folder / "tokenizer")
    generator: Any = build_generator(config, tokenizer).eval()
    assert generator.model.config.model_type == family
    weights = generator.model.get_input_embeddings().weight
    assert weights is generator.model.get_output_embeddings().weight
    batch = generator.collate(QUESTIONS, PASSAGES, ANSWERS)
    loss = -generator.fused_log_probs(None, batch).sum()
    loss.backward()
    per_token = float(loss.detach()) / int(batch.answer_mask.sum())
    assert per_token == pytest.approx(np.log(len(tokenizer)), rel=0.2)  # random weights know nothing
    size.family = "bert"
    with pytest.raises(ValueError, match=r"generator\.fresh\.family=bert: must be one of llama, gpt2"):
        build_generator(config, tokenizer)
