"""What does a joint fusion-in-decoder step cost under each objective, beside a generator-only step on the same batch?

    python -m benchmarks.objectives [--repeats 9] [--threads 1] [--profile OBJECTIVE]

4 questions with 10 passages of up to 200 tokens (mean about 95, random words), fresh encoder of 4 layers x 256, T5
reader `T5Config(d_model=256, num_layers=4)`, dropout 0, fp32, ZeRO 0. A joint step: encode the questions as the search
does, both towers, the reader, the objective, backward, update of everything. Generator only: the same generator loss
without any retriever (RAG-sequence: the mixture under a given prior; the others: the fused likelihood).

Every batch goes through all steps, in an order that rotates; CPU seconds of this process count, because other work on
the machine moves them less than wall seconds. A ratio is the median over batches of joint over generator only on the
same batch. Prints a table of medians, then one JSON line.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from benchmarks.step import BATCH, MODELS, Bench, K, make_bench
from benchmarks.step_setting import make_settings, prepare, start_as_trainer, write_random_corpus
from indexing.corpus.stores.passages import Store
from training.data import encode_questions
from training.models.model_inputs import RetrievalBatch
from training.training_settings import ObjectiveConfig

OBJECTIVES = ("rag_sequence", "emdr2", "pdist", "loop", "adist")
PRIOR, FUSED = "generator only, mixture", "generator only, fused"
PARTS = (*MODELS, "forward", "backward", "optimizer")


class Setting:
    """Engines with equal readers, and batches of random passages."""

    def __init__(self, root: Path) -> None:
        settings = make_settings(write_random_corpus(root / "corpus"), root, "T5")
        prepared = prepare(settings, root / "T5")
        self.bench: Bench = make_bench(settings, prepared, None, "fp32")
        self.lengths = Store.open(prepared.passages, verify=False).tokens("retriever").lengths

    def batch(self, number: int) -> tuple[RetrievalBatch, torch.Tensor]:
        """Batch `number`, with its questions encoded as for a search, and scores in place of the search's."""
        bench, random = self.bench, np.random.default_rng(number)
        questions = bench.stream.batch(number)
        encode_questions(bench.joint, bench.collator, questions)
        passages = [random.choice(len(self.lengths), K, replace=False) for _ in questions]
        scores = torch.from_numpy(random.normal(size=(len(questions), K)).astype(np.float32))
        return bench.collator(questions, passages), scores

    def steps(self, batch: RetrievalBatch, scores: torch.Tensor) -> dict[str, Callable[[], None]]:
        """Every step on this batch, by name."""
        bench = self.bench

        def joint(name: str) -> Callable[[], None]:
            return lambda: bench.joint_step(batch, ObjectiveConfig(name=name))

        alone = {PRIOR: "rag_sequence", FUSED: "pdist"}
        return {name: joint(name) for name in OBJECTIVES} | {
            name: lambda objective=objective: bench.generator_step(batch, ObjectiveConfig(name=objective), scores)
            for name, objective in alone.items()
        }


def measure(setting: Setting, repeats: int) -> dict[str, list[dict[str, float]]]:
    """CPU seconds of every step on every batch: `all`, and the parts of a joint step."""
    seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first one warms up
        begin = time.process_time()
        batch, scores = setting.batch(repeat)
        fetch_s = time.process_time() - begin
        steps = list(setting.steps(batch, scores).items())
        for name, step in steps[repeat % len(steps) :] + steps[: repeat % len(steps)]:
            setting.bench.timer.pop()
            begin = time.process_time()
            step()
            whole = time.process_time() - begin + (fetch_s if name in OBJECTIVES else 0.0)
            if repeat:
                seconds[name].append({"all": whole} | setting.bench.timer.pop())
    return seconds


def print_table(seconds: dict[str, list[dict[str, float]]]) -> None:
    """Medians, a line per step."""
    print(f"  {'CPU seconds':<26}" + "".join(f"{part:>11}" for part in ("step", *PARTS)))
    for name, rows in seconds.items():
        medians = [statistics.median(row.get(part, 0.0) for row in rows) for part in ("all", *PARTS)]
        print(f"  {name:<26}" + "".join(f"{value:>11.3f}" for value in medians))


def ratios_of(seconds: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Median over batches of joint over generator only."""
    found = {}
    for name in OBJECTIVES:
        alone = seconds[PRIOR if name == "rag_sequence" else FUSED]
        pairs = [one["all"] / other["all"] for one, other in zip(seconds[name], alone, strict=True)]
        low, middle, high = np.quantile(pairs, [0.25, 0.5, 0.75])
        print(f"  {name:<26}{middle:>11.3f}   quartiles {low:.3f} {high:.3f}")
        found[name] = round(float(middle), 3)
    return found


def profile(setting: Setting, name: str) -> None:
    """Where one kind of step spends its time, by function."""
    batch, scores = setting.batch(0)
    step = setting.steps(batch, scores)[name]
    step()
    with cProfile.Profile() as recorded:
        step()
    pstats.Stats(recorded).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", choices=[*OBJECTIVES, PRIOR, FUSED], help="print where this step spends its time")
    options = parser.parse_args()
    start_as_trainer()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        lengths = setting.lengths
        print(
            f"{BATCH} questions x {K} passages of {lengths.mean():.0f} tokens on average, at most {lengths.max()}; "
            f"{options.threads} thread(s), fp32, {options.repeats} repeats"
        )
        if options.profile:
            profile(setting, options.profile)
            return
        seconds = measure(setting, options.repeats)
        print_table(seconds)
        print("\n  joint / generator only")
        ratios = ratios_of(seconds)
        alone = statistics.median(row["all"] for row in seconds[FUSED])
        print(json.dumps(ratios | {"generator_only_s": round(alone, 3)}))


if __name__ == "__main__":
    main()
