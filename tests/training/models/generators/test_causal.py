"""Causal generators against a plain per-token loop: the right tokens, the right places, and nothing of the prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from training.models.generators.causal import CausalBatch, CausalGenerator
from training.models.text import token_rows
from training.models.text.tokenizers import train_wordpiece
from training.training_settings import FreshGeneratorConfig, GeneratorConfig, TokenizerConfig

SMALL = FreshGeneratorConfig(num_decoder_layers=2, hidden=16, num_heads=2, intermediate=32)
CONFIG = GeneratorConfig(
    kind="causal",
    fresh=SMALL,
    template="Read : {passages}Q : {question} A : ",
    passage_template="{title} = {text} ;",
    max_passage_tokens=8,
    max_question_tokens=4,
    length_groups=3,
)
QUESTIONS = ["who x", "what", "where y z"]
PASSAGES = [
    [("t", "a b"), ("u", "c"), ("v", "d e f g")],
    [("w", "h"), ("", "i j")],  # one passage fewer, one without title
    [None, ("t", "k"), ("u", "l m")],  # closed book first
]
ANSWERS = ["a b", "i", "k l m"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(TokenizerConfig(vocabulary=120), ["who what where read"] * 3)


def make(tokenizer: PreTrainedTokenizerFast, sharpen: float = 2.0, **changes: Any) -> CausalGenerator:
    torch.manual_seed(0)
    generator = CausalGenerator(replace(CONFIG, **changes), tokenizer).eval()
    with torch.no_grad():
        for parameter in generator.parameters():  # far from uniform, so that equal numbers mean something
            parameter.mul_(sharpen)
    return generator


def rows_of(tokenizer: PreTrainedTokenizerFast) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """What the store holds of the texts above."""
    question = token_rows.generator_question_side(tokenizer, CONFIG)
    passage = token_rows.generator_passage_side(tokenizer, CONFIG, 24)
    answer = token_rows.generator_answer_side(tokenizer, CONFIG)

    def array(row: list[int]) -> np.ndarray:
        return np.array(row, dtype=np.int64)

    return (
        [array(row) for row in question.tokenize([("", text) for text in QUESTIONS])],
        [[array([] if p is None else passage.tokenize([p])[0]) for p in rows] for rows in PASSAGES],
        [array(row) for row in answer.tokenize([("", text) for text in ANSWERS])],
    )


def collate(generator: CausalGenerator, tokenizer: PreTrainedTokenizerFast) -> CausalBatch:
    return generator.collate(*rows_of(tokenizer))


def prompt(tokenizer: PreTrainedTokenizerFast, question: int, passages: list[int]) -> list[int]:
    """The prompt as a text, tokenised whole."""
    chosen = [PASSAGES[question][number] for number in passages]
    read = " ".join(f"{p[0]} = {p[1]} ;" if p[0] else f"{p[1]} ;" for p in chosen if p is not None)
    text = f"Read : {read} Q : {QUESTIONS[question]} A :"
    return [2, *tokenizer(text, add_special_tokens=False).input_ids]


def naive(generator: CausalGenerator, tokens: list[int], answer: list[int]) -> Tensor:
    """One forward per token, no batch and no padding."""
    steps = []
    for t, token in enumerate(answer):
        logits = generator.model(input_ids=torch.tensor([[*tokens, *answer[:t]]]), use_cache=False).logits
        steps.append(logits[0, -1].log_softmax(-1)[token])
    return torch.stack(steps).detach()


def answer_ids(tokenizer: PreTrainedTokenizerFast, question: int) -> list[int]:
    return [*tokenizer(ANSWERS[question], add_special_tokens=False).input_ids, 3]


def test_prompts_are_the_rendered_template(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate(make(tokenizer), tokenizer)
    for question, rows in enumerate(PASSAGES):
        joint = batch.joint_ids[question][batch.joint_mask[question]].tolist()
        assert joint == prompt(tokenizer, question, list(range(len(rows))))
        for number in range(len(rows)):
            row = 3 * question + number
            assert batch.single_ids[row][batch.single_mask[row]].tolist() == prompt(tokenizer, question, [number])
    assert batch.passage_mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert batch.answer_mask.sum(1).tolist() == [3, 2, 4]
    assert not batch.joint_mask[:, 0].logical_not().any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_log_probs_equal_a_plain_loop(tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    generator = make(tokenizer, attention=attention)
    batch = collate(generator, tokenizer)
    per_passage = generator.per_passage_log_probs(generator.read(batch), batch)
    fused = generator.fused_log_probs(generator.read(batch), batch)
    assert (per_passage.shape, per_passage.dtype, fused.shape, fused.dtype) == (
        (3, 3, 4),
        torch.float32,
        (3, 4),
        torch.float32,
    )
    for question, rows in enumerate(PASSAGES):
        answer = answer_ids(tokenizer, question)
        cases = [(fused[question], list(range(len(rows))))]
        cases += [(per_passage[question, number], [number]) for number in range(len(rows))]
        for found, passages in cases:
            expected = naive(generator, prompt(tokenizer, question, passages), answer)
            torch.testing.assert_close(found[: len(answer)], expected, rtol=1e-4, atol=1e-4)
            assert (found[len(answer) :] == 0).all()


def test_the_prompt_is_never_scored_and_order_matters(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer)
    questions, passages, answers = rows_of(tokenizer)
    batch = generator.collate(questions, passages, answers)
    labels = torch.where(batch.joint_mask, batch.joint_ids, -100)
    whole = generator.model(input_ids=batch.joint_ids, attention_mask=batch.joint_mask.long(), labels=labels).loss
    fused = generator.fused_log_probs(None, batch)
    assert float(-fused.sum().detach()) != pytest.approx(float(whole.detach() * batch.joint_mask.sum()), rel=1e-2)
    turned = generator.collate(questions, [rows[::-1] for rows in passages], answers)
    assert not torch.allclose(generator.fused_log_probs(None, turned), fused, rtol=1e-4)
    singles = generator.per_passage_log_probs(None, turned)
    torch.testing.assert_close(
        singles[0].flip(0), generator.per_passage_log_probs(None, batch)[0], rtol=1e-4, atol=1e-4
    )


def test_groups_padding_and_neighbours_change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    questions, passages, answers = rows_of(tokenizer)
    gradients = []
    for groups in (1, 3):
        generator = make(tokenizer, length_groups=groups, gradient_checkpointing=groups > 1).train()
        batch = generator.collate(questions * 2, passages * 2, answers * 2)
        per_passage = generator.per_passage_log_probs(None, batch)
        fused = generator.fused_log_probs(None, batch)
        (per_passage.sum() + fused.sum()).backward()
        gradients.append((per_passage.detach(), fused.detach(), [p.grad for p in generator.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
    generator = make(tokenizer)
    alone = generator.collate(questions[1:2], passages[1:2], answers[1:2])
    together = generator.collate(questions, passages, answers)
    torch.testing.assert_close(
        generator.fused_log_probs(None, alone)[0],
        generator.fused_log_probs(None, together)[1, :2],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("fused", [True, False])
def test_greedy_writing_takes_the_best_next_token(tokenizer: PreTrainedTokenizerFast, fused: bool) -> None:
    generator = make(tokenizer)
    batch = collate(generator, tokenizer)
    decoded = generator.write(None, batch, fused=fused, max_tokens=4, num_beams=1)
    assert len(decoded.tokens) == (3 if fused else 9)
    for row, tokens in enumerate(decoded.tokens):
        question, number = (row, None) if fused else (row // 3, row % 3)
        if number is not None and number >= len(PASSAGES[question]):
            continue
        start = prompt(tokenizer, question, list(range(len(PASSAGES[question]))) if number is None else [number])
        written: list[int] = []
        total = 0.0
        for step in range(5):
            logits = generator.model(input_ids=torch.tensor([[*start, *written]])).logits[0, -1].detach()
            best = int(logits.argmax())
            if step < 4 or best == 3:
                total += float(logits.log_softmax(-1)[best])
            if step == 4 or best == 3:
                break
            written.append(best)
        assert tokens == written
        assert float(decoded.log_probs[row]) == pytest.approx(total, rel=1e-3)
    beams = generator.write(None, batch, fused=fused, max_tokens=4, num_beams=5)
    assert (beams.log_probs >= decoded.log_probs - 1e-3).all()


def test_learns_to_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer, sharpen=1.0).train()
    batch = collate(generator, tokenizer)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (-generator.fused_log_probs(None, batch).sum()).backward()
        optimizer.step()
    generator.eval()
    decoded = generator.write(None, batch, fused=True, max_tokens=6, num_beams=2)
    assert decoded.tokens == [answer_ids(tokenizer, question)[:-1] for question in range(3)]
    fused = generator.fused_log_probs(None, batch).sum(1).detach()
    torch.testing.assert_close(decoded.log_probs, fused, rtol=1e-3, atol=1e-3)


def test_bfloat16(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = make(tokenizer, sharpen=1.0)
    batch = collate(generator, tokenizer)
    full = generator.fused_log_probs(None, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = generator.fused_log_probs(None, batch)
    half = generator.bfloat16()
    for log_probs in (autocast, half.fused_log_probs(None, batch)):
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs, full, rtol=0.05, atol=0.1)
    assert len(half.write(None, batch, fused=False, max_tokens=3, num_beams=2).tokens) == 9


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_any_causal_model_from_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **sizes)).save_pretrained(tmp_path)
    else:
        MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **sizes)).save_pretrained(
            tmp_path
        )
    attention = "eager"  # a state-space model has no other
    generator = make(tokenizer, name=str(tmp_path), attention=attention)
    batch = collate(generator, tokenizer)
    per_passage = generator.per_passage_log_probs(generator.read(batch), batch).detach()
    answer = answer_ids(tokenizer, 0)
    for number in range(3):
        expected = naive(generator, prompt(tokenizer, 0, [number]), answer)
        torch.testing.assert_close(per_passage[0, number, : len(answer)], expected, rtol=1e-4, atol=1e-4)
    decoded = generator.write(None, batch, fused=True, max_tokens=3, num_beams=1)
    scored = [np.array(tokens, dtype=np.int64) for tokens in decoded.tokens]
    questions, passages, _ = rows_of(tokenizer)
    log_probs = generator.fused_log_probs(None, generator.collate(questions, passages, scored)).detach()
    for row, tokens in enumerate(decoded.tokens):
        parts = [float(log_probs[row, : len(tokens)].sum()), float(log_probs[row].sum())]
        assert min(abs(float(decoded.log_probs[row]) - part) for part in parts) < 1e-3


def test_errors_name_the_setting(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    generator = make(tokenizer)
    batch = collate(generator, tokenizer)
    with pytest.raises(
        ValueError, match=r"generator\.kind=causal: must be copy or fusion with objective\.score_bias=true"
    ):
        generator.fused_log_probs(None, batch, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="score_bias=true"):
        generator.write(None, batch, fused=True, max_tokens=3, num_beams=1, passage_bias=torch.zeros(3, 3))
    generator.context = batch.joint_ids.shape[1] + 3  # answers take 4
    generator.per_passage_log_probs(None, batch)  # one passage fits
    with pytest.raises(
        ValueError, match=r"context is \d+: lower generator\.max_passage_tokens \(now 8\) or retrieval\.k"
    ):
        generator.fused_log_probs(None, batch)
    with pytest.raises(ValueError, match=r"generator\.template='x \{question\}': must have"):
        make(tokenizer, template="x {question}")
    with pytest.raises(ValueError, match=r"generator\.passage_template="):
        make(tokenizer, passage_template="{body}")
    with pytest.raises(ValueError, match=r"generator\.name='no/such-model' cannot be loaded"):
        make(tokenizer, name="no/such-model")
    with pytest.raises(ValueError, match=r"generator\.fresh\.hidden=10: must be a multiple of 2"):
        make(tokenizer, fresh=replace(SMALL, hidden=10))
