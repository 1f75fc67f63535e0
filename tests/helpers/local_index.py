"""The index service without Ray: real shards in this process, encoded again at once when weights are published."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from indexing.corpus.stores.passages import Store
from indexing.dense.encode import encode_rows
from indexing.hits import CorpusState, Hits, Indexed, joined, merge
from indexing.indexing_settings import IndexConfig, LexicalConfig
from indexing.lexical.lexical import LexicalHits, build_lexical, texts_of
from indexing.shard.shard import Shard, shard_ranges
from training.models.retriever.encoder import build_encoder, load_passage_weights
from training.retrieving.retrieve import IndexStatus
from training.training_settings import EncoderConfig

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class LocalHits:
    """Hits that were found when they were asked for, and can be taken from `ready_at` (time.monotonic) on."""

    hits: Hits
    ready_at: float

    def result(self) -> Hits:
        """Wait for the hits."""
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        return self.hits


class LocalWords:
    """A LexicalService over a lexical index in this process."""

    def __init__(self, store: Store, config: LexicalConfig) -> None:
        self.index = build_lexical(config, store.fingerprint, texts_of(store, range(len(store))))

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> "LocalWordHits":
        """Search at once."""
        assert wanted in (None, CorpusState())
        scores, ids = self.index.search(texts, n) if n else (np.zeros((len(texts), 0), np.float32), np.zeros((0, 0)))
        return LocalWordHits(LexicalHits(ids, scores, of=None if of is None else self.index.scores(texts, of)))


@dataclass(frozen=True)
class LocalWordHits:
    """Hits that were found when they were asked for."""

    hits: LexicalHits

    def result(self) -> LexicalHits:
        """The hits."""
        return self.hits


class LocalIndex:
    """An IndexService. A generation is committed inside `publish`; with `manual`, inside `refresh` or a wait for it.

    `max_generations`: later weights are taken and forgotten, and every wait is content: an index that is never
    refreshed. `delay_s`: how long every search takes at least. `folder`: where generations are saved. `keeps_vectors`
    False: hits come without vectors, as from kinds of index that have none. `lexical`: words are searched, too.
    """

    def __init__(
        self,
        store: Store,
        encoder: EncoderConfig,
        vocab_size: int,
        num_shards: int = 2,
        manual: bool = False,
        max_generations: int = 0,
        delay_s: float = 0.0,
        folder: Path | None = None,
        keeps_vectors: bool = True,
        lexical: LexicalConfig | None = None,
    ) -> None:
        self.num_passages = len(store)
        self.lexical = LocalWords(store, lexical) if lexical is not None else None
        self.manual, self.max_generations, self.delay_s, self.folder = manual, max_generations, delay_s, folder
        self.generation = self.weights_version = -1
        self.generations_committed = 0
        self.published: list[int] = []  # weights versions, in the order in which they came
        self.waited_for: list[int] = []
        self.keeps_vectors, self.passages_encoded = keeps_vectors, 0
        self.partial: list[np.ndarray | None] = []  # passages of each publish; None: all
        self._table = store.tokens("retriever")
        with torch.random.fork_rng():
            self._encoder = build_encoder(encoder, vocab_size).eval().requires_grad_(False)
        ranges = shard_ranges(len(store), num_shards)
        self._shards = [Shard(number, *bounds, IndexConfig()) for number, bounds in enumerate(ranges)]
        self._waiting: tuple[int, dict[str, np.ndarray], np.ndarray | None] | None = None

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> LocalHits:
        """Search the generation that serves now."""
        assert self.generation >= 0, "a search before the first generation"
        num_vectors = num_vectors if self.keeps_vectors else 0
        hits = merge(
            [shard.search(queries, k, generation=self.generation, num_vectors=num_vectors) for shard in self._shards], k
        )
        return LocalHits(hits, time.monotonic() + self.delay_s)

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        """Of passages, as the shards keep them."""
        with_vectors = with_vectors and self.keeps_vectors
        parts = [shard.indexed(ids.reshape(-1), generation, with_vectors) for shard in self._shards]
        return joined(parts, ids.size).at(np.arange(ids.size).reshape(ids.shape))

    def publish(self, weights_version: int, weights: dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
        """Take weights; encode at once unless refreshed by hand. Passages of a publish that still waits are encoded
        with the newer weights."""
        self.published.append(weights_version)
        self.partial.append(only)
        if self._is_complete:
            return
        if self._waiting is not None and only is not None:
            only = None if self._waiting[2] is None else np.union1d(only, self._waiting[2])
        self._waiting = (weights_version, weights, only)
        if not self.manual:
            self.refresh()

    def refresh(self) -> None:
        """Encode, stage, prepare and commit the newest published weights, if they do not serve already."""
        if self._waiting is None:
            return
        (version, weights, only), self._waiting = self._waiting, None
        load_passage_weights(self._encoder, weights)
        generation = self.generation + 1
        for shard in self._shards:
            rows = np.arange(shard.start, shard.stop)
            if only is not None:
                rows = rows[np.isin(rows, only)]
                shard.derive(generation, self.generation, rows, version)
            else:
                shard.begin(generation, version)
            for numbers, vectors in encode_rows(self._table, rows, encode=self._encode, batch_tokens=BATCH_TOKENS):
                shard.stage(generation, version, numbers, vectors)
            shard.prepare(generation)
            self.passages_encoded += len(rows)
        for shard in self._shards:
            shard.commit(generation)
            shard.release(generation - 1)
        self.generation, self.weights_version = generation, version
        self.generations_committed += 1

    def wait_for_version(
        self,
        weights_version: int,
        timeout_s: float,
        report: Callable[[int, str], None] = lambda encoded, doing: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """What waits is built now. Raises TimeoutError when that is not new enough."""
        self.waited_for.append(weights_version)
        self.refresh()
        report(self.num_passages, "")
        if self.weights_version < weights_version and not self._is_complete:
            raise TimeoutError(f"version {weights_version} after {timeout_s} s: {self.weights_version} serves")

    def keep_newest(self) -> int:
        """Write the serving generation, which is then the newest on disk."""
        self.save_generation(self.generation, 0.0)
        return self.generation

    def save_generation(self, generation: int, timeout_s: float) -> str:
        """Write every shard of `generation`."""
        assert self.folder is not None, "LocalIndex without a folder cannot save"
        directory = self.folder / f"generation-{generation}"
        for shard in self._shards:
            shard.save(generation, directory)
        return str(directory)

    def load(self, generation: int) -> None:
        """Serve a generation that another LocalIndex saved."""
        assert self.folder is not None
        for shard in self._shards:
            self.weights_version = shard.load(generation, self.folder / f"generation-{generation}")
        self.generation = generation

    def status(self) -> IndexStatus:
        """What serves."""
        oldest = min(shard.status().oldest_version for shard in self._shards)
        return IndexStatus(
            generation=self.generation,
            weights_version=self.weights_version,
            generations_committed=self.generations_committed,
            refresh_seconds=0.0,
            refresh_passages_per_s=0.0,
            failures=0,
            oldest_version=oldest,
        )

    @property
    def _is_complete(self) -> bool:
        return 0 < self.max_generations <= self.generations_committed

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
