"""Does training feel a refresh that runs beside it?

    python -m benchmarks.refresh [--rounds 4] [--passages 12000] [--quiet-steps 40]

This process trains on one thread: a tower of 2 layers x 128 encodes 16 questions and 64 passages a step, forward,
backward, AdamW; each step takes the hits of a search that was submitted the step before, as the training loop does. A
real index service (2 shards, 1 refresh worker, on the other core) rebuilds the whole index after each publish. Quiet
steps, steps during a refresh and steps beside a neighbour take turns over several rounds. The neighbour is the control:
a process that runs forward passes of the same encoder at the worker's priority and has nothing to do with the index, so
that it shows what two busy cores of this machine cost each other. Prints a table, then one JSON line:
`step_ratio_during_refresh` is the median step during a refresh / the median quiet step, `step_ratio_beside_neighbour`
that of the control; `blocked_steps` counts steps whose publish and wait for hits together took longer than a median
quiet step (on a machine with other work, quiet steps have such waits too: the table shows all).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cluster.machines import session

session.set_environment()

from cluster.config.settings import ClusterConfig, RefreshConfig  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.service.actors import NICENESS  # noqa: E402
from cluster.service.search import IndexClient, Search  # noqa: E402
from cluster.service.start import start_index_service  # noqa: E402
from indexing.corpus.files.corpus import Passage  # noqa: E402
from indexing.corpus.stores.passages import write_store  # noqa: E402
from indexing.indexing_settings import IndexConfig  # noqa: E402
from training.models.parts.weights import to_numpy  # noqa: E402
from training.models.retriever.encoder import build_encoder  # noqa: E402
from training.models.text.token_rows import retriever_passage_side  # noqa: E402
from training.models.text.tokenizers import build_tokenizer  # noqa: E402
from training.training_settings import EncoderConfig  # noqa: E402

NAMESPACE = "benchmark"
QUESTIONS, PASSAGES, QUESTION_TOKENS, PASSAGE_TOKENS, K = 16, 64, 16, 48, 4
WAIT_S = 300.0
NEIGHBOUR_STARTS_S = 8.0


@dataclass
class Times:
    """Seconds of each step, and what of them was publish and waiting for hits."""

    step_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)


class Training:
    """A step as in the training loop."""

    def __init__(self, client: IndexClient, config: EncoderConfig, vocab_size: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.client = client
        self.tower = build_encoder(config, vocab_size)
        self.optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-4)
        self.vocab_size, self.number = vocab_size, 0

    def publish(self) -> None:
        self.client.publish(self.number, to_numpy(self.tower.state_dict()))

    def search(self) -> Search:
        """Submit the next batch of questions."""
        with torch.no_grad():
            return self.client.submit(self.tower(*self._tokens(QUESTIONS, QUESTION_TOKENS)).numpy(), K)

    def step(self, pending: Search, times: Times, publish: bool = False) -> Search:
        """One step on the hits of `pending`; returns the next search."""
        begin = time.perf_counter()
        pending.result()
        waited = time.perf_counter() - begin
        following = self.search()
        queries = self.tower(*self._tokens(QUESTIONS, QUESTION_TOKENS))
        vectors = self.tower(*self._tokens(PASSAGES, PASSAGE_TOKENS)).unflatten(0, (QUESTIONS, K))
        scores = torch.einsum("bd,bkd->bk", queries, vectors) / 0.05
        loss = -scores.log_softmax(-1)[:, 0].mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        if publish:
            before = time.perf_counter()
            self.publish()
            waited += time.perf_counter() - before
        self.client.status()
        times.step_s.append(time.perf_counter() - begin)
        times.waited_s.append(waited)
        return following

    def _tokens(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(5, self.vocab_size, (count, length))
        return ids, torch.ones_like(ids)


@contextmanager
def neighbour(config: EncoderConfig, vocab_size: int) -> Iterator[None]:
    """A process beside the block that encodes, and knows no index."""
    process = multiprocessing.get_context("spawn").Process(
        target=encode_for_ever, args=(config, vocab_size), daemon=True
    )
    process.start()
    time.sleep(NEIGHBOUR_STARTS_S)
    try:
        yield
    finally:
        process.kill()
        process.join(10)


def encode_for_ever(config: EncoderConfig, vocab_size: int) -> None:
    """Forward passes over as many tokens as the refresh worker takes at a time, on one thread."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    torch.set_num_threads(1)
    tower, length = build_encoder(config, vocab_size).eval(), PASSAGE_TOKENS
    ids = torch.randint(5, vocab_size, (RefreshConfig().batch_tokens // length, length))
    with torch.inference_mode():
        while True:
            tower(ids, torch.ones_like(ids))


def measure(training: Training, config: EncoderConfig, rounds: int, quiet_steps: int) -> dict[str, Times]:
    """Steps by what went on beside them; the seconds of each refresh stand in "refreshes"."""
    client, quiet, during, beside, refreshes = training.client, Times(), Times(), Times(), Times()
    training.publish()
    client.wait_for_version(0, WAIT_S)
    pending, warm_up = training.search(), Times()
    for _ in range(5):
        pending = training.step(pending, warm_up)
    for _ in range(rounds):
        for _ in range(quiet_steps):
            pending = training.step(pending, quiet)
        committed = client.status().generations_committed
        pending = training.step(pending, during, publish=True)
        while client.status().generations_committed == committed:
            pending = training.step(pending, during)
        refreshes.step_s.append(client.status().refresh_seconds)
        with neighbour(config, training.vocab_size):
            for _ in range(quiet_steps):
                pending = training.step(pending, beside)
    return {"quiet": quiet, "during a refresh": during, "beside a neighbour": beside, "refreshes": refreshes}


def make_passages(count: int) -> list[Passage]:
    """Random words, about 40 a passage."""
    chance = np.random.default_rng(0)
    words = np.array(["".join(chance.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000)])
    lengths = np.clip(chance.gamma(4.0, 10.0, count).astype(int), 8, 60)
    return [Passage(str(number), "", " ".join(chance.choice(words, length))) for number, length in enumerate(lengths)]


def run(rounds: int, num_passages: int, quiet_steps: int, folder: Path) -> dict[str, Times]:
    """Start the service over a fresh corpus, and measure."""
    config = EncoderConfig()
    passages = make_passages(num_passages)
    tokenizer = build_tokenizer(
        "", config.tokenizer, texts=(p.text for p in passages[:2000]), save_dir=folder / "tokenizer"
    )
    write_store(folder / "store", passages, [retriever_passage_side(tokenizer, config)])
    refresh, index = RefreshConfig(), IndexConfig()
    service = start_index_service(
        run_dir=folder / "run",
        namespace=NAMESPACE,
        store=folder / "store",
        tokenizer=folder / "tokenizer",
        encoder=config,
        index=index,
        refresh=refresh,
        placement=plan(ClusterConfig(), refresh, index, nodes_of_cluster()),
    )
    try:
        return measure(Training(service.connect(), config, len(tokenizer)), config, rounds, quiet_steps)
    finally:
        service.stop()


def report(measured: dict[str, Times]) -> dict[str, float]:
    """Print the table; the numbers of the JSON line."""
    refreshes = measured.pop("refreshes").step_s
    medians = {name: statistics.median(times.step_s) for name, times in measured.items()}
    limit = medians["quiet"]
    print(
        f"{'steps':<18} {'number':>7} {'median ms':>10} {'p95 ms':>8} {'mean wait':>10} {'max wait':>9} {'blocked':>8}"
    )
    for name, times in measured.items():
        median, p95 = 1000 * statistics.median(times.step_s), 1000 * float(np.percentile(times.step_s, 95))
        mean, longest = 1000 * statistics.fmean(times.waited_s), 1000 * max(times.waited_s)
        blocked = sum(waited > limit for waited in times.waited_s)
        print(
            f"{name:<18} {len(times.step_s):>7} {median:>10.1f} {p95:>8.1f} {mean:>10.2f} {longest:>9.1f} {blocked:>8}"
        )
    print(f"refreshes: {', '.join(f'{seconds:.1f} s' for seconds in refreshes)}")
    return {
        "step_ratio_during_refresh": round(medians["during a refresh"] / limit, 3),
        "step_ratio_beside_neighbour": round(medians["beside a neighbour"] / limit, 3),
        "blocked_steps": sum(waited > limit for waited in measured["during a refresh"].waited_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--passages", type=int, default=12_000)
    parser.add_argument("--quiet-steps", type=int, default=40)
    arguments = parser.parse_args()
    connection = session.start_or_join(NAMESPACE, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = run(arguments.rounds, arguments.passages, arguments.quiet_steps, Path(folder))
    finally:
        connection.stop()
    print(json.dumps(report(measured)))


if __name__ == "__main__":
    main()
