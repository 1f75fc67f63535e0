"""How long until a change of the corpus is found, and is what it replaced ever found again?

    python -m benchmarks.live [--data ../shared/data/live-versions] [--batch 500] [--only updates|million] [--rows N]

Updates: an index service on Ray (2 shards, 1 refresh worker, a fresh tower of 2 layers x 128) serves the corpus of
live-versions; its dated updates are made as live changes, `--batch` lines at a time. After each batch the index is
asked with the vectors of what was just replaced or deleted, the queries that find the old texts if anything does, and
with random ones: old passages among the hits are counted, and the hits compared with brute force over the living
passages. At the end the whole index is built anew from the same weights, and the hits compared with those before.

Million: one shard process holds 1,000,000 x 384 random vectors; 1,000 passages are added to the corpus, which is on
disk with its tokens, through the log, the coordinator and both phases of the commit, by a worker that has their vectors
at hand: what is left is the time beside the encoding. Then 1,000 are deleted, and 100 encoded again.

Prints tables, then one JSON line; `add_1000_at_1m_s` is from the start of the change until a search finds the passages,
without the encoding; `old_found` counts old passages in all hits after their change, `differing` hits that are not
those of brute force.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.machines import session

session.set_environment()

import ray  # noqa: E402

from cluster.config.settings import ClusterConfig, RefreshConfig  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.prepare.corpus_changes import wait_until_served  # noqa: E402
from cluster.refresh.coordinator import RefreshCoordinator  # noqa: E402
from cluster.refresh.encode_queue import EncodePool  # noqa: E402
from cluster.refresh.ports import Chunk, ShardPort, Weights  # noqa: E402
from cluster.refresh.shards import ShardGroup  # noqa: E402
from cluster.refresh.snapshots import IndexIdentity, Snapshots  # noqa: E402
from cluster.service.actors import SHARD_THREADS, ShardActor  # noqa: E402
from cluster.service.ray_ports import NamedActor, Patience, RayShard  # noqa: E402
from cluster.service.search import IndexAddress, IndexClient  # noqa: E402
from cluster.service.start import refresh_settings, start_index_service  # noqa: E402
from indexing.corpus.files.corpus import Passage, iterate_corpus  # noqa: E402
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus  # noqa: E402
from indexing.corpus.stores.passages import TokenSide, write_store  # noqa: E402
from indexing.dense.encode import encode_numbers  # noqa: E402
from indexing.dense.exact import search_exactly  # noqa: E402
from indexing.indexing_settings import CorpusConfig, IndexConfig  # noqa: E402
from indexing.shard.shard import Shard  # noqa: E402
from training.models.parts.weights import to_numpy  # noqa: E402
from training.models.retriever.encoder import TextEncoder, build_encoder  # noqa: E402
from training.models.text.token_rows import retriever_passage_side  # noqa: E402
from training.models.text.tokenizers import build_tokenizer, load_tokenizer  # noqa: E402
from training.training_settings import (  # noqa: E402
    CheckpointConfig,
    EncoderConfig,
    FreshEncoderConfig,
    TokenizerConfig,
)

NAMESPACE = "benchmark"
K, DIM, BLOCK = 20, 384, 50_000
TOWER = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=2, hidden=128, num_heads=4, intermediate=512),
    tokenizer=TokenizerConfig(vocabulary=8000),
    max_passage_tokens=64,
)
WAIT_S = 300.0


# ---------------------------------------------------------------- the dated updates of live-versions


def read_updates(folder: Path) -> Iterator[dict[str, Any]]:
    """In the order of their dates."""
    with gzip.open(folder / "updates.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def batches(updates: Iterable[dict[str, Any]], size: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Lines of one date, at most `size`, and none with an id that the batch has already."""
    batch: dict[str, dict[str, Any]] = {}
    day = ""
    for update in updates:
        if batch and (update["date"] != day or len(batch) == size or update["_id"] in batch):
            yield day, list(batch.values())
            batch = {}
        day = update["date"]
        batch[update["_id"]] = update
    if batch:
        yield day, list(batch.values())


def encode(encoder: TextEncoder, store: LiveStore, numbers: np.ndarray) -> np.ndarray:
    """Vectors as the service's worker makes them."""

    def call(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return encode_numbers(store.tokens("retriever"), numbers, encode=call, batch_tokens=4096)


def measure_updates(data: Path, size: int, folder: Path) -> dict[str, float]:
    """Make all updates of `data`; prints a line per date."""
    passages = list(iterate_corpus(CorpusConfig(path=str(data)))[0])
    tokenizer = build_tokenizer(
        "", TOWER.tokenizer, texts=(f"{p.title} {p.text}" for p in passages), save_dir=folder / "tokenizer"
    )
    side = retriever_passage_side(tokenizer, TOWER)
    write_store(folder / "store", passages, [side])
    torch.manual_seed(0)
    encoder = build_encoder(TOWER, len(load_tokenizer(folder / "tokenizer"))).eval()
    refresh = RefreshConfig(num_workers=1)
    index = IndexConfig(num_shards=2)
    service = start_index_service(
        folder / "run",
        NAMESPACE,
        store=folder / "store",
        tokenizer=folder / "tokenizer",
        encoder=TOWER,
        index=index,
        refresh=refresh,
        placement=plan(ClusterConfig(), refresh, index, nodes_of_cluster()),
    )
    try:
        client = service.connect()
        client.publish(1, to_numpy(encoder.state_dict()))
        client.wait_for_version(1, WAIT_S)
        store = LiveStore.open_with(folder / "store", folder / "run" / "corpus")
        vectors = encode(encoder, store, np.arange(len(store)))
        random = np.random.default_rng(0)
        rows: dict[str, list[tuple[float, int]]] = {}
        living, queries = np.arange(len(store)), vectors[:16]  # until the first update
        old_found = differing = compared = 0
        for day, batch in batches(read_updates(data), size):
            put = [Passage(u["_id"], u["title"], u["text"]) for u in batch if u["op"] == "upsert"]
            gone = [u["_id"] for u in batch if u["op"] == "delete" and store.row_of(u["_id"]) is not None]
            begin = time.perf_counter()
            change = change_corpus(store, Wanted(put, gone, "upsert"), sides=[side])
            wait_until_served(store.log.folder, change.version, WAIT_S)
            rows.setdefault(day, []).append((time.perf_counter() - begin, len(put) + len(gone)))
            vectors = np.concatenate([vectors, encode(encoder, store, np.arange(len(vectors), len(store)))])
            some = random.choice(change.deleted, min(64, len(change.deleted)), replace=False)
            queries = np.concatenate([vectors[some], random.normal(size=(16, vectors.shape[1])).astype(np.float32)])
            client.submit(queries, K).result()  # hears of the newest generation
            hits = client.submit(queries, K).result()
            numbers = np.arange(len(store))
            living = numbers[store.is_living(numbers)]
            old_found += int((~store.is_living(hits.ids)).sum())
            scores, _ = search_exactly(vectors[living], queries, K)
            differing += int((~np.isclose(hits.scores, scores, rtol=1e-4, atol=1e-5)).sum())
            compared += hits.ids.size
        before = client.submit(queries, K).result()
        begin = time.perf_counter()
        client.publish(2, to_numpy(encoder.state_dict()))
        client.wait_for_version(2, WAIT_S)
        rebuild_s = time.perf_counter() - begin
        after = client.submit(queries, K).result()
        same = float(np.isclose(before.scores, after.scores, rtol=1e-4, atol=1e-5).mean())
    finally:
        service.stop()
    print(f"{'date':>10} {'batches':>8} {'changes':>8} {'s a batch':>10} {'longest':>8}")
    for day, done in rows.items():
        seconds = [one for one, _ in done]
        median, longest = statistics.median(seconds), max(seconds)
        print(f"{day:>10} {len(done):>8} {sum(n for _, n in done):>8,} {median:>10.2f} {longest:>8.2f}")
    all_s = [one for done in rows.values() for one, _ in done]
    print(f"{len(living):,} of {len(store):,} passages living; {compared:,} hits compared, {old_found} old ones found,")
    print(
        f"{differing} scores differ from brute force; a rebuild took {rebuild_s:.1f} s, {same:.4f} of its hits the same"
    )
    return {
        "batches": len(all_s),
        "batch_s": statistics.median(all_s),
        "old_found": old_found,
        "differing": differing,
        "same_after_rebuild": same,
        "rebuild_s": rebuild_s,
    }


# ---------------------------------------------------------------- one million


class KnowingWorker:
    """A refresh worker that has the vectors at hand: encoding costs nothing."""

    name = "knowing"

    def __init__(self, vectors: dict[int, np.ndarray]) -> None:
        self._vectors = vectors

    def encode(self, chunk: Chunk, generation: int, weights: Weights, shard: ShardPort) -> None:
        numbers = np.arange(chunk.start, chunk.stop) if chunk.numbers is None else np.array(chunk.numbers)
        if len(numbers) == chunk.num_passages and chunk.numbers is None:
            block = random_vectors(len(numbers), chunk.start)
        else:
            block = np.stack([self._vectors[int(number)] for number in numbers])
        start = chunk.start if chunk.numbers is None else numbers
        reference: Any = ray.put(block)
        shard.call(Shard.stage, generation, weights.version, start, reference)

    def recover(self) -> None: ...


def random_vectors(count: int, seed: int) -> np.ndarray:
    """float32 [count, DIM], of length about 1."""
    return np.random.default_rng(seed).standard_normal((count, DIM), np.float32) / np.float32(DIM**0.5)


def words(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Tokens of the million's passages."""
    return [[len(text), *map(ord, text[:8])] for _, text in pairs]


def measure_million(num_rows: int, folder: Path, repeats: int = 5) -> dict[str, float]:
    """Add, delete and encode again in a shard of `num_rows` vectors; the repeats of each are printed."""
    side = TokenSide("retriever", words, "words")
    base = write_store(folder / "store", (Passage(f"p{n}", "", f"passage {n}") for n in range(num_rows)), [side])
    store = LiveStore.open_with(base.path, folder / "run" / "corpus")
    remote: Any = ray.remote
    shard_class = remote(concurrency_groups=SHARD_THREADS)(ShardActor)
    actor = shard_class.options(name="million", namespace=NAMESPACE, num_cpus=0).remote(
        0, 0, num_rows, IndexConfig(), 1
    )
    shards = ShardGroup(
        [RayShard(0, 0, stop=num_rows, actor=NamedActor("million", NAMESPACE), patience=Patience(600.0, 4.0))]
    )
    known: dict[int, np.ndarray] = {}
    pool = EncodePool(
        [KnowingWorker(known)], shards, events=lambda event, **fields: None, max_failures=3, chunk_timeout_s=600.0
    )
    identity = IndexIdentity(
        encoder_fingerprint="none", corpus_fingerprint=base.fingerprint, factory="Flat", ranges=((0, num_rows),)
    )
    log = LiveStore.open_with(base.path, folder / "run" / "corpus").log  # the coordinator's own view
    events: list[tuple[str, dict[str, Any]]] = []
    index_folder = folder / "run" / "index"

    def note(event: str, **fields: Any) -> None:
        events.append((event, fields))

    snapshots = Snapshots(index_folder, shards, identity=identity, events=note, keep=2, keep_protected=2, log=log)
    settings = refresh_settings(
        RefreshConfig(chunk_passages=BLOCK), IndexConfig(search_timeout_s=120.0), CheckpointConfig(), folder / "run"
    )
    coordinator = RefreshCoordinator(
        settings, shards, pool=pool, snapshots=snapshots, keep_weights=lambda weights: weights, events=note, log=log
    )
    coordinator.recover(60.0)
    begin = time.perf_counter()
    coordinator.publish(Weights(1, 1, None))
    coordinator.wait_and_refresh(0.0)
    built_s = time.perf_counter() - begin
    begin = time.perf_counter()
    assert snapshots.work(), events
    saved_s = time.perf_counter() - begin
    stop = threading.Event()

    def follow() -> None:  # as the coordinator's process does
        while not stop.is_set():
            coordinator.follow_corpus()
            coordinator.live.note(store.log.folder)
            snapshots.work()
            time.sleep(0.1)

    thread = threading.Thread(target=follow)
    thread.start()
    client = IndexClient(
        IndexAddress(
            namespace=NAMESPACE,
            coordinator="none",
            shards=("million",),
            num_passages=num_rows,
            search_timeout_s=120.0,
            hung_after_s=40.0,
            events_path="/dev/null",
        )
    )
    queries = random_vectors(16, 5)
    client.submit(queries, K).result()
    added_s, deleted_s, again_s = [], [], []
    for repeat in range(repeats):
        first = len(store)
        new = random_vectors(1000, 10_000_000 + repeat)
        known.update(zip(range(first, first + 1000), new, strict=True))
        put = [Passage(f"new-{first + n}", "", f"a new passage {n}") for n in range(1000)]
        begin = time.perf_counter()
        change = change_corpus(store, Wanted(put), sides=[side])
        wait_until_served(store.log.folder, change.version, WAIT_S)
        while not (client.submit(new[:16], 1).result().ids[:, 0] == np.arange(first, first + 16)).all():
            pass
        added_s.append(time.perf_counter() - begin)
        gone = np.arange(repeat * 1000, repeat * 1000 + 1000)
        begin = time.perf_counter()
        change = change_corpus(store, Wanted(delete=[f"p{n}" for n in gone]), sides=[])
        wait_until_served(store.log.folder, change.version, WAIT_S)
        deleted_s.append(time.perf_counter() - begin)
        hits = client.submit(random_vectors(1000, 0)[:16] if not repeat else queries, K).result()
        assert not np.isin(hits.ids, gone).any()
        again = np.arange(500_000 % num_rows, 500_000 % num_rows + 100) + 100 * repeat
        known.update(zip(again.tolist(), random_vectors(100, 20_000_000 + repeat), strict=True))
        begin = time.perf_counter()
        coordinator.encode_again(again, Weights(2, 2, None))
        again_s.append(time.perf_counter() - begin)
    search_s = []
    for _ in range(10):
        begin = time.perf_counter()
        client.submit(queries, K).result()
        search_s.append(time.perf_counter() - begin)
    stop.set()
    thread.join()
    pool.stop()
    links = sorted(index_folder.glob("generation-*/shard-0000/base/index.faiss"))
    shared = all(path.stat().st_nlink > 1 or path.stat().st_size == 0 for path in links)
    ray.kill(actor)
    print(f"{num_rows:,} x {DIM}: built in {built_s:.1f} s, saved in {saved_s:.1f} s; seconds, {repeats} times each:")
    for name, seconds in (("add 1,000", added_s), ("delete 1,000", deleted_s), ("encode 100 again", again_s)):
        print(f"  {name:<18} {' '.join(f'{one:.2f}' for one in seconds)}")
    print(f"  search of 16 queries afterwards: {statistics.median(search_s):.3f}; big index linked on disk: {shared}")
    million = f"{num_rows // 1_000_000}m" if num_rows >= 1_000_000 else f"{num_rows // 1000}k"
    return {
        f"add_1000_at_{million}_s": statistics.median(added_s),
        f"delete_1000_at_{million}_s": statistics.median(deleted_s),
        f"encode_again_100_at_{million}_s": statistics.median(again_s),
        "built_s": built_s,
        "saved_s": saved_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(Path(__file__).resolve().parents[2] / "shared/data/live-versions"))
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--only", choices=["updates", "million"], default="")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    connection = session.start_or_join(NAMESPACE, object_store_bytes=2**30, log_to_driver=False)
    found: dict[str, float] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.only != "million":
                found |= measure_updates(Path(arguments.data), arguments.batch, Path(scratch) / "updates")
            if arguments.only != "updates":
                found |= measure_million(arguments.rows, Path(scratch) / "million")
    finally:
        connection.stop()
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
