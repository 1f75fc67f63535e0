"""One index generation, dense and lexical, in this process: what `ask` searches. No Ray; every search is done when it
returns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from cluster.settings import Settings
from indexing.encode import Encode, encode_range
from indexing.lexical import LexicalHits
from indexing.merge import Hits, merge
from indexing.shard import Shard, shard_ranges
from indexing.shelf import LexicalShelf
from indexing.snapshot import is_complete
from indexing.store import Store

Found = TypeVar("Found", Hits, LexicalHits)


@dataclass(frozen=True)
class Done(Generic[Found]):
    """A search that is over (`PendingHits`, `PendingWords`)."""

    found: Found

    def result(self) -> Found:
        """The hits."""
        return self.found


class DoneWords:
    """A `LexicalService` of one corpus."""

    def __init__(self, directory: Path, settings: Settings, corpus: str) -> None:
        self.shelf, self.corpus = LexicalShelf(directory.parent, settings.lexical), corpus

    def submit(self, texts: Sequence[str], n: int, corpus: str = "", of: np.ndarray | None = None) -> Done[LexicalHits]:
        """Search now."""
        return Done(self.shelf.search(texts, n, corpus or self.corpus, of))


class OneGeneration:
    """The generation that a checkpoint names, or the corpus encoded now where none is on disk. Has of an
    `IndexService` what a search needs."""

    def __init__(
        self, settings: Settings, store: Store, checkpoint: Path | None, encode: Encode, lexical: Path | None
    ) -> None:
        self.num_passages, self.corpus = len(store), store.fingerprint
        self.lexical = None if lexical is None else DoneWords(lexical, settings, store.fingerprint)
        config = replace(settings.index, device="cpu")
        generation, directory = -1, Path()
        if checkpoint is not None:
            generation = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["generation"]
            directory = checkpoint.parent.parent / "index" / f"generation-{generation}"
        saved = generation >= 0 and is_complete(directory)
        self.generation = generation if saved else 0
        self.shards: list[Shard] = []
        for number, (start, stop) in enumerate(shard_ranges(len(store), config.num_shards)):
            shard = Shard(number, start, stop, config)
            if saved:
                shard.load(generation, directory)
            else:
                table = store.tokens("retriever")
                shard.stage(0, 0, start, encode_range(table, start, stop, encode, settings.refresh.batch_tokens))
                shard.prepare(0)
                shard.commit(0)
            self.shards.append(shard)

    def submit(self, queries: np.ndarray, k: int, num_vectors: int = 0) -> Done[Hits]:
        """Search every shard now."""
        found = [
            shard.search(queries, min(k, shard.stop - shard.start), self.generation, num_vectors)
            for shard in self.shards
        ]
        return Done(replace(merge(found, k), corpus=self.corpus))

    def vectors(self, ids: np.ndarray, generation: int) -> np.ndarray | None:
        """The indexed vectors of passages, zeros for -1; None where the kind of index keeps none."""
        flat, found = ids.reshape(-1), None
        for shard in self.shards:
            part = shard.vectors(flat, generation)
            if part is None:
                return None
            found = np.zeros((len(flat), part[1].shape[1]), np.float32) if found is None else found
            found[part[0]] = part[1]
        return None if found is None else found.reshape(*ids.shape, -1)
