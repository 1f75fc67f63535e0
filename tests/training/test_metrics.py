"""Answer metrics against hand cases and torchmetrics; ranking metrics against counting by hand; the bootstrap."""

import math

import numpy as np
import pytest

from training.metrics import (
    answer_metrics,
    answer_recall,
    contains_answer,
    exact_match,
    f1,
    means,
    normalize_answer,
    paired_difference,
    ranking_metrics,
)

WORDS = ["the", "a", "Paris", "paris-based", "3.11.7", "U.S.", "an", "red", "Red!", "fox", "über", "fox's", "", "14"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("3.11.7", "3117"),
        ("Anthem", "anthem"),  # articles only as whole words
        ("the", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_takes_any_gold_answer() -> None:
    assert exact_match("the Beatles.", ["Queen", "Beatles"]) == 1.0
    assert exact_match("Beatles band", ["Queen", "Beatles"]) == 0.0
    assert exact_match("Beatles", []) == 0.0


def test_f1_by_hand() -> None:
    assert f1("red fox jumps", ["the red fox", "hound"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)  # bags, not sets
    assert f1("", ["the"]) == 1.0
    assert f1("", ["red"]) == 0.0
    assert f1("red", []) == 0.0


def test_against_torchmetrics() -> None:
    squad = pytest.importorskip("torchmetrics.functional.text", reason="waits for torchmetrics, the oracle").squad
    generator = np.random.default_rng(0)

    def text() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(0, 5)))

    for _ in range(200):
        prediction, answers = text(), [text() for _ in range(generator.integers(1, 4))]
        expected = squad(
            {"prediction_text": prediction, "id": "0"},
            {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "0"},
        )
        assert 100 * exact_match(prediction, answers) == pytest.approx(expected["exact_match"].item(), abs=1e-4)
        assert 100 * f1(prediction, answers) == pytest.approx(expected["f1"].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It was released as version 3.11.7, in May.", ["3.11.7"], True),
        ("It was released as version 13.11.7.", ["3.11.7"], False),  # whole tokens only
        ("He lives in New York.", ["york new"], False),  # in sequence
        ("He lives in the New, York", ["New York"], True),
        ("The the the", ["the", "!"], False),  # nothing is left to look for
        ("anything", [], False),
        ("First", ["nothing", "first"], True),
    ],
)
def test_contains_answer(text: str, answers: list[str], expected: bool) -> None:
    assert contains_answer(text, answers) is expected


def test_answer_metrics_and_means() -> None:
    values = answer_metrics(["red", "blue fox"], [["red"], ["fox"]])
    np.testing.assert_allclose(values["exact_match"], [1, 0])
    np.testing.assert_allclose(values["f1"], [1, 2 / 3])
    assert means(values | {"x": np.array([np.nan, np.nan])}) == pytest.approx({"exact_match": 0.5, "f1": 5 / 6})


def test_answer_recall_by_rank() -> None:
    values = answer_recall([["no", "it is red"], ["red", "no"], ["no", "no"]], [["red"], ["red"], []], cuts=(1, 2, 5))
    assert sorted(values) == ["answer_recall@1", "answer_recall@2"]
    np.testing.assert_array_equal(values["answer_recall@1"], [0, 1, np.nan])
    np.testing.assert_array_equal(values["answer_recall@2"], [1, 1, np.nan])


def test_ranking_metrics_by_hand() -> None:
    hits = np.array([[4, 7, 1, 9, 3], [0, 2, 5, 6, 8], [1, 2, 3, 4, 5]])
    values = ranking_metrics(hits, [np.array([7, 3]), np.array([], dtype=np.int64), np.array([11])], cuts=(1, 2, 5, 20))
    expected = {
        "recall@1": 0.0,
        "recall@2": 1.0,  # any gold passage
        "recall@5": 1.0,
        "qrel_recall@1": 0.0,
        "qrel_recall@2": 0.5,  # half of the gold passages
        "qrel_recall@5": 1.0,
        "mrr": 0.5,
        "ndcg@10": (1 / math.log2(3) + 1 / math.log2(6)) / (1 + 1 / math.log2(3)),
    }
    assert sorted(values) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], [value, np.nan, 0.0], atol=1e-6, err_msg=name)


def test_ranking_metrics_of_many_questions_against_counting() -> None:
    generator = np.random.default_rng(1)
    hits = np.stack([generator.permutation(200)[:100] for _ in range(30)])
    gold = [generator.permutation(200)[: generator.integers(1, 6)] for _ in range(30)]
    values = ranking_metrics(hits, gold)
    for i in range(30):
        found = np.isin(hits[i], gold[i])
        for k in (1, 5, 20, 100):
            assert values[f"recall@{k}"][i] == float(found[:k].any())
            assert values[f"qrel_recall@{k}"][i] == pytest.approx(found[:k].sum() / len(gold[i]))
        assert values["mrr"][i] == pytest.approx(1 / (1 + found.argmax()) if found.any() else 0.0)


def test_ranking_metrics_without_any_judgement() -> None:
    values = ranking_metrics(np.array([[1, 2]]), [np.array([], dtype=np.int64)])
    assert means(values) == {}


def test_paired_difference_is_seeded_and_close_to_the_normal_interval() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.random(400) < 0.7, generator.random(400) < 0.5
    mean, low, high = paired_difference(a, b, seed=3)
    assert (mean, low, high) == paired_difference(a, b, seed=3)
    differences = a.astype(float) - b.astype(float)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert mean == pytest.approx(differences.mean())
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)


def test_paired_difference_leaves_out_what_one_side_lacks() -> None:
    assert paired_difference(np.array([1.0, np.nan, 1.0]), np.array([0.0, 1.0, 0.0])) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no question"):
        paired_difference(np.array([np.nan]), np.array([0.0]))
    with pytest.raises(ValueError, match="shapes"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_paired_difference_in_chunks_keeps_memory_bounded() -> None:
    a = np.ones(1_000_000)
    assert paired_difference(a, np.zeros_like(a), num_resamples=6) == (1.0, 1.0, 1.0)
