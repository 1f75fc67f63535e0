"""How much of the bare encoder's speed does a refresh keep?

    python -m benchmarks.encode [--repeats 7] [--threads 1] [--batch-tokens 4096] [--clock cpu]

Bare: the encoder's forward over ready tensors, the whole corpus sorted by length. Encode: the same from the store
(`encode_range`, chunk by chunk). Refresh: the vectors also staged in a shard, its flat index built and committed.
The three take turns; medians count. On a busy machine `--clock cpu` counts the processor's time instead of the wall's.
Prints a table, then one JSON line; `ratio_to_bare` is the lowest refresh / bare.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.passages import TokenSide, write_store
from indexing.corpus.stores.table import TokenTable
from indexing.dense.encode import encode_range, length_batches
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard
from training.models.retriever.encoder import TextEncoder, build_encoder
from training.training_settings import EncoderConfig, FreshEncoderConfig

VOCABULARY = 6000
CHUNKS = 2
SIZES = {  # name -> layers, hidden, heads, passages, mean words of a passage, largest number of tokens
    "2 x 128": (2, 128, 4, 4096, 40, 64),
    "4 x 256": (4, 256, 4, 512, 95, 200),
}


def words_as_tokens(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The words are numbers already: this benchmark is not about tokenisers."""
    return [[int(word) for word in text.split()] for _, text in pairs]


def make_table(folder: Path, num_passages: int, mean_words: int, max_tokens: int) -> TokenTable:
    """Token rows of a store of random passages with lengths as in real text: a peak, and a tail that is cut."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(4.0, mean_words / 4.0, num_passages).astype(int), 8, max_tokens)
    texts = [" ".join(map(str, generator.integers(5, VOCABULARY, length))) for length in lengths]
    passages = [Passage(str(number), "", text) for number, text in enumerate(texts)]
    return write_store(folder, passages, [TokenSide("retriever", words_as_tokens, "words")]).tokens("retriever")


def measure(
    table: TokenTable, encoder: TextEncoder, batch_tokens: int, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Passages per second of each way."""
    num_passages = len(table)
    batches = length_batches(table, np.arange(num_passages), batch_tokens)
    tensors = [[torch.from_numpy(array) for array in table.padded(batch)] for batch in batches]
    bounds = [num_passages * chunk // CHUNKS for chunk in range(CHUNKS + 1)]

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    def bare() -> None:
        with torch.inference_mode():
            for ids, mask in tensors:
                encoder(ids, mask)

    def chunks() -> list[np.ndarray]:
        return [
            encode_range(table, start, stop=stop, encode=encode, batch_tokens=batch_tokens)
            for start, stop in itertools.pairwise(bounds)
        ]

    def refresh() -> None:
        shard = Shard(0, 0, stop=num_passages, config=IndexConfig())
        for start, vectors in zip(bounds, chunks(), strict=False):
            shard.stage(1, 0, start, vectors)
        shard.prepare(1)
        shard.commit(1)

    ways: dict[str, Callable[[], object]] = {"bare": bare, "encode": chunks, "refresh": refresh}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, way in ways.items():
            begin = clock()
            way()
            if repeat:
                seconds[name].append(clock() - begin)
    return {name: num_passages / statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"fp32, {vars(options)}")
    print("encoder  passages  tokens    bare/s  encode/s  refresh/s  refresh/bare")
    ratios = {}
    for name, (layers, hidden, num_heads, num_passages, mean_words, max_tokens) in SIZES.items():
        fresh = FreshEncoderConfig(num_layers=layers, hidden=hidden, num_heads=num_heads, intermediate=4 * hidden)
        config = EncoderConfig(fresh=fresh, max_passage_tokens=max_tokens)
        encoder = build_encoder(config, VOCABULARY).requires_grad_(False).eval()
        encoder.length_groups = 1  # batches are sorted already
        with tempfile.TemporaryDirectory() as folder:
            table = make_table(Path(folder) / "store", num_passages, mean_words, max_tokens)
            speed = measure(table, encoder, options.batch_tokens, options.repeats, clock)
        ratios[name] = round(speed["refresh"] / speed["bare"], 3)
        columns = f"{name:>7}  {num_passages:>8}  {table.lengths.mean():>6.1f}  {speed['bare']:>8.0f}"
        print(f"{columns}  {speed['encode']:>8.0f}  {speed['refresh']:>9.0f}  {ratios[name]:>12.3f}", flush=True)
    print(json.dumps({"ratio_to_bare": min(ratios.values()), "ratios": ratios}))


if __name__ == "__main__":
    main()
