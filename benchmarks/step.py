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
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from cluster import session
from cluster.placement import nodes_of_cluster, plan
from cluster.prepare import Prepared, prepare_data, prepare_tokenizers
from cluster.settings import ClusterConfig, RefreshConfig, Settings
from indexing.questions import QuestionStore
from indexing.settings import CorpusConfig, IndexConfig, QuestionsConfig
from indexing.store import Store
from training.data import Collator, Stream
from training.engine import Engine
from training.evaluate import encode_questions
from training.models.build import build_system, parameter_groups
from training.models.encoder import passage_state
from training.models.generator import Generator
from training.models.system import RetrievalBatch
from training.models.tokenizers import end_id, load_tokenizer, pad_id
from training.models.weights import to_numpy
from training.monitor import Timer
from training.objectives.choose import compute, needs
from training.objectives.likelihoods import Likelihoods
from training.retrieve import IndexService, Prefetcher, Searched
from training.settings import (
    EncoderConfig,
    EngineConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    RetrievalConfig,
    TokenizerConfig,
)
from training.sources import RetrievedBatches

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad-mini"
BATCH, K, MAX_TOKENS, VOCABULARY = 4, 10, 200, 12_000
OBJECTIVES = ("rag_sequence", "pdist", "emdr2")
LIKE_ENCODER = "like encoder"
READERS = {"T5": "8 heads of 64, feed-forward 2048", LIKE_ENCODER: "4 heads of 64, feed-forward 1024"}
RATES = {"retriever": 1e-4, "generator": 1e-4}
PARTS = (
    "search questions",
    "collate, submit",
    "questions",
    "passages",
    "read",
    "answers",
    "objective",
    "backward",
    "optimizer",
)


class GeneratorOnly(nn.Module):
    """What is left of a joint step when the retriever is taken away."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, batch: RetrievalBatch, scores: Tensor, per_passage: bool) -> Likelihoods:
        """`scores` [batch, k] are given; per-passage or fused log-probabilities with gradient."""
        reading, reader = self.generator.read(batch.reader), batch.reader
        outputs = Likelihoods(scores, reader.passage_mask, reader.answer_mask)
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
    service: IndexService
    timer: Timer  # CPU seconds of parts

    def source(self, depth: int, start: int) -> tuple[RetrievedBatches, Remembering]:
        """Batches from `start` on, `depth` of them searched ahead."""

        def encode(numbers: np.ndarray) -> np.ndarray:
            with self.timer.measure("search questions"):
                return encode_questions(self.joint, self.collator, numbers)

        prefetcher = Remembering(self.service, self.stream.batch, encode, K, depth, start)
        config = RetrievalConfig(k=K, prefetch_depth=depth)
        return RetrievedBatches(prefetcher, self.collator, config, self.joint.device, self.stream), prefetcher

    def joint_step(self, batch: RetrievalBatch, objective: ObjectiveConfig) -> None:
        """As in `training/loop.py`."""
        with self.timer.measure("forward"):
            outputs = self.joint("likelihoods", batch, needs(objective), objective.temperature)
            loss, _ = compute(objective, outputs)
        self._update(self.joint, loss, self.timer)

    def generator_step(self, batch: RetrievalBatch, objective: ObjectiveConfig, scores: Tensor) -> None:
        """The same generator losses, and nothing of the retriever."""
        per_passage = not needs(objective).fused
        if not per_passage:
            objective = ObjectiveConfig("fused", score_bias=False)
        loss, _ = compute(objective, self.generator_only(batch, scores, per_passage))
        self._update(self.generator_only, loss, Timer())

    def _update(self, engine: Engine, loss: Tensor, timer: Timer) -> None:
        with timer.measure("backward"):
            engine.backward(loss)
        with timer.measure("optimizer"):
            engine.step(RATES)


# ---------------------------------------------------------------- setting


def make_settings(corpus: Path, root: Path, reader: str) -> Settings:
    """Sections that matter here. Every reader's data lies in `root / reader`, tokenised by one tokeniser."""
    heads, hidden = 4, 256
    settings = Settings(
        corpus=CorpusConfig(path=str(corpus)),
        questions=QuestionsConfig(path=str(corpus)),
        encoder=EncoderConfig(
            fresh=FreshEncoderConfig(4, hidden, heads, 4 * hidden),
            tokenizer=TokenizerConfig(vocabulary=VOCABULARY),
            max_passage_tokens=MAX_TOKENS,
        ),
        generator=GeneratorConfig(
            kind="fusion",
            fresh=FreshGeneratorConfig(4, 4, hidden, heads, 4 * hidden),
            max_passage_tokens=MAX_TOKENS,
        ),
    )
    tokenizer, _ = prepare_tokenizers(settings, root / LIKE_ENCODER, quiet)
    if reader == LIKE_ENCODER:
        return settings
    checkpoint, ours, theirs = root / "checkpoint", root / LIKE_ENCODER / "tokenizers", root / reader / "tokenizers"
    shutil.copytree(ours / "retriever", theirs / "retriever")
    write_t5(checkpoint, tokenizer, hidden)
    return replace(settings, generator=replace(settings.generator, name=str(checkpoint)))


def write_t5(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden: int) -> None:
    """A checkpoint of random weights, as a user would bring one."""
    torch.manual_seed(0)
    pad = pad_id(tokenizer)
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": end_id(tokenizer)}
    shape = T5Config(d_model=hidden, num_layers=4, vocab_size=len(tokenizer), dropout_rate=0.0, **ids)
    T5ForConditionalGeneration(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_random_corpus(folder: Path) -> Path:
    """Words with lengths as in encyclopaedic paragraphs, and questions about them."""
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice(list("abcdefghijklmnop"), 5)) for _ in range(4000)]
    texts = [" ".join(chance.choice(words, int(n))) for n in np.clip(chance.gamma(12, 8, 1500), 20, 180)]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            print(json.dumps({"_id": f"p{number}", "title": text[:11], "text": text}), file=file)
    with (folder / "queries-train.jsonl").open("w") as file, (folder / "qrels" / "train.tsv").open("w") as qrels:
        print("query-id\tcorpus-id\tscore", file=qrels)
        for number, text in enumerate(texts):
            answer = " ".join(text.split()[4:6])
            question = {"_id": f"q{number}", "text": text[:60], "metadata": {"answers": [answer]}}
            print(json.dumps(question), file=file)
            print(f"q{number}\tp{number}\t1", file=qrels)
    return folder


def quiet(_: str) -> None:
    """Preparing says nothing."""


@contextmanager
def index_service(settings: Settings, prepared: Prepared, root: Path, weights: dict[str, Any]) -> Iterator[IndexService]:
    """Two shards and a refresh worker on this machine's Ray, serving the vectors of `weights`."""
    connection = session.start_or_join("benchmark", log_to_driver=False, num_gpus=0)
    from cluster.service import start_index_service

    refresh, index = RefreshConfig(), IndexConfig(num_shards=2)
    handle = None
    try:
        handle = start_index_service(
            root / "run", "benchmark", prepared.passages, prepared.tokenizers / "retriever", settings.encoder, index,
            refresh, plan(ClusterConfig(), refresh, index, nodes_of_cluster()),
        )  # fmt: skip
        client = handle.connect()
        client.publish(0, weights)
        client.wait_for_version(0, 300.0)
        yield client
    finally:
        if handle is not None:
            handle.stop()
        connection.stop()


def make_bench(settings: Settings, prepared: Prepared, service: IndexService, precision: str) -> Bench:
    """Engines with equal readers."""
    tokenizers = load_tokenizer(prepared.tokenizers / "retriever"), load_tokenizer(prepared.tokenizers / "generator")
    system = build_system(settings.encoder, settings.generator, "both", tokenizers, seed=0)
    store = Store.open(prepared.passages, verify=False)
    questions = QuestionStore.open(prepared.questions["train"], verify=False)
    reader = GeneratorOnly(copy.deepcopy(system.generator))
    config = EngineConfig(precision=precision)
    timer = Timer(clock=time.process_time)
    groups = {"retriever": [], "generator": list(reader.parameters())}
    bench = Bench(
        Engine(system, config, parameter_groups(system)),
        Engine(reader, config, groups),
        Collator(store, questions, system.generator, pad_id(tokenizers[0])),
        Stream(len(questions), BATCH, seed=0),
        service,
        timer,
    )
    watch(system.retriever, "encode_queries", "questions", timer)
    watch(system.retriever, "encode_passages", "passages", timer)
    watch(system.generator, "read", "read", timer)
    watch(system.generator, "per_passage_log_probs", "answers", timer)
    watch(system.generator, "fused_log_probs", "answers", timer)
    bench.joint.module.train()
    bench.generator_only.module.train()
    return bench


def watch(owner: object, name: str, part: str, timer: Timer) -> None:
    """Have method `name` of this one object measured."""
    method = getattr(owner, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        with timer.measure(part):
            return method(*arguments, **options)

    setattr(owner, name, measured)


# ---------------------------------------------------------------- measurements


def measure_ahead(bench: Bench, repeats: int) -> dict[int, dict[str, float]]:
    """Joint RAG-sequence steps with 0, 1 and 2 batches searched ahead: wall seconds of a step and of its wait."""
    found: dict[int, dict[str, float]] = {}
    for depth in (0, 1, 2):
        source, _ = bench.source(depth, start=0)
        steps, waits = [], []
        for repeat in range(repeats + 1):  # the first one fills the queue
            begin = time.perf_counter()
            fetched = source.next()
            assert isinstance(fetched.batch, RetrievalBatch)
            bench.joint_step(fetched.batch, ObjectiveConfig("rag_sequence"))
            if repeat:
                steps.append(time.perf_counter() - begin)
                waits.append(fetched.search_wait_s)
        source.state()  # nothing is left under way
        share = sum(waits) / sum(steps)
        found[depth] = {"step_s": statistics.median(steps), "wait_s": statistics.median(waits), "share": share}
    bench.timer.pop()
    return found


def measure_steps(bench: Bench, objective: ObjectiveConfig, repeats: int) -> dict[str, float]:
    """Medians of CPU seconds: `joint`, `generator_only`, and the joint step's parts."""
    source, prefetcher = bench.source(1, start=0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first one warms up
        bench.timer.pop()
        begin = time.process_time()
        fetched = source.next()
        assert isinstance(fetched.batch, RetrievalBatch)
        fetch = time.process_time() - begin
        before = bench.timer.pop()
        bench.joint_step(fetched.batch, objective)
        joint = time.process_time() - begin
        parts = bench.timer.pop()
        scores = torch.from_numpy(prefetcher.last.hits.scores) / TEMPERATURE
        begin = time.process_time()
        bench.generator_step(fetched.batch, objective, scores)
        # Collating is a part of both steps, searching is not.
        parts["collate, submit"] = fetch - before["search questions"]
        alone = time.process_time() - begin + parts["collate, submit"]
        parts["search questions"] = before["search questions"]
        forward = sum(parts[name] for name in ("questions", "passages", "read", "answers"))
        parts["objective"] = parts.pop("forward") - forward
        parts |= {"joint": joint, "generator_only": alone}
        for name, value in parts.items() if repeat else ():
            seconds[name].append(value)
    source.state()
    return {name: statistics.median(values) for name, values in seconds.items()}


TEMPERATURE = EncoderConfig().temperature


def print_steps(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """A column per objective; returns the ratios."""
    print(f"  {'CPU seconds':<24}" + "".join(f"{name:>14}" for name in found))
    for part in PARTS:
        print(f"  {part:<24}" + "".join(f"{parts[part]:>14.3f}" for parts in found.values()))
    for total in ("joint", "generator_only"):
        print(f"  {total.replace('_', ' '):<24}" + "".join(f"{parts[total]:>14.3f}" for parts in found.values()))
    ratios = {name: round(parts["joint"] / parts["generator_only"], 3) for name, parts in found.items()}
    print(f"  {'joint / generator only':<24}" + "".join(f"{ratio:>14.3f}" for ratio in ratios.values()))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="BEIR folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16_autocast"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = options.corpus if options.corpus.is_dir() else write_random_corpus(root / "corpus")
        run(options, corpus, root)


def run(options: argparse.Namespace, corpus: Path, root: Path) -> None:
    """All measurements, printed."""
    settings = {reader: make_settings(corpus, root, reader) for reader in options.readers}
    prepared = {name: prepare_data(one, root / name, quiet, splits=["train"]) for name, one in settings.items()}
    first = options.readers[0]
    tokenizer = load_tokenizer(prepared[first].tokenizers / "retriever")
    system = build_system(settings[first].encoder, settings[first].generator, "both", (tokenizer, tokenizer), seed=0)
    weights = to_numpy(passage_state(system.retriever))
    lengths = Store.open(prepared[first].passages, verify=False).tokens("retriever").lengths
    print(f"{BATCH} questions x {K} passages of {corpus.name}, {lengths.mean():.0f} tokens on average, at most {MAX_TOKENS}; ", end="")  # fmt: skip
    print(f"{options.threads} thread(s), {options.repeats} repeats")
    result: dict[str, Any] = {}
    ratios: dict[str, dict[str, float]] = {}
    with index_service(settings[first], prepared[first], root, weights) as service:
        for reader in options.readers:
            for precision in options.precisions:
                bench = make_bench(settings[reader], prepared[reader], service, precision)
                if not result:
                    ahead = measure_ahead(bench, options.repeats)
                    print(f"\nsearched ahead, RAG-sequence, {precision}, wall seconds")
                    print(f"  {'batches ahead':>13} {'step':>8} {'search wait':>12} {'share':>8}")
                    for depth, row in ahead.items():
                        print(f"  {depth:>13} {row['step_s']:>8.3f} {row['wait_s']:>12.5f} {row['share']:>8.5f}")
                    result["search_wait_share"] = round(ahead[1]["share"], 5)
                    result["search_wait_share_not_ahead"] = round(ahead[0]["share"], 5)
                found = {n: measure_steps(bench, ObjectiveConfig(n), options.repeats) for n in OBJECTIVES}
                print(f"\nreader: {reader} ({READERS[reader]}), {precision}")
                ratios[f"{reader}, {precision}"] = print_steps(found)
    print(json.dumps(result | {"joint_over_generator_only": next(iter(ratios.values())), "all": ratios}))


if __name__ == "__main__":
    main()
