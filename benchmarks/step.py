"""What does a joint step cost, part by part, and beside a step that trains the generator alone on the same passages?

    python -m benchmarks.step [--corpus ../shared/data/squad-mini] [--repeats 5] [--threads 1]

4 questions with 10 passages of up to 200 tokens each, found by a real index service; fresh encoder of 4 layers x 256,
T5 reader of 4 layers x 256, dropout 0, ZeRO 0. Two readers: `T5Config(d_model=256, num_layers=4)` with the library's
other values (8 heads of 64, feed-forward 2048), and one whose layers have the encoder's shape (4 heads of 64, 1024),
where the encoder's arithmetic alone is 0.8 of the reader's. Without the corpus, random words of like lengths are read.

Generator only: the same generator losses without any retriever. RAG-sequence gets its prior from the search scores;
of PDist and EMDR2 the fused likelihood is left. Both engines take turns on the same batches; medians of CPU seconds
of this process count, except where it waits. Prints tables, then one JSON line; its ratios are of fp32 and the first
reader, `search_wait_share` is the share of wall time with one batch searched ahead.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from benchmarks.step_setting import (
    MAX_TOKENS,
    READERS,
    build,
    index_service,
    make_settings,
    prepare,
    start_as_trainer,
    write_random_corpus,
)
from cluster.config.settings import Settings
from cluster.prepare.stores import Prepared
from indexing.corpus.stores.passages import Store
from indexing.corpus.stores.questions import QuestionStore
from training.data import Collator, Stream, encode_questions
from training.engine.engine import Engine
from training.engine.engine_setup import multiplies_bf16
from training.feeding.batches import RetrievedBatches
from training.models.build import parameter_groups
from training.models.generators.generator import Generator
from training.models.model_inputs import RetrievalBatch
from training.models.system import System
from training.models.text.tokenizers import load_tokenizer, pad_id
from training.objectives.dispatch import compute, needs
from training.objectives.inputs import Likelihoods
from training.reporting.monitor import Timer
from training.retrieving.retrieve import IndexService, Prefetcher, Searched
from training.training_settings import EncoderConfig, EngineConfig, ObjectiveConfig, RetrievalConfig

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad-mini"
BATCH, K, DEPTHS = 4, 10, (0, 1, 2)
TEMPERATURE = EncoderConfig().temperature
OBJECTIVES = ("rag_sequence", "pdist", "emdr2")
RATES = {"retriever": 1e-4, "generator": 1e-4}
SEARCH, COLLATE = "questions for search", "submit, collate"
MODELS = ("questions", "passages", "read", "answers")
PARTS = (SEARCH, COLLATE, *MODELS, "objective", "backward", "optimizer")


class GeneratorOnly(nn.Module):
    """What is left of a joint step when the retriever is taken away."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, method: Callable[..., Likelihoods], *args: object) -> Likelihoods:
        """The one entrance of the engine, as that of the system."""
        return method(self, *args)

    def likelihoods(self, batch: RetrievalBatch, scores: Tensor, per_passage: bool) -> Likelihoods:
        """`scores` [batch, k] are given; per-passage or fused log-probabilities with gradient."""
        reading, reader = self.generator.read(batch.generator_batch), batch.generator_batch
        outputs = Likelihoods(scores=scores, passage_mask=reader.passage_mask, answer_mask=reader.answer_mask)
        if per_passage:
            outputs.per_passage = self.generator.per_passage_log_probs(reading, reader)
        else:
            outputs.fused = self.generator.fused_log_probs(reading, reader)
        return outputs


class Remembering(Prefetcher):
    """A prefetcher whose last hits can be looked at."""

    last: Searched

    def next(self) -> Searched:
        self.last = super().next()
        return self.last


@dataclass
class Bench:
    """Both engines and what feeds them."""

    joint: Engine
    generator_only: Engine
    collator: Collator
    stream: Stream
    service: IndexService | None  # None: passages come from elsewhere
    timer: Timer  # CPU seconds of parts

    def source(self, depth: int, start: int) -> tuple[RetrievedBatches, Remembering]:
        """Batches from `start` on, `depth` of them searched ahead."""

        def encode(numbers: np.ndarray) -> np.ndarray:
            with self.timer.measure(SEARCH):
                return encode_questions(self.joint, self.collator, numbers)

        assert self.service is not None
        prefetcher = Remembering(
            self.service, self.stream.batch, encode_questions=encode, k=K, depth=depth, start=start
        )
        config = RetrievalConfig(k=K, prefetch_depth=depth)
        return RetrievedBatches(
            prefetcher, self.collator, config=config, device=self.joint.device, stream=self.stream
        ), prefetcher

    def joint_step(self, batch: RetrievalBatch, objective: ObjectiveConfig) -> None:
        """As in `training/loop.py`."""
        with self.timer.measure("forward"):
            outputs = self.joint(System.likelihoods, batch, needs(objective), objective.temperature)
            loss, _ = compute(objective, outputs)
        self._update(self.joint, loss, self.timer)

    def generator_step(self, batch: RetrievalBatch, objective: ObjectiveConfig, scores: Tensor) -> None:
        """The same generator losses, and nothing of the retriever."""
        per_passage = not needs(objective).fused
        if not per_passage:
            objective = ObjectiveConfig(name="fused", score_bias=False)
        loss, _ = compute(objective, self.generator_only(GeneratorOnly.likelihoods, batch, scores, per_passage))
        self._update(self.generator_only, loss, Timer())

    def _update(self, engine: Engine, loss: Tensor, timer: Timer) -> None:
        with timer.measure("backward"):
            engine.backward(loss)
        with timer.measure("optimizer"):
            engine.step(RATES)


def make_bench(settings: Settings, prepared: Prepared, service: IndexService | None, precision: str) -> Bench:
    """Engines with equal readers."""
    system = build(settings, prepared)
    reader = GeneratorOnly(copy.deepcopy(system.generator))
    config, timer = EngineConfig(precision=precision), Timer(clock=time.process_time)
    questions = QuestionStore.open(prepared.questions["train"], verify=False)
    padding = pad_id(load_tokenizer(prepared.tokenizers / "retriever"))
    bench = Bench(
        Engine(system, config, parameter_groups(system)),
        Engine(reader, config, {"retriever": [], "generator": list(reader.parameters())}),
        Collator(Store.open(prepared.passages, verify=False), questions, system.generator, padding),
        Stream(len(questions), BATCH, seed=0),
        service,
        timer,
    )
    watch(system.retriever, "encode_queries", "questions", timer)
    watch(system.retriever, "encode_passages", "passages", timer)
    watch(system.generator, "read", "read", timer)
    for scoring in ("per_passage", "fused", "left_out"):
        watch(system.generator, f"{scoring}_log_probs", "answers", timer)
    watch(system.generator, "fused_with_attention", "answers", timer)
    system.train()
    reader.train()
    return bench


def watch(owner: object, name: str, part: str, timer: Timer) -> None:
    """Have method `name` of this one object measured."""
    method = getattr(owner, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        with timer.measure(part):
            return method(*arguments, **options)

    setattr(owner, name, measured)


def measure_ahead(bench: Bench, repeats: int) -> dict[int, dict[str, float]]:
    """Joint RAG-sequence steps by the number of batches searched ahead: wall seconds of a step and of its wait."""
    sources = {depth: bench.source(depth, start=0)[0] for depth in DEPTHS}
    steps: dict[int, list[float]] = defaultdict(list)
    waits: dict[int, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first one fills the queues
        for depth, source in sources.items():
            begin = time.perf_counter()
            fetched = source.next()
            assert isinstance(fetched.batch, RetrievalBatch)
            bench.joint_step(fetched.batch, ObjectiveConfig(name="rag_sequence"))
            if repeat:
                steps[depth].append(time.perf_counter() - begin)
                waits[depth].append(fetched.search_wait_s)
    for source in sources.values():
        source.state()  # nothing is left under way
    return {
        depth: {
            "step_s": statistics.median(steps[depth]),
            "wait_s": statistics.median(waits[depth]),
            "share": sum(waits[depth]) / sum(steps[depth]),
        }
        for depth in DEPTHS
    }


def measure_steps(bench: Bench, objective: ObjectiveConfig, repeats: int) -> dict[str, float]:
    """Medians of CPU seconds: `joint`, `generator_only`, and the joint step's parts."""
    source, prefetcher = bench.source(1, start=0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first one warms up
        bench.timer.pop()
        begin = time.process_time()
        fetched = source.next()
        assert isinstance(fetched.batch, RetrievalBatch)
        fetch_s, search_s = time.process_time() - begin, bench.timer.pop()[SEARCH]
        bench.joint_step(fetched.batch, objective)
        joint_s, parts = time.process_time() - begin, bench.timer.pop()
        scores = torch.from_numpy(prefetcher.last.hits.scores) / TEMPERATURE
        begin = time.process_time()
        bench.generator_step(fetched.batch, objective, scores)
        alone_s = time.process_time() - begin
        parts |= {SEARCH: search_s, COLLATE: fetch_s - search_s}
        parts["objective"] = parts.pop("forward") - sum(parts[name] for name in MODELS)
        # Both steps collate their batch, here done once.
        parts |= {"joint": joint_s, "generator_only": alone_s + parts[COLLATE]}
        if repeat:
            for name, value in parts.items():
                seconds[name].append(value)
    source.state()
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ahead(found: dict[int, dict[str, float]]) -> None:
    """A line per depth."""
    print(f"  {'batches ahead':<24}{'step':>14}{'search wait':>14}{'share':>14}")
    for depth, row in found.items():
        print(f"  {depth:<24}{row['step_s']:>14.3f}{row['wait_s']:>14.5f}{row['share']:>14.5f}")


def print_steps(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """A column per objective; returns the ratios."""
    print(f"  {'CPU seconds':<24}" + "".join(f"{name:>14}" for name in found))
    for part in (*PARTS, "joint", "generator_only"):
        print(f"  {part.replace('_', ' '):<24}" + "".join(f"{parts[part]:>14.3f}" for parts in found.values()))
    ratios = {name: parts["joint"] / parts["generator_only"] for name, parts in found.items()}
    print(f"  {'joint / generator only':<24}" + "".join(f"{ratio:>14.3f}" for ratio in ratios.values()))
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def run(options: argparse.Namespace, corpus: Path, root: Path) -> dict[str, Any]:
    """All measurements, printed; what the JSON line says."""
    settings = {reader: make_settings(corpus, root, reader) for reader in options.readers}
    prepared = {reader: prepare(one, root / reader) for reader, one in settings.items()}
    first = options.readers[0]
    lengths = Store.open(prepared[first].passages, verify=False).tokens("retriever").lengths
    size = f"{len(lengths)} passages, {lengths.mean():.0f} tokens on average, at most {MAX_TOKENS}"
    print(f"{BATCH} questions x {K} of {corpus.name} ({size}); {options.threads} thread(s), {options.repeats} repeats")
    result: dict[str, Any] = {}
    ratios: dict[str, dict[str, float]] = {}
    with index_service(settings[first], prepared[first], root) as service:
        for reader in options.readers:
            for precision in options.precisions:
                bench = make_bench(settings[reader], prepared[reader], service, precision)
                if not result:
                    print(f"\nsearched ahead: reader {reader}, {precision}, RAG-sequence, wall seconds")
                    ahead = measure_ahead(bench, options.repeats)
                    print_ahead(ahead)
                    result["search_wait_share"] = round(ahead[1]["share"], 5)
                found = {name: measure_steps(bench, ObjectiveConfig(name=name), options.repeats) for name in OBJECTIVES}
                print(f"\nreader {reader} ({READERS[reader]}), {precision}")
                ratios[f"{reader}, {precision}"] = print_steps(found)
    return result | {"joint_over_generator_only": next(iter(ratios.values())), "all": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="BEIR folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", *["bf16_autocast"] * multiplies_bf16()])
    options = parser.parse_args()
    start_as_trainer()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = options.corpus if options.corpus.is_dir() else write_random_corpus(root / "corpus")
        print(json.dumps(run(options, corpus, root)))


if __name__ == "__main__":
    main()
