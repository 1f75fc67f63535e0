"""Pretraining tasks as pure functions: examples checked by hand, and laws that every example keeps."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from indexing.corpus.files.corpus import Passage
from training.example_settings import PretrainingConfig
from training.feeding.mixture import TASKS, mixture, pretrains
from training.feeding.tasks import (
    MASK,
    Example,
    MaskWords,
    find_recognizer,
    make_example,
    prefix_lm,
    regex_spans,
    salient_span,
    sentences,
    span_corruption,
    title_to_section,
)

TEXT = (
    "Ada Lovelace was born on 10 December 1815 in London. She wrote the first program for the Analytical Engine, "
    'which had 1,000 numbers. "It weaves," she said. Dr. B. Smith disagreed in 1843-07-10.'
)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spans_of(text: str) -> list[str]:
    return [text[start:stop] for start, stop in regex_spans(text)]


def test_sentences_end_before_a_capital_and_not_after_an_initial() -> None:
    found = [TEXT[start:stop].strip() for start, stop in sentences(TEXT)]
    assert found[0] == "Ada Lovelace was born on 10 December 1815 in London."
    assert found[-1] == "B. Smith disagreed in 1843-07-10."  # "Dr." is taken for an end, "B." is not
    assert "".join(TEXT[start:stop] for start, stop in sentences(TEXT)) == TEXT
    assert sentences("no end") == [(0, 6)]
    assert sentences("") == []


def test_names_dates_and_numbers_are_found() -> None:
    found = spans_of(TEXT)
    names = ["Ada Lovelace", "10 December 1815", "London", "Analytical Engine", "1,000"]
    assert found == [*names, "Smith", "1843-07-10"]
    assert "She" not in found  # a capital letter at the start of a sentence is no name
    assert spans_of("The series is 3.11.7, from 5 May 2024, and costs $4.50 or 12% of it.") == [
        *("3.11.7", "5 May 2024", "$4.50", "12%"),
    ]
    assert spans_of("Bank of England and River Thames met in May 2020") == [
        *("Bank of England and River Thames", "May 2020"),
    ]
    assert spans_of("nothing here") == []


def test_a_salient_span_is_masked_in_its_sentence() -> None:
    text = "It is a town. In Rome the bridge of 1924 was rebuilt in 1924 by many hands. It stands."
    number = (text.index("1924"), text.index("1924") + 4)
    example = salient_span(text, random(), 24, lambda _: [number])
    # every place that gives the answer away is masked, not only the drawn one
    assert example == Example(f"In Rome the bridge of {MASK} was rebuilt in {MASK} by many hands.", ("1924",))
    assert salient_span(text, random(), 24, lambda _: []) is None
    assert salient_span("Rome", random(), 24, lambda _: [(0, 4)]) is None  # nothing would be left to ask


def test_a_long_sentence_is_cut_around_the_span_and_a_short_one_takes_more_in() -> None:
    words = [f"w{i}" for i in range(40)]
    text = " ".join(words)
    for at in (0, 1, 17, 38, 39):
        place = (text.index(words[at]), text.index(words[at]) + len(words[at]))
        example = salient_span(text, random(), 9, lambda _, place=place: [place])
        assert example is not None
        asked = example.question.split()
        assert len(asked) == 9
        first = at - asked.index(MASK)
        assert asked == [MASK if i == at else words[i] for i in range(first, first + 9)]
    text = "He left. In 1924. She stayed in the house by the river."
    start = text.index("1924")
    example = salient_span(text, random(), 12, lambda _: [(start, start + 4)])
    assert example == Example(f"He left. In {MASK}. She stayed in the house by the river.", ("1924",))


def test_corrupted_spans_put_back_give_the_passage() -> None:
    words = [f"w{i}" for i in range(30)]
    places: set[int] = set()
    for seed in range(200):
        example = span_corruption(" ".join(words), random(seed), words=20, mask_share=0.3, mean_span_words=2.0)
        assert example is not None
        assert len(example.spans) == 3  # 6 of 20 words, 2 each on average
        assert sum(len(span.split()) for span in example.spans) == 6
        parts, spans = example.question.split(), iter(example.spans)
        restored = " ".join(next(spans) if part == MASK else part for part in parts).split()
        first = words.index(restored[0])
        assert restored == words[first : first + 20]
        assert f"{MASK} {MASK}" not in example.question
        places |= {words.index(word) - first for span in example.spans for word in span.split()}
    assert places == set(range(20))  # the first and the last word of a stretch too


def test_corruption_of_very_short_texts() -> None:
    assert span_corruption("two words", random(), words=20, mask_share=0.15, mean_span_words=3.0) is None
    example = span_corruption("just three words", random(), words=20, mask_share=0.15, mean_span_words=3.0)
    assert example is not None
    assert len(example.spans[0].split()) == 1


def test_a_prefix_and_what_follows_give_the_passage() -> None:
    lengths = set()
    for seed in range(40):
        example = prefix_lm(TEXT, random(seed), 10)
        assert example is not None
        assert f"{example.question} {example.spans[0]}" == TEXT
        lengths.add(len(example.question.split()))
    assert lengths == set(range(5, 11))
    assert prefix_lm("one", random(), 10) is None
    assert prefix_lm("one two", random(), 10) == Example("one", ("two",))


def test_a_title_asks_for_the_first_sentences() -> None:
    assert title_to_section(Passage("a", "Ada", TEXT), 24) == Example("Ada", (TEXT,))
    long = f"{'word ' * 60}end. Five more words are here. Last."
    assert title_to_section(Passage("a", "Ada", long), 24) == Example("Ada", (f"{'word ' * 60}end.",))
    assert title_to_section(Passage("a", "one two three", TEXT), 2) == Example("one two", (TEXT,))
    assert title_to_section(Passage("a", " ", TEXT), 24) is None


def test_masks_are_written_as_each_tokeniser_reads_them() -> None:
    one = Example(f"in {MASK} and {MASK} again", ("1924",))
    two = Example(f"{MASK} for {MASK} week", ("thank you", "last"))
    none = Example("Ada", ("was born",))
    plain = MaskWords("[MASK]")
    assert plain.question(two) == "[MASK] for [MASK] week"
    assert plain.answer(two) == "thank you [MASK] last"
    assert plain.answer(one) == "1924"
    assert (plain.question(none), plain.answer(none)) == ("Ada", "was born")
    t5 = MaskWords("x", ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>"))
    assert t5.question(two) == "<extra_id_0> for <extra_id_1> week"
    assert t5.answer(two) == "<extra_id_0> thank you <extra_id_1> last <extra_id_2>"  # as T5's paper, figure 2
    assert t5.question(one) == "in <extra_id_0> and <extra_id_0> again"
    assert t5.answer(one) == "<extra_id_0> 1924 <extra_id_1>"
    assert (t5.question(none), t5.answer(none)) == ("Ada", "was born")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_function_of_its_generator(task: str) -> None:
    passage, config = Passage("a", "Ada Lovelace", TEXT), PretrainingConfig()
    made = [
        make_example(task, passage, random=random(seed), config=config, words=12, recognize=regex_spans)
        for seed in (1, 1, 2, 3, 4)
    ]
    assert made[0] == made[1] is not None
    assert all(example is not None and len(example.question.split()) <= 12 for example in made)
    assert task == "title_to_section" or len({str(example) for example in made}) > 1


# ---------------------------------------------------------------- the mixture and the recogniser


def test_a_mixture_is_normalised_and_weight_zero_is_left_out() -> None:
    config = PretrainingConfig(salient_span=0.5, prefix_lm=1.5, title_to_section=0.0)
    assert mixture(config) == {"salient_span": 0.25, "prefix_lm": 0.75}
    assert pretrains(config)
    assert not pretrains(PretrainingConfig())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            {"salient_span": 0.0, "prefix_lm": 0.0},
            "pretraining.salient_span=0.0, pretraining.prefix_lm=0.0: the weights",
        ),
        ({"salient_span": -1.0, "prefix_lm": 2.0}, "pretraining.salient_span=-1.0: must be a weight of 0 or above"),
        ({"prefix_lm": float("nan")}, "pretraining.prefix_lm=nan"),
    ],
)
def test_mixtures_of_nothing_are_refused(weights: dict[str, float], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        mixture(replace(PretrainingConfig(), **weights))
    assert expected in str(caught.value)


def test_the_users_own_recogniser(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_spans")
    module.vowels = lambda text: [(i, i + 1) for i, letter in enumerate(text) if letter in "aeiou"]  # type: ignore[attr-defined]
    module.wrong = lambda text: [(3, 2)]  # type: ignore[attr-defined]
    module.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_spans", module)
    assert find_recognizer("my_spans:vowels")("tea") == [(1, 2), (2, 3)]
    assert find_recognizer("regex") is regex_spans
    with pytest.raises(ValueError, match=r"pretraining.recognizer=my_spans:wrong: must return spans .*, not \(3, 2\)"):
        find_recognizer("my_spans:wrong")("text")
    for setting in ("my_spans:number", "my_spans:missing", "no_such_module:f", "spacy", "my_spans:", ":f"):
        with pytest.raises(ValueError, match=f"pretraining.recognizer={setting}: "):
            find_recognizer(setting)
