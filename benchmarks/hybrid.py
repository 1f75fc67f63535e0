"""What words add to vectors, without training: the same questions by vectors, by BM25, by both, fused in every way.

python -m benchmarks.hybrid [config.yaml ...] [section.field=value ...]

Reads the last stage of the configuration: its corpus, its evaluation questions, its encoder (weights of `run.init_from`
where that is named, else as built or pretrained). Prints hit@1 and recall@5, @20; each line says how long its searches
took, all questions in one batch, indexes in this process.
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.cli import read_experiment
from cluster.commands.common import starting_checkpoint
from cluster.commands.loaded_run import encode_function
from cluster.commands.local_search import OneGeneration
from cluster.prepare.stores import prepare_data
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.questions import QuestionStore
from training.checkpoint import load_weights
from training.data import Collator
from training.metrics import ranking_metrics
from training.models.build import build_system, fit_weights
from training.models.parts.named_weights import load_weights_into
from training.models.text.tokenizers import load_tokenizer, pad_id
from training.retrieving.hybrid import HybridSearch
from training.retrieving.retrieve import dense_search

DEPTH = 100
WEIGHTS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
CONSTANTS = (10.0, 60.0)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="configuration files and section.field=value")
    experiment = read_experiment(parser.parse_args(arguments).arguments)
    settings = experiment.last
    settings = replace(settings, retrieval=replace(settings.retrieval, hybrid="learned"))
    torch.set_num_threads(settings.cluster.threads_per_trainer)
    prepared = prepare_data(settings, experiment.directory, print, [settings.questions.evaluate])
    tokenizers = load_tokenizer(prepared.tokenizers / "retriever"), load_tokenizer(prepared.tokenizers / "generator")
    system = build_system(
        settings.encoder, settings.generator, train="none", tokenizers=tokenizers, seed=settings.run.seed
    ).eval()
    start = starting_checkpoint(settings, experiment.stages)
    if start:
        load_weights_into(system, fit_weights(load_weights(Path(start)), system))
    store = LiveStore.open_with(prepared.passages, experiment.directory / "corpus")  # without changes: no such folder
    questions = QuestionStore.open(prepared.questions[settings.questions.evaluate], verify=False)
    collator = Collator(store, questions, system.generator, pad_id(tokenizers[0]))
    numbers = np.arange(len(questions))
    with torch.inference_mode():
        queries = system.encode_questions(*collator.question_tensors(numbers)).numpy()
        index = OneGeneration(
            settings,
            store,
            checkpoint=None,
            encode=encode_function(system.retriever.passage_encoder),
            lexical=prepared.lexical,
        )
    assert index.lexical is not None
    words, text_of = index.lexical, questions.text
    gold = [questions.gold_rows(int(number)) for number in numbers]
    print(f"{len(store)} passages, {len(numbers)} questions; encoder: {start or settings.encoder.name or 'fresh'}")

    def measured(name: str, search: Callable[[], np.ndarray]) -> None:
        begin = time.perf_counter()
        ids = search()
        seconds = time.perf_counter() - begin
        found = {key: float(np.nanmean(values)) for key, values in ranking_metrics(ids, gold).items()}
        shown = "  ".join(f"{key} {found[key]:.3f}" for key in ("recall@1", "recall@5", "recall@20", "mrr"))
        print(f"{name:24}  {shown}  {1000 * seconds:.0f} ms", flush=True)

    measured("dense", lambda: dense_search(index)(numbers, queries, DEPTH).result().ids)
    measured("bm25", lambda: words.submit([text_of(int(number)) for number in numbers], DEPTH).result().ids)
    for constant in CONSTANTS:
        config = replace(settings.retrieval, hybrid="rrf", rrf_constant=constant)
        by_rank = HybridSearch(index, words, text_of=text_of, config=config)
        measured(f"rrf, constant {constant:g}", lambda s=by_rank: s(numbers, queries, DEPTH).result().ids)
    for weight in WEIGHTS:
        by_score = HybridSearch(
            index, words, text_of=text_of, config=settings.retrieval, weight=lambda weight=weight: weight
        )
        measured(f"weighted, {weight:g}", lambda s=by_score: s(numbers, queries, DEPTH).result().ids)


if __name__ == "__main__":
    main(sys.argv[1:])
