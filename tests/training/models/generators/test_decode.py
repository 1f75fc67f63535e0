"""Beam search against exhaustive search; joining passages' answers; spelling as in the source."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from training.models.generators.decode import beam_search, marginal_answers, restore_spelling, top1_answers
from training.models.generators.generator import Decoded

START, END, WORDS = 0, 1, 5


def table_model(seed: int, rows: int = 1, beams: int = 1, first: int = 0) -> Callable[[Tensor], Tensor]:
    """Next-token log-probabilities that depend on the row (from `first` on) and on the whole prefix."""
    table = torch.randn(4, 3000, WORDS, generator=torch.Generator().manual_seed(seed)) * 2

    def next_log_probs(prefix: Tensor) -> Tensor:
        assert len(prefix) == rows * beams
        keys = torch.zeros(len(prefix), dtype=torch.int64)
        for column in prefix.T[1:]:
            keys = keys * (WORDS + 1) + column + 1
        return table[first + torch.arange(len(prefix)) // beams, keys].log_softmax(-1)

    return next_log_probs


def score(model: Callable[[Tensor], Tensor], tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities of `tokens`."""
    return sum(float(model(torch.tensor([[START, *tokens[:i]]]))[0, token]) for i, token in enumerate(tokens))


def search(
    model: Callable[[Tensor], Tensor], rows: int = 1, max_tokens: int = 3, beams: int = 1, **options: bool
) -> Decoded:
    return beam_search(
        model, rows, start_id=START, end_id=END, max_tokens=max_tokens, num_beams=beams, device="cpu", **options
    )


def test_one_beam_takes_the_best_token_each_time():
    found = search(table_model(0, rows=4), rows=4)
    for row in range(4):
        model, tokens = table_model(0, first=row), []
        while len(tokens) < 3 and END not in tokens:
            tokens.append(int(model(torch.tensor([[START, *tokens]])).argmax()))
        assert found.tokens[row] == [token for token in tokens if token != END]


def hand_built(prefix: Tensor) -> Tensor:
    """Token 2 looks best (.6) but goes nowhere (.3 each); token 3 (.4) ends at once with .9: .36 against .18."""
    after = {(): {2: 0.6, 3: 0.4}, (2,): {2: 0.3, 3: 0.3, 4: 0.3, END: 0.1}, (3,): {END: 0.9, 4: 0.1}}
    rows = torch.full((len(prefix), WORDS), 1e-6)
    for i, tokens in enumerate(prefix[:, 1:].tolist()):
        for token, probability in after.get(tuple(tokens), {END: 1.0}).items():
            rows[i, token] = probability
    return rows.log()


def test_two_beams_find_what_greedy_misses():
    greedy, beams = search(hand_built), search(hand_built, beams=2)
    assert greedy.tokens == [[2, 2]]
    assert beams.tokens == [[3]]
    assert greedy.log_probs.item() == pytest.approx(math.log(0.6 * 0.3), abs=1e-4)
    assert beams.log_probs.item() == pytest.approx(math.log(0.36), abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_enough_beams_are_exhaustive(seed):
    model = table_model(seed)
    words = [token for token in range(WORDS) if token != END]
    ended = [(*tokens, END) for n in range(3) for tokens in itertools.product(words, repeat=n)]
    unended = list(itertools.product(words, repeat=3))  # the third word is where the end should have been
    best = max(ended + unended, key=lambda tokens: score(model, tokens))
    found = search(table_model(seed, beams=100), max_tokens=2, beams=100)
    assert found.tokens[0] == [token for token in best if token != END][:2]
    written = best if END in best else best[:2]
    assert found.log_probs.item() == pytest.approx(score(model, written), abs=1e-4)


def test_an_answer_without_end_is_scored_as_it_stands():
    def never_ends(prefix: Tensor) -> Tensor:
        return torch.tensor([0.05, 0.05, 0.7, 0.1, 0.1]).log().expand(len(prefix), -1)

    for beams in (1, 3):
        found = search(never_ends, max_tokens=2, beams=beams)
        assert found.tokens == [[2, 2]]
        assert found.log_probs.item() == pytest.approx(2 * math.log(0.7), abs=1e-5)


def test_rows_do_not_disturb_each_other_and_running_to_the_end_changes_nothing():
    together = search(table_model(1, rows=3, beams=2), rows=3, beams=2)
    longer = search(table_model(1, rows=3, beams=2), rows=3, beams=2, run_to_end=True)
    assert together.tokens == longer.tokens
    assert torch.equal(together.log_probs, longer.log_probs)
    for row in range(3):
        alone = search(table_model(1, beams=2, first=row), beams=2)
        assert together.tokens[row] == alone.tokens[0]
        assert together.log_probs[row] == alone.log_probs[0]


def test_marginal_sums_over_passages_that_say_the_same():
    # p(z|q) = .5 .3 .2; a: .5 * .4 = .20, b: .3 * .5 + .2 * .6 = .27
    log_prior = torch.tensor([[0.5, 0.3, 0.2]]).log()
    log_probs = torch.tensor([0.4, 0.5, 0.6]).log()
    assert marginal_answers(["a", "b", "b"], log_probs, log_prior) == ["b"]
    assert marginal_answers(["a", "b", "c"], log_probs, log_prior) == ["a"]
    assert top1_answers(["a", "b", "b"], log_prior) == ["a"]


def test_marginal_ties_and_spellings_go_to_the_better_ranked_passage():
    even = torch.full((1, 2), 0.5).log()
    assert marginal_answers(["x", "y"], torch.zeros(2), even) == ["x"]
    uneven = torch.tensor([[0.2, 0.45, 0.35]]).log()
    assert marginal_answers(["New York", "boston", "new  york"], torch.zeros(3), uneven) == ["New York"]


def test_marginal_of_several_questions_with_padded_passages_and_tiny_likelihoods():
    log_prior = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]).log()
    log_probs = torch.tensor([-700.0, -690.0, 0.0, -2000.0, 0.0, 0.0])
    assert marginal_answers(["a", "b", "padding", "c", "padding", "padding"], log_probs, log_prior) == ["b", "c"]
    assert top1_answers(["a", "b", "padding", "c", "padding", "padding"], log_prior) == ["a", "c"]


@pytest.mark.parametrize(
    ("written", "source", "expected"),
    [
        ("8 u 504 + 1", "Java SE 8u504+1 came out.", "8u504+1"),
        ("1980 s", "In the late 1980s it closed.", "1980s"),
        ("1973 \u2013 1974", "The season of 1973\u20131974.", "1973\u20131974"),
        ("anna maria de la cruz", "By Anna Maria de la Cruz, 1901", "Anna Maria de la Cruz"),
        ("o ' neill", "Tip O'Neill spoke.", "O'Neill"),
        ("new york", "in New\nYork City", "New\nYork"),
        ("3.11.7", "version 3.11.7, then 3.11.70", "3.11.7"),
        ("3.11.7", "only 3.11.70 here", "3.11.7"),
        ("art", "A party of artists", "art"),
        ("ART", "party, then Art.", "Art"),
        ("he art", "the art", "he art"),
        ("11.7", "release 3.11.7", "11.7"),
        ("istanbul", "From İstanbul on", "İstanbul"),
        ("absent", "Something else", "absent"),
        ("", "Something else", ""),
    ],
)
def test_spelling_is_that_of_the_source(written, source, expected):
    assert restore_spelling(written, [source]) == expected


def test_the_first_source_that_has_it_gives_the_spelling():
    assert restore_spelling("krob", ["nothing", "the KROB", "the Krob"]) == "KROB"
    assert restore_spelling("krob", []) == "krob"
