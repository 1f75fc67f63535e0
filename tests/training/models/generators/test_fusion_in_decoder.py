"""Fusion-in-decoder against naive loops: one passage at a time, and plain concatenation of encoder states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from training.models.generators.fusion_in_decoder import FusionBatch, FusionGenerator
from training.models.text.tokenizers import train_wordpiece
from training.training_settings import FreshGeneratorConfig, GeneratorConfig, TokenizerConfig

SMALL = FreshGeneratorConfig(num_encoder_layers=1, num_decoder_layers=2, hidden=16, num_heads=2, intermediate=32)
CONFIG = GeneratorConfig(kind="fusion", fresh=SMALL, length_groups=3, max_passage_tokens=12, max_question_tokens=6)
QUESTIONS = [np.array([40, 41, 42]), np.array([50, 51]), np.array([60])]
PASSAGES = [
    [np.array([70, 71, 72, 73]), np.array([80]), np.array([81, 82, 83, 84, 85, 86, 87])],
    [np.array([90, 91]), np.array([92, 93, 94])],  # one passage fewer
    [np.array([], dtype=np.int64), np.array([95, 96]), np.array([97])],  # closed book first
]
ANSWERS = [np.array([70, 72]), np.array([93, 94, 90, 91]), np.array([95])]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["some text of some words"])


def make(tokenizer: PreTrainedTokenizerFast, sharpen: float = 2.0, **changes: Any) -> FusionGenerator:
    torch.manual_seed(0)
    generator = FusionGenerator(replace(CONFIG, **changes), tokenizer).eval()
    with torch.no_grad():
        for parameter in generator.parameters():  # far from uniform, so that equal numbers mean something
            parameter.mul_(sharpen)
    return generator


def collate(generator: FusionGenerator) -> FusionBatch:
    return generator.collate(QUESTIONS, PASSAGES, ANSWERS)


def naive(generator: FusionGenerator, question: int, passages: list[int], bias: Tensor | None = None) -> Tensor:
    """Log-probabilities of an answer given the concatenated states of single passages, one forward at a time."""
    model: Any = generator.model
    states, added = [], []
    for number in passages:
        row = [2, *QUESTIONS[question].tolist(), 3, *PASSAGES[question][number].tolist(), 3]
        states.append(model.get_encoder()(input_ids=torch.tensor([row])).last_hidden_state[0])
        added += [0.0 if bias is None else float(bias[question, number])] * len(row)
    answer = [*ANSWERS[question].tolist(), 3]
    mask = torch.tensor(added)[None, None, None] if bias is not None else None
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=torch.cat(states)[None]),
        attention_mask=mask,
        decoder_input_ids=torch.tensor([[2, *answer[:-1]]]),
    ).logits[0]
    return torch.stack([logits[t].log_softmax(-1)[token] for t, token in enumerate(answer)])


def test_sources(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate(make(tokenizer))
    assert batch.source_ids[0].tolist()[:9] == [2, 40, 41, 42, 3, 70, 71, 72, 73]
    assert batch.source_ids[5].tolist() == [2, 50, 51, 3, 3] + [0] * 8
    assert batch.source_mask[6].sum() == 4
    assert batch.passage_mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert batch.answer_ids.tolist() == [[70, 72, 3, 0, 0], [93, 94, 90, 91, 3], [95, 3, 0, 0, 0]]
    assert batch.answer_mask.sum(1).tolist() == [3, 5, 2]
    empty = make(tokenizer).collate(QUESTIONS, PASSAGES, None)
    assert empty.answer_ids.shape == empty.answer_mask.shape == (3, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_per_passage_equals_one_passage_at_a_time(tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    generator = make(tokenizer, attention=attention)
    batch = collate(generator)
    log_probs = generator.per_passage_log_probs(generator.read(batch), batch)
    assert (log_probs.shape, log_probs.dtype) == ((3, 3, 5), torch.float32)
    for question, rows in enumerate(PASSAGES):
        for number in range(len(rows)):
            expected = naive(generator, question, [number])
            torch.testing.assert_close(log_probs[question, number, : len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert (log_probs[question, number, len(expected) :] == 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_equals_concatenated_states(tokenizer: PreTrainedTokenizerFast, attention: str, biased: bool) -> None:
    generator = make(tokenizer, attention=attention)
    batch = collate(generator)
    bias = torch.tensor([[-0.5, -2.0, -3.0], [-0.1, -3.0, float("-inf")], [-1.0, -1.5, 0.0]]) if biased else None
    log_probs = generator.fused_log_probs(generator.read(batch), batch, bias)
    for question, rows in enumerate(PASSAGES):
        expected = naive(generator, question, list(range(len(rows))), bias)
        torch.testing.assert_close(log_probs[question, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        assert (log_probs[question, len(expected) :] == 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bias_zero_is_no_bias_and_its_gradient_is_right(
    tokenizer: PreTrainedTokenizerFast, attention: str, checkpointing: bool
) -> None:
    generator = make(tokenizer, attention=attention, gradient_checkpointing=checkpointing).train()
    batch = collate(generator)
    reading = generator.read(batch)
    bias = torch.zeros(3, 3, requires_grad=True)
    log_probs = generator.fused_log_probs(reading, batch, bias)
    torch.testing.assert_close(log_probs, generator.fused_log_probs(reading, batch), rtol=1e-4, atol=1e-4)
    log_probs.sum().backward()
    assert bias.grad is not None
    assert bias.grad[1, 2] == 0
    assert bias.grad[batch.passage_mask].abs().min() > 0
    step = 1e-2
    with torch.no_grad():
        for question, number in [(0, 0), (0, 2), (1, 1), (2, 0)]:
            totals = []
            for sign in (step, -step):
                moved = torch.zeros(3, 3)
                moved[question, number] = sign
                totals.append(generator.fused_log_probs(reading, batch, moved).double().sum())
            slope = float((totals[0] - totals[1]) / (2 * step))
            assert float(bias.grad[question, number]) == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_an_added_padded_passage_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer)
    batch = generator.collate(QUESTIONS[1:2], PASSAGES[1:2], ANSWERS[1:2])
    wide = generator.collate(QUESTIONS[1:], PASSAGES[1:], ANSWERS[1:])  # question 1 gets a padded passage
    for biased in (False, True):
        bias = torch.tensor([[-0.1, -3.0]]) if biased else None
        padded = torch.tensor([[-0.1, -3.0, float("-inf")], [0.0, 0.0, 0.0]]) if biased else None
        one = generator.fused_log_probs(generator.read(batch), batch, bias)
        two = generator.fused_log_probs(generator.read(wide), wide, padded)
        torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-4)
    per_passage = generator.per_passage_log_probs(generator.read(wide), wide)
    torch.testing.assert_close(
        generator.per_passage_log_probs(generator.read(batch), batch)[0], per_passage[0, :2], rtol=1e-4, atol=1e-4
    )


def test_groups_do_not_change_gradients_and_everything_is_finite(tokenizer: PreTrainedTokenizerFast) -> None:
    gradients = []
    for groups in (1, 3):
        generator = make(tokenizer, length_groups=groups)
        batch = generator.collate(QUESTIONS * 2, PASSAGES * 2, ANSWERS * 2)
        reading = generator.read(batch)
        assert len(reading.groups) == groups
        bias = torch.full((6, 3), -1e4).masked_fill(~batch.passage_mask, float("-inf")).requires_grad_()
        loss = (
            generator.per_passage_log_probs(reading, batch).sum()
            + generator.fused_log_probs(reading, batch, bias).sum()
        )
        loss.backward()
        gradients.append({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
        assert bias.grad is not None
        assert torch.isfinite(bias.grad).all()
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_single_passages_from_the_projections_of_the_fused_pass(
    tokenizer: PreTrainedTokenizerFast, attention: str, biased: bool
) -> None:
    generator = make(tokenizer, attention=attention).train()
    batch = collate(generator)
    bias = torch.tensor([[-0.5, -2.0, -3.0], [-0.1, -3.0, float("-inf")], [-1.0, -1.5, 0.0]]) if biased else None
    reading = generator.read(batch)
    fused = generator.fused_log_probs(reading, batch, bias)
    assert reading.projected is not None
    with torch.no_grad():
        again = generator.read(batch)
        # Without a gradient attention takes another kernel, which rounds in another order.
        torch.testing.assert_close(fused.detach(), generator.fused_log_probs(again, batch, bias), rtol=1e-4, atol=1e-4)
        assert again.projected is None  # evaluation keeps nothing
        quick = generator.per_passage_log_probs(reading, batch)
        plain = generator.per_passage_log_probs(again, batch)
    torch.testing.assert_close(quick[batch.passage_mask], plain[batch.passage_mask], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(quick).all()
    assert generator.per_passage_log_probs(reading, batch).requires_grad  # with gradient they are projected anew


def test_bfloat16(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer, sharpen=1.0)
    batch = collate(generator)
    bias = torch.full((3, 3), -1.0)
    full = generator.fused_log_probs(generator.read(batch), batch, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = generator.fused_log_probs(generator.read(batch), batch, bias)
    half = generator.bfloat16()
    reading = half.read(batch)
    for log_probs in (autocast, half.fused_log_probs(reading, batch, bias)):
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs, full, rtol=0.05, atol=0.1)
    assert half.per_passage_log_probs(reading, batch).dtype == torch.float32
    assert len(half.write(reading, batch, fused=True, max_tokens=3, num_beams=2, passage_bias=bias).tokens) == 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_greedy_writing_takes_the_best_next_token(
    tokenizer: PreTrainedTokenizerFast, fused: bool, biased: bool
) -> None:
    generator = make(tokenizer)
    batch = collate(generator)
    bias = torch.tensor([[-0.5, -2.0, -3.0], [-0.1, -3.0, float("-inf")], [-1.0, -1.5, 0.0]]) if biased else None
    decoded = generator.write(
        generator.read(batch), batch, fused=fused, max_tokens=4, num_beams=1, passage_bias=bias if fused else None
    )
    assert len(decoded.tokens) == (3 if fused else 9)
    for row, tokens in enumerate(decoded.tokens):
        question, number = (row, None) if fused else (row // 3, row % 3)
        if number is not None and number >= len(PASSAGES[question]):
            continue
        passages = PASSAGES[question] if number is None else [PASSAGES[question][number]]
        row_bias = bias[question : question + 1, : len(passages)] if biased and fused and bias is not None else None
        prefix: list[int] = []
        total = 0.0
        for step in range(
            5
        ):  # every next token scored by the model's own teacher forcing; the fifth may only be the end
            candidates = [np.array([*prefix, token]) for token in range(len(tokenizer))]
            trial = generator.collate([QUESTIONS[question]] * len(candidates), [passages] * len(candidates), candidates)
            many = None if row_bias is None else row_bias.expand(len(candidates), -1)
            with torch.no_grad():
                scores = generator.fused_log_probs(generator.read(trial), trial, many)[:, step]
            best = int(scores.argmax())
            if step < 4 or best == generator.end_id:
                total += float(scores[best])
            if step == 4 or best == generator.end_id:
                break
            prefix.append(best)
        assert tokens == prefix
        assert float(decoded.log_probs[row]) == pytest.approx(total, rel=1e-3)


def test_beams_are_never_worse_than_greedy(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer)
    batch = generator.collate(QUESTIONS, PASSAGES, None)
    reading = generator.read(batch)
    greedy = generator.write(reading, batch, fused=True, max_tokens=3, num_beams=1)
    beams = generator.write(reading, batch, fused=True, max_tokens=3, num_beams=8)
    assert (beams.log_probs >= greedy.log_probs - 1e-4).all()
    assert all(len(tokens) <= 3 for tokens in beams.tokens)
    scored = generator.collate(QUESTIONS, PASSAGES, [np.array(tokens, dtype=np.int64) for tokens in beams.tokens])
    log_probs = generator.fused_log_probs(generator.read(scored), scored).detach()
    ended = beams.log_probs - log_probs.sum(dim=1)
    assert ((ended.abs() < 1e-3) | (ended > 0)).all()  # an unfinished answer has no end to pay for


def test_learns_to_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    generator = FusionGenerator(CONFIG, tokenizer).train()
    batch = collate(generator)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -generator.fused_log_probs(generator.read(batch), batch).sum()
        loss.backward()
        optimizer.step()
    generator.eval()
    decoded = generator.write(generator.read(batch), batch, fused=True, max_tokens=6, num_beams=2)
    assert decoded.tokens == [answer.tolist() for answer in ANSWERS]
    torch.testing.assert_close(
        decoded.log_probs, generator.fused_log_probs(generator.read(batch), batch).sum(1).detach(), rtol=1e-3, atol=1e-3
    )


def test_any_encoder_decoder_from_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 16, "max_position_embeddings": 40, "vocab_size": len(tokenizer)}
    layers: dict[str, Any] = {
        f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    widths: dict[str, Any] = {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    tokens: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": 3,
    }
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig(**sizes, **layers, **widths, **tokens)).save_pretrained(tmp_path / "bart")
    named = replace(CONFIG, name=str(tmp_path / "bart"))
    generator = FusionGenerator(named, tokenizer).eval()
    batch = collate(generator)
    assert batch.source_ids[0].tolist()[:6] == [2, 40, 41, 42, 70, 71]  # "title:" separates, no special token
    reading = generator.read(batch)
    bias = torch.zeros(3, 3, requires_grad=True)
    fused = generator.fused_log_probs(reading, batch, bias)
    torch.testing.assert_close(fused, generator.fused_log_probs(reading, batch), rtol=1e-4, atol=1e-5)
    fused.sum().backward()
    assert bias.grad is not None
    assert bias.grad[batch.passage_mask].abs().min() > 0
    assert reading.projected is not None
    with torch.no_grad():
        quick = generator.per_passage_log_probs(reading, batch)
        plain = generator.per_passage_log_probs(generator.read(batch), batch)
    torch.testing.assert_close(quick[batch.passage_mask], plain[batch.passage_mask], rtol=1e-4, atol=1e-5)
    decoded = generator.write(reading, batch, fused=True, max_tokens=3, num_beams=1, passage_bias=bias.detach())
    scored = generator.collate(QUESTIONS, PASSAGES, [np.array(row, dtype=np.int64) for row in decoded.tokens])
    log_probs = generator.fused_log_probs(generator.read(scored), scored, bias).detach()
    for row in range(3):
        length = len(decoded.tokens[row])
        assert float(decoded.log_probs[row]) == pytest.approx(float(log_probs[row, : max(length, 3)].sum()), rel=1e-3)
    with pytest.raises(ValueError, match=r"generator\.max_passage_tokens=60: must be lower.* takes 40"):
        FusionGenerator(replace(named, max_passage_tokens=60), tokenizer)
    larger = train_wordpiece(TokenizerConfig(vocabulary=400), ["ab cd ef gh ab cd ef gh"] * 3)
    if len(larger) > len(tokenizer):
        with pytest.raises(ValueError, match=r"generator\.name: the tokeniser has"):
            FusionGenerator(named, larger)


def test_wrong_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"generator\.name='no/such-reader' cannot be loaded"):
        FusionGenerator(replace(CONFIG, name="no/such-reader"), tokenizer)
    with pytest.raises(ValueError, match=r"generator\.fresh\.hidden=10: must be a multiple"):
        FusionGenerator(replace(CONFIG, fresh=replace(SMALL, hidden=10, num_heads=4)), tokenizer)
    with pytest.raises(ValueError, match=r"generator\.attention=fast: must be one of"):
        FusionGenerator(replace(CONFIG, attention="fast"), tokenizer)
    generator = make(tokenizer)
    generator.attention = "flash_attention_2"
    batch = collate(generator)
    with pytest.raises(ValueError, match=r"generator\.attention=flash_attention_2: must be eager or sdpa"):
        generator.fused_log_probs(generator.read(batch), batch, torch.zeros(3, 3))
