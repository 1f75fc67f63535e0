"""Answer and ranking metrics: numbers for one question, arrays with one entry a question for many.

`recall@k` is 1 when any passage with an answer (qrels) is in the top k, the hit rate of the open-domain question
answering literature, so that recall@1 is hit@1 also for questions with several gold passages. `qrel_recall@k` is the
share of a question's gold passages in the top k, trec_eval's recall. `answer_recall@k` is 1 when the text of a top-k
passage contains a gold answer. `paired_difference` compares arrays of two systems.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CUTS = (1, 5, 20, 100)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation, articles and extra whitespace, as SQuAD's evaluation
    does (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction equals any normalised gold answer, else 0.0; 0.0 without gold answers."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the largest F1 of normalised tokens, as bags, over the gold answers; 0.0 without gold answers."""
    tokens = normalize_answer(prediction).split()
    return max((_token_f1(tokens, normalize_answer(answer).split()) for answer in answers), default=0.0)


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether the normalised tokens of any gold answer stand in the text, whole and in sequence. The text
    contains no answer of which normalisation leaves nothing."""
    padded = f" {normalize_answer(text)} "
    normalized = (normalize_answer(answer) for answer in answers)
    return any(answer != "" and f" {answer} " in padded for answer in normalized)


def answer_metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return `exact_match` and `f1` of each question: float64 [questions]."""
    measures: dict[str, Callable[[str, Sequence[str]], float]] = {"exact_match": exact_match, "f1": f1}
    return {
        name: np.array([measure(*pair) for pair in zip(predictions, answers, strict=True)], dtype=np.float64)
        for name, measure in measures.items()
    }


def answer_recall(
    passages: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], cuts: Sequence[int] = CUTS
) -> dict[str, np.ndarray]:
    """Return `answer_recall@k` of each question: float64 [questions], NaN without gold answers.

    `passages` are texts [questions][depth], best first. Cuts deeper than the deepest list are left out.
    """
    first = np.full(len(passages), np.inf)
    for i, (texts, gold) in enumerate(zip(passages, answers, strict=True)):
        first[i] = next((rank for rank, text in enumerate(texts) if contains_answer(text, gold)), np.inf)
    known = np.array([len(gold) > 0 for gold in answers], dtype=bool)
    depth = max((len(texts) for texts in passages), default=0)
    return {f"answer_recall@{k}": np.where(known, first < k, np.nan) for k in cuts if k <= depth}


def ranking_metrics(
    hits: np.ndarray, gold_rows: Sequence[np.ndarray], cuts: Sequence[int] = CUTS
) -> dict[str, np.ndarray]:
    """Return `recall@k`, `qrel_recall@k`, `ndcg@10` and `mrr` of each question: float64 [questions], NaN without gold
    rows.

    `hits` are passage numbers [questions, depth], best first; `gold_rows` are passage numbers [questions][any]. Cuts
    deeper than `depth` are left out; `ndcg@10` and `mrr` see no further than `depth`. Computed by ir-measures
    (trec_eval).
    """
    # Imported here, because the answer metrics do not need it.
    import ir_measures
    from ir_measures import RR, R, Success, nDCG

    measures = {"ndcg@10": nDCG @ 10, "mrr": RR}
    for k in (k for k in cuts if k <= hits.shape[1]):
        measures |= {f"recall@{k}": Success @ k, f"qrel_recall@{k}": R @ k}
    qrels = {str(i): {str(row): 1 for row in gold} for i, gold in enumerate(gold_rows) if len(gold) > 0}
    run = {i: {str(row): -rank for rank, row in enumerate(hits[int(i)])} for i in qrels}
    assert len(gold_rows) == len(hits)
    values = {name: np.full(len(hits), np.nan) for name in measures}
    names = {measure: name for name, measure in measures.items()}
    if qrels:
        for found in ir_measures.iter_calc(list(names), qrels, run):
            values[names[found.measure]][int(found.query_id)] = found.value
    return values


def means(per_question: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each metric over the questions that have it; a metric that no question has is left out."""
    known = {name: values[~np.isnan(values)] for name, values in per_question.items()}
    return {name: float(values.mean()) for name, values in known.items() if len(values) > 0}


def mean_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of every number that rows carry, over the rows that carry it (NaN: not measurable for that
    question)."""
    names = sorted({name for row in rows for name, value in row.items() if isinstance(value, float)})
    return means({name: np.array([row.get(name, np.nan) for row in rows]) for name in names})


def changed_questions(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `after` whose answers differ from those in `before`, with both predictions.

    `new` is 1 if the prediction is right after the update, `old` if it is the former answer and not a right one.
    """
    former = {row["id"]: row for row in before}
    changed = []
    for row in after:
        known = former.get(row["id"])
        if known is None or _normalized(known["answers"]) == _normalized(row["answers"]):
            continue
        old = answer_metrics([row["prediction"]], [known["answers"]])["exact_match"][0]
        stale = float(old) if not row["exact_match"] else 0.0
        changed.append({**row, "new": row["exact_match"], "old": stale, "before": known["exact_match"]})
    return changed


def paired_difference(
    a: np.ndarray, b: np.ndarray, seed: int = 0, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """Return the mean of a - b over questions and its 95% interval, (mean, low, high), by percentile bootstrap over
    questions.

    a, b: one number a question [questions], same order; a question where either is NaN is left out. Raises ValueError
    if none is left or the lengths differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired_difference: shapes {a.shape} and {b.shape}: needs two of [questions]")
    differences = (a - b)[~(np.isnan(a) | np.isnan(b))]
    if len(differences) == 0:
        raise ValueError("paired_difference: no question has both values")
    generator = np.random.default_rng(seed)
    resampled = np.empty(num_resamples)
    chunk = max(1, 4_000_000 // len(differences))  # 32 MB of indices
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        chosen = generator.integers(len(differences), size=(rows, len(differences)))
        resampled[start : start + rows] = differences[chosen].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    """Return F1 of two bags of tokens; if one is empty, 1.0 if both are."""
    if not predicted or not gold:
        return float(predicted == gold)
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2.0 * shared / (len(predicted) + len(gold))


def _normalized(answers: Sequence[str]) -> set[str]:
    return {normalize_answer(answer) for answer in answers}
