"""The small reader against a word-by-word reference that follows its docstring, and against itself rearranged."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from training.models.generators import copy_reader
from training.models.generators.copy_encoder import PretrainedSource
from training.models.generators.copy_layers import Layer
from training.models.generators.copy_reader import CopyBatch, CopyReader
from training.models.generators.decode import beam_search
from training.objectives.inputs import retrieval_log_probs
from training.training_settings import FreshGeneratorConfig, GeneratorConfig

PAD, START, END, WORDS = 0, 2, 3, 24


def make_bert(seed: int, hidden: int) -> PretrainedSource:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(
        vocab_size=WORDS, hidden_size=hidden, max_position_embeddings=24, hidden_dropout_prob=0.0, **size
    )
    return PretrainedSource(BertModel(config, add_pooling_layer=False))


def make_reader(
    seed: int = 0, groups: int = 1, hidden: int = 16, spread: float = 0.6, pretrained: bool = False
) -> CopyReader:
    """Random weights, far enough from zero that every part matters; `pretrained`: passages are read by a BERT."""
    source = make_bert(seed, hidden) if pretrained else None
    torch.manual_seed(seed)
    size = FreshGeneratorConfig(num_encoder_layers=1, num_decoder_layers=2, hidden=hidden, num_heads=2, intermediate=24)
    config = GeneratorConfig(
        fresh=size, max_question_tokens=6, max_passage_tokens=10, max_answer_tokens=5, length_groups=groups
    )
    reader = CopyReader(config, WORDS, start_id=START, end_id=END, pad_id=PAD, source=source).eval()
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * spread / math.sqrt(hidden) * 2)
    return reader


Rows = list[np.ndarray]


def words(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Few different words, so that passages repeat them and copies have several places to come from."""
    return rng.integers(4, 12, size=rng.integers(low, high + 1)).astype(np.int32)


def make_rows(seed: int = 0, counts: tuple[int, ...] = (3, 1, 2)) -> tuple[Rows, list[Rows], Rows]:
    """Questions, passages (`counts[i]` of question i) and answers; the first answers stand in the first passages."""
    rng = np.random.default_rng(seed)
    questions = [words(rng, 2, 6) for _ in counts]
    passages = [[words(rng, 3, 10) for _ in range(count)] for count in counts]
    answers = [rows[0][1:3] for rows in passages]
    answers[-1] = words(rng, 5, 5)
    return questions, passages, answers


def widened(batch: CopyBatch, columns: int) -> CopyBatch:
    """The same batch with more padding on the right."""

    def pad(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(len(tensor), columns)], dim=1)

    return replace(
        batch, source_ids=pad(batch.source_ids), source_mask=pad(batch.source_mask), copy_mask=pad(batch.copy_mask)
    )


def both(reader: CopyReader, batch: CopyBatch, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-passage and fused log-probabilities."""
    reading = reader.read(batch)
    return reader.per_passage_log_probs(reading, batch), reader.fused_log_probs(reading, batch, bias)


# ---------------------------------------------------------------- the reference


def encoded_alone(reader: CopyReader, source: Tensor, segment: Tensor) -> Tensor:
    """States [source, hidden] of one question with one passage, without padding."""
    encoder = reader.encoder
    if isinstance(encoder, PretrainedSource):
        return encoder.backbone(input_ids=source, token_type_ids=segment).last_hidden_state[0]
    x = reader.tokens(source) + encoder.segments(segment) + encoder.positions(torch.arange(source.shape[1]))
    for layer in encoder.layers:
        x = layer(x, torch.zeros(1))
    return encoder.norm(x)[0]


def reference_distributions(
    reader: CopyReader, question: np.ndarray, passages: Rows, prefixes: np.ndarray, bias: Tensor | None = None
) -> Tensor:
    """Next-token distributions [len(prefixes) + 1, WORDS] after START and after each of `prefixes`: one passage encoded
    at a time, memory side by side, the decoder run anew for every token, the pointer added up word by word."""
    states, ids, copyable, of_passage = [], [], [], []
    for number, passage in enumerate(passages):
        source = [START, *question, END, *passage, END]
        segment = [0] * (len(question) + 2) + [1] * (len(passage) + 1)
        states.append(encoded_alone(reader, torch.tensor([source]), torch.tensor([segment])))
        ids += source
        copyable += [bool(value) for value in segment]
        of_passage += [number] * len(source)
    memory = torch.cat(states)[None]
    added = torch.zeros(len(ids)) if bias is None else bias[torch.tensor(of_passage)]
    written = [START, *(int(token) for token in prefixes)]
    rows, last = [], torch.zeros(len(ids))
    for length in range(1, len(written) + 1):
        x = reader.tokens(torch.tensor([written[:length]])) + reader.target_positions(torch.arange(length))
        causal = torch.full((length, length), float("-inf")).triu(1)
        for layer in reader.decoder:
            assert isinstance(layer, Layer)
            x = layer(x, causal, (*layer.project(memory), added))
        x = reader.decoder_norm(x)[0, -1]
        places = torch.tensor(copyable)
        logits = (reader.copy_key(memory[0]) @ reader.copy_query(x)) / math.sqrt(x.shape[-1]) + added
        anew = logits.masked_fill(~places, float("-inf")).softmax(0)
        gate, follow = torch.sigmoid(reader.gates(x))
        origin = last * (torch.tensor(ids) == written[length - 1])
        moved = torch.zeros(len(ids))
        if length > 1 and origin.sum() > 0:
            moved[1:] = (origin / origin.sum())[:-1]
            moved = follow * moved * places
        last = (1 - moved.sum()) * anew + moved
        distribution = gate * reader.tokens(x, as_output=True).softmax(0)
        for place, word in enumerate(ids):
            distribution[word] = distribution[word] + (1 - gate) * last[place]
        rows.append(distribution)
    return torch.stack(rows)


def reference_scores(
    reader: CopyReader, question: np.ndarray, passages: Rows, answer: np.ndarray, bias: Tensor | None = None
) -> Tensor:
    """log P of each answer token and the end."""
    distributions = reference_distributions(reader, question, passages, answer, bias)
    return torch.stack([row[int(token)] for row, token in zip(distributions, [*answer, END], strict=True)]).log()


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_each_passage_is_scored_as_if_alone(groups, pretrained):
    reader = make_reader(groups=groups, pretrained=pretrained)
    questions, passages, answers = make_rows(counts=(3, 4, 4, 2))
    per_passage, _ = both(reader, reader.collate(questions, passages, answers))
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        for z, passage in enumerate(passages[i]):
            expected = reference_scores(reader, question, [passage], answer)
            torch.testing.assert_close(per_passage[i, z, : len(answer) + 1], expected, atol=2e-5, rtol=1e-4)
            assert not per_passage[i, z, len(answer) + 1 :].any()


@pytest.mark.parametrize("pretrained", [False, True])
def test_fused_reads_the_passages_side_by_side(pretrained):
    reader = make_reader(1, groups=2, pretrained=pretrained)
    questions, passages, answers = make_rows(1)
    bias = torch.randn(3, 3)
    for given in (None, bias):
        _, fused = both(reader, reader.collate(questions, passages, answers), given)
        for i, answer in enumerate(answers):
            own = None if given is None else given[i]
            expected = reference_scores(reader, questions[i], passages[i], answer, own)
            torch.testing.assert_close(fused[i, : len(answer) + 1], expected, atol=2e-5, rtol=1e-4)
            assert not fused[i, len(answer) + 1 :].any()


def test_one_passage_fused_is_that_passage_and_a_strong_bias_chooses_one():
    reader = make_reader(2)
    questions, passages, answers = make_rows(2, counts=(1, 1))
    per_passage, fused = both(reader, reader.collate(questions, passages, answers))
    torch.testing.assert_close(per_passage[:, 0], fused)
    questions, passages, answers = make_rows(2, counts=(3, 3))
    bias = torch.tensor([[0.0, -60.0, -60.0], [-60.0, -60.0, 0.0]])
    per_passage, fused = both(reader, reader.collate(questions, passages, answers), bias)
    torch.testing.assert_close(fused, torch.stack([per_passage[0, 0], per_passage[1, 2]]), atol=2e-5, rtol=1e-4)


def test_padding_of_passages_and_of_sources_changes_nothing():
    reader = make_reader(3, groups=2)
    questions, passages, answers = make_rows(3, counts=(2, 2))
    more_questions, more_passages, more_answers = make_rows(4, counts=(5,))
    alone = both(reader, reader.collate(questions, passages, answers))
    batch = reader.collate(questions + more_questions, passages + more_passages, answers + more_answers)
    assert batch.passage_mask.tolist() == [[True] * 2 + [False] * 3] * 2 + [[True] * 5]
    padded, wide = both(reader, batch), both(reader, widened(batch, 7))
    length = alone[0].shape[2]
    torch.testing.assert_close(padded[0][:2, :2, :length], alone[0])
    torch.testing.assert_close(padded[1][:2, :length], alone[1])
    torch.testing.assert_close(wide, padded)
    written = [
        reader.write(reader.read(b), b, fused=True, max_tokens=5, num_beams=2) for b in (batch, widened(batch, 7))
    ]
    assert written[0].tokens == written[1].tokens


def test_order_of_passages_does_not_matter_to_the_fused_reader():
    reader = make_reader(4)
    questions, passages, answers = make_rows(4, counts=(3,))
    _, forward = both(reader, reader.collate(questions, passages, answers))
    _, backward = both(reader, reader.collate(questions, [passages[0][::-1]], answers))
    torch.testing.assert_close(forward, backward)


def test_closed_book_and_an_empty_bias_row_are_finite():
    reader = make_reader(5)
    questions, _, answers = make_rows(5)
    batch = reader.collate(questions, [[np.empty(0, np.int32)]] * 3, answers)
    for values in both(reader, batch):
        assert values.isfinite().all()


# ---------------------------------------------------------------- probabilities


def spread_distribution(
    reader: CopyReader, batch: CopyBatch, prefix: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """What `write` computes for fused rows after `prefix`."""
    caught = []

    def catch(next_log_probs, *arguments, **options):
        caught.append(next_log_probs(prefix))
        return beam_search(next_log_probs, *arguments, **options)

    monkeypatch.setattr(copy_reader, "beam_search", catch)
    reader.write(reader.read(batch), batch, fused=True, max_tokens=3, num_beams=1)
    return caught[0].exp()


def test_probabilities_sum_to_one_and_writing_uses_the_same(monkeypatch):
    reader = make_reader(6)
    questions, passages, answers = make_rows(6, counts=(3,))
    prefix = passages[0][1][2:4]
    scored = []
    for word in range(WORDS):
        batch = reader.collate(questions, passages, [np.append(prefix, word)])
        scored.append(both(reader, batch)[1][0, 2].exp())
    distribution = torch.stack(scored).detach()
    assert distribution.sum().item() == pytest.approx(1.0, abs=1e-5)
    expected = reference_distributions(reader, questions[0], passages[0], prefix)[-1].detach()
    torch.testing.assert_close(distribution, expected, atol=1e-6, rtol=1e-4)
    batch = reader.collate(questions, passages, answers)
    spread = spread_distribution(reader, batch, torch.tensor([[START, *prefix.tolist()]]), monkeypatch)[0]
    spread[PAD] = distribution[PAD]  # never written
    torch.testing.assert_close(spread, distribution, atol=1e-6, rtol=1e-4)


def test_the_pointer_stays_a_distribution_when_it_follows_itself():
    reader = make_reader(7)
    questions, passages, answers = make_rows(7, counts=(2, 3))
    batch = reader.collate(questions, passages, answers)
    memory = reader._memory_of_all(reader.read(batch), batch, torch.randn(2, 3))
    inputs = torch.tensor([[START, *passages[i][0][:4].tolist()] for i in range(2) if len(passages[i][0]) >= 3])
    _, pointer, gate = reader._decode(memory, inputs[:, :4])
    assert pointer.min() >= 0
    torch.testing.assert_close(pointer.sum(-1), torch.ones(2, inputs[:, :4].shape[1]))
    assert not pointer[(memory.copy_bias < -1e8)[:, None].expand_as(pointer)].any()
    assert ((gate > 0) & (gate < 1)).all()


def test_copies_are_followed_to_the_next_token():
    memory = copy_reader.Memory(
        keys=[],
        values=[],
        copy_keys=torch.empty(0),
        source_ids=torch.tensor([[5, 6, 5, 7, 3]]),
        attention_bias=torch.zeros(1, 5),
        copy_bias=torch.zeros(1, 5),
    )
    pointer = torch.tensor([[[0.6, 0.1, 0.2, 0.1, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]])
    follow = torch.tensor([[0.5, 0.9]])
    mixed = copy_reader._follow_copies(pointer, follow, memory, torch.tensor([[START, 5]]))
    # 5 was copied from place 0 (.6) or 2 (.2): .9 of the mass moves to places 1 (3/4) and 3 (1/4), .1 looks anew.
    expected = torch.tensor([0.02, 0.02 + 0.675, 0.02, 0.02 + 0.225, 0.02])
    torch.testing.assert_close(mixed[0, 1], expected)
    torch.testing.assert_close(mixed[0, 0], pointer[0, 0])
    unknown = copy_reader._follow_copies(pointer, follow, memory, torch.tensor([[START, 9]]))
    torch.testing.assert_close(unknown[0, 1], pointer[0, 1])


# ---------------------------------------------------------------- bias and gradients


def test_no_bias_is_a_bias_of_zero_and_the_gradient_reaches_it():
    reader = make_reader(8)
    questions, passages, answers = make_rows(8)
    batch = reader.collate(questions, passages, answers)
    bias = torch.zeros(3, 3, requires_grad=True)
    _, fused = both(reader, batch, bias)
    torch.testing.assert_close(fused, both(reader, batch)[1])
    fused.sum().backward()
    assert bias.grad is not None
    assert (bias.grad[0] != 0).all()
    assert (bias.grad[2, :2] != 0).all()
    assert not bias.grad[~batch.passage_mask].any()
    shifted = both(reader, batch, torch.full((3, 3), 1.7))[1]
    torch.testing.assert_close(shifted, fused, atol=1e-5, rtol=1e-4)  # a softmax does not see a constant


def test_a_padded_passage_leaves_values_and_gradients_finite():
    reader = make_reader(9)
    questions, passages, answers = make_rows(9)
    batch = reader.collate(questions, passages, answers)
    scores = (torch.randn(3, 3) * 30).requires_grad_()
    prior = retrieval_log_probs(scores, batch.passage_mask)
    assert prior.isinf().any()
    per_passage, fused = both(reader, batch, prior)
    assert fused.isfinite().all()
    (fused.sum() + per_passage.sum()).backward()
    assert scores.grad is not None
    for gradient in (scores.grad, *(parameter.grad for parameter in reader.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert not scores.grad[~batch.passage_mask].any()


def test_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the reader computes its mixture in float32
    reader = make_reader(10, groups=2, hidden=8).double()
    questions, passages, answers = make_rows(10, counts=(3, 2))
    batch = reader.collate(questions, passages, answers)
    bias = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 3, 1, dtype=torch.float64)

    def value() -> Tensor:
        per_passage, fused = both(reader, batch, bias)
        return (per_passage * weights).sum() + fused.sum()

    leaves = [bias, *reader.parameters()]
    gradients = torch.autograd.grad(value(), leaves)
    generator = torch.Generator().manual_seed(0)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step, sides = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                sides.append(float(value()))
                leaf -= sign * step * direction
        expected = (sides[0] - sides[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_the_score_of_a_written_answer_is_its_likelihood(fused, num_beams):
    reader = make_reader(30, groups=2)
    questions, passages, answers = make_rows(28, counts=(2, 2, 2))
    batch = reader.collate(questions, passages, answers)
    bias = torch.randn(3, 2) if fused else None
    written = reader.write(reader.read(batch), batch, fused=fused, max_tokens=4, num_beams=num_beams, passage_bias=bias)
    lengths = [len(tokens) for tokens in written.tokens]
    assert len(lengths) == (3 if fused else 6)
    assert min(lengths) < 4, "choose weights under which some answers end"
    for row, tokens in enumerate(written.tokens):
        i, z = (row, 0) if fused else divmod(row, 2)
        target = reader.collate([questions[i]], [passages[i]], [np.array(tokens, np.int32)])
        per_passage, together = both(reader, target, None if bias is None else bias[i : i + 1])
        scores = (together[0] if fused else per_passage[0, z]).tolist()
        # An answer of the greatest length may lack its end, and is then scored as it stands.
        allowed = [sum(scores)] if len(tokens) < 4 else [sum(scores), sum(scores[:4])]
        assert any(float(written.log_probs[row]) == pytest.approx(value, abs=1e-3) for value in allowed)


def test_one_beam_is_greedy_and_more_beams_are_never_worse():
    reader = make_reader(12)
    questions, passages, answers = make_rows(12, counts=(2, 3))
    batch = reader.collate(questions, passages, answers)
    greedy = reader.write(reader.read(batch), batch, fused=True, max_tokens=4, num_beams=1)
    wide = reader.write(reader.read(batch), batch, fused=True, max_tokens=4, num_beams=8)
    for i in range(2):
        tokens: list[int] = []
        while len(tokens) < 4:
            distribution = reference_distributions(reader, questions[i], passages[i], np.array(tokens))[-1]
            distribution[PAD] = 0
            token = int(distribution.argmax())
            if token == END:
                break
            tokens.append(token)
        assert greedy.tokens[i] == tokens
        assert wide.log_probs[i] >= greedy.log_probs[i] - 1e-5


def test_a_saved_reader_gives_the_same_scores(tmp_path: Path):
    reader = make_reader(13)
    batch = reader.collate(*make_rows(13))
    before = both(reader, batch)
    torch.save(reader.state_dict(), tmp_path / "reader.pt")
    other = make_reader(14)
    assert not torch.equal(both(other, batch)[0], before[0])
    other.load_state_dict(torch.load(tmp_path / "reader.pt"))
    for value, expected in zip(both(other, batch), before, strict=True):
        assert torch.equal(value, expected)


def test_long_rows_are_cut():
    reader = make_reader()
    long = np.arange(4, 24, dtype=np.int32)
    batch = reader.collate([long], [[long, long[:1]]], [long])
    assert batch.source_ids.shape == (2, 6 + 10 + 3)
    assert batch.answer_ids.shape == (1, 5 + 1)
    assert batch.answer_ids[0, -1] == END
    assert batch.source_ids[0, batch.copy_mask[0]].tolist() == [*long[:10], END]
    assert batch.source_ids[1, batch.copy_mask[1]].tolist() == [long[0], END]
    nothing = reader.collate([long], [[long]], None)
    assert nothing.answer_ids.shape == (1, 0)
