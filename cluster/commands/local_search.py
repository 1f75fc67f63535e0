"""One index generation, dense and lexical, in this process: what `ask` searches. No Ray; every search is done when it
returns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from cluster.config.settings import Settings
from cluster.refresh.snapshots import fits_changes
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.metadata import MetadataColumns, count_passing
from indexing.dense.encode import Encode, encode_numbers
from indexing.hits import CorpusState, Hits, Indexed, joined, merge
from indexing.lexical.lexical import LexicalHits, LexicalIndex
from indexing.lexical.live_lexical import LiveLexical
from indexing.shard.shard import Shard, shard_ranges

Found = TypeVar("Found", Hits, LexicalHits)


@dataclass(frozen=True)
class Done(Generic[Found]):
    """A search that is over (`PendingHits`, `PendingWords`)."""

    found: Found

    def result(self) -> Found:
        """The hits."""
        return self.found


class DoneWords:
    """A `LexicalService` in this process."""

    def __init__(self, index: LiveLexical) -> None:
        self.index = index

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> Done[LexicalHits]:
        """Search now."""
        return Done(self.index.search(texts, n, wanted, of))


class OneGeneration:
    """The generation that a checkpoint names, brought up to the corpus as it is now; where none is on disk, the whole
    corpus encoded. Has of an `IndexService` what a search needs."""

    def __init__(
        self, settings: Settings, store: LiveStore, *, checkpoint: Path | None, encode: Encode, lexical: Path | None
    ) -> None:
        config = replace(settings.index, device="cpu")
        saved, directory = -1, Path()
        if checkpoint is not None:
            saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["generation"]
            directory = checkpoint.parent.parent / "index" / f"generation-{saved}"
        known = saved >= 0 and fits_changes(directory, store.log)
        self.generation, self.where = saved + 1, parse_filter(settings.retrieval.where)
        words = None if lexical is None else LiveLexical(LexicalIndex.load(lexical), store, where=self.where)
        self.lexical = None if words is None else DoneWords(words)
        ranges = shard_ranges(store.log.num_base, config.num_shards)
        metadata = [
            MetadataColumns(store, *bounds, shard=number, num_shards=len(ranges))
            for number, bounds in enumerate(ranges)
        ]
        self.shards = [
            Shard(number, *bounds, config, metadata=metadata[number]) for number, bounds in enumerate(ranges)
        ]
        for shard in self.shards:
            self._fill(
                shard,
                store,
                saved=directory if known else None,
                encode=encode,
                batch_tokens=settings.refresh.batch_tokens,
            )
        self.num_passages = store.log.num_living()
        if self.where is not None:
            self.num_passages = count_passing(store.path, self.where, store.log.folder)
            if not self.num_passages:
                raise ValueError(f"no passage passes the filter retrieval.where={settings.retrieval.where}")

    def _fill(self, shard: Shard, store: LiveStore, *, saved: Path | None, encode: Encode, batch_tokens: int) -> None:
        """Load what was saved of a shard's passages, encode the others, and serve them all."""
        log, generation, number = store.log, self.generation, shard.shard_number
        shard.hide(log.version, log.deleted_at())
        owned = log.owned(number, len(self.shards), start=shard.start, stop=shard.stop, version=log.version)
        if saved is not None:
            shard.load(generation - 1, saved)
            known = log.num_numbers(shard.status().corpora[generation - 1])
            mine = np.empty(0, np.int64) if owned is None else owned[owned >= known]
            shard.derive(generation, generation - 1, mine, corpus_version=log.version)
        else:
            mine = np.arange(shard.start, shard.stop) if owned is None else owned
            shard.begin(generation, 0, owned, log.version)
        if len(mine):
            shard.stage(
                generation,
                0,
                mine,
                encode_numbers(store.tokens("retriever"), mine, encode=encode, batch_tokens=batch_tokens),
            )
        shard.prepare(generation)
        shard.commit(generation)

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> Done[Hits]:
        """Search every shard now; where a filter leaves fewer than `k` passages, those there are."""
        found = [
            shard.search(queries, k, generation=self.generation, num_vectors=num_vectors, where=self.where)
            for shard in self.shards
        ]
        return Done(merge(found, k, allow_fewer=self.where is not None))

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        """What the shards have of passages."""
        parts = [shard.indexed(ids.reshape(-1), generation, with_vectors) for shard in self.shards]
        return joined(parts, ids.size).at(np.arange(ids.size).reshape(ids.shape))
