"""Searches one index generation, dense and lexical, in this process without Ray, for `ask`. Every search is over when
its call returns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from cluster.config.settings import Settings
from cluster.refresh.snapshots import fits_changes
from indexing.corpus.stores.filters import Filter, parse_filter
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
    """A search that is over (`PendingHits`, `PendingLexical`)."""

    found: Found

    def result(self) -> Found:
        """Return the hits."""
        return self.found


class DoneLexical:
    """A `LexicalService` in this process."""

    def __init__(self, index: LiveLexical) -> None:
        self.index = index

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> Done[LexicalHits]:
        """Search now."""
        return Done(self.index.search(texts, n, wanted, of))


class OneGeneration:
    """Holds the generation that a checkpoint names, brought up to the corpus as it is now; without one on disk, the
    whole corpus is encoded. Has the part of an `IndexService` that a search needs. One thread at a time may call it."""

    def __init__(
        self, settings: Settings, store: LiveStore, *, checkpoint: Path | None, encode: Encode, lexical: Path | None
    ) -> None:
        config = replace(settings.index, device="cpu")
        self._store, self._encode, self._batch_tokens = store, encode, settings.refresh.batch_tokens
        self.generation, directory = -1, Path()
        if checkpoint is not None:
            self.generation = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["generation"]
            directory = checkpoint.parent.parent / "index" / f"generation-{self.generation}"
        known = self.generation >= 0 and fits_changes(directory, store.log)
        ranges = shard_ranges(store.log.num_base, config.num_shards)
        self.shards = [
            Shard(
                number,
                *bounds,
                config,
                metadata=MetadataColumns(store, *bounds, shard=number, num_shards=len(ranges)),
            )
            for number, bounds in enumerate(ranges)
        ]
        self._base_lexical = None if lexical is None else LexicalIndex.load(lexical)
        if known:
            for shard in self.shards:
                shard.load(self.generation, directory)
        self._fill(self.shards[0].status().corpora[self.generation] if known else None)
        self._restricted: tuple[Filter | None, int] = (None, -1)  # filter and version of the corpus that are set
        self._restrict(settings.retrieval.where)

    def follow(self, where: Mapping[str, Any]) -> None:
        """Take note of changes of the corpus, encode what is new, and find only what passes the filter `where` from
        now on. Raises ValueError for a filter that nothing passes."""
        self._store.refresh()
        if self._store.log.version != self._version:
            self._fill(self._version)
        self._restrict(where)

    def _fill(self, known: int | None) -> None:
        """Serve the corpus as it is now. Vectors that the served generation has of version `known` (None: nothing is
        served) are kept; the rest is encoded."""
        store, log, generation = self._store, self._store.log, self.generation + 1
        self._version = version = log.version
        for number, shard in enumerate(self.shards):
            shard.hide(version, log.deleted_at())
            owned = log.owned(number, len(self.shards), start=shard.start, stop=shard.stop, version=version)
            if known is not None:
                new = np.empty(0, np.int64) if owned is None else owned[owned >= log.num_numbers(known)]
                shard.derive(generation, self.generation, new, corpus_version=version)
            else:
                new = np.arange(shard.start, shard.stop) if owned is None else owned
                shard.begin(generation, 0, owned, version)
            if len(new):
                tokens = store.tokens("retriever")
                vectors = encode_numbers(tokens, new, encode=self._encode, batch_tokens=self._batch_tokens)
                shard.stage(generation, 0, new, vectors)
            shard.prepare(generation)
            shard.commit(generation)
            if known is not None:
                shard.release(self.generation)
        self.generation = generation

    def _restrict(self, where: Mapping[str, Any]) -> None:
        """Find only passages that pass a filter."""
        log, passes = self._store.log, parse_filter(dict(where))
        if self._restricted == (passes, log.version):
            return
        num_passages = log.num_living() if passes is None else count_passing(self._store.path, passes, log.folder)
        if not num_passages:
            raise ValueError(f"no passage passes the filter retrieval.where={dict(where)}")
        lexical = None if self._base_lexical is None else LiveLexical(self._base_lexical, self._store, where=passes)
        self.lexical = None if lexical is None else DoneLexical(lexical)
        self.where, self.num_passages, self._restricted = passes, num_passages, (passes, log.version)

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> Done[Hits]:
        """Search every shard now. If a filter leaves fewer than `k` passages, the hits are all of those."""
        found = [
            shard.search(queries, k, generation=self.generation, num_vectors=num_vectors, where=self.where)
            for shard in self.shards
        ]
        return Done(merge(found, k, allow_fewer=self.where is not None))

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        """Return the vectors and versions that the shards have of passages."""
        parts = [shard.indexed(ids.reshape(-1), generation, with_vectors) for shard in self.shards]
        return joined(parts, ids.size).at(np.arange(ids.size).reshape(ids.shape))
