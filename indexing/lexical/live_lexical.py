"""Searches a corpus that changes by BM25: the index of its base store, and a small one of the passages added since.

    base     the lexical index of the base store, mapped; it never changes
    added    the same of all passages of later versions, in memory; extended when a version is read
    masks    passages that were deleted, or that do not pass the filter; they are never found

The number of passages with a word, and their lengths, are counted in the base: a score means the same in both parts,
and the cost of a change depends on its passages alone. Words that the base does not know are counted among the added
passages. The statistics are those of the base store until the corpus is prepared anew.

A search names the state of the corpus (`indexing.hits.CorpusState`) that it needs, so that words and vectors answer
for the same one: passages of later versions are left out, and so are those deleted up to that version or meanwhile.
Nobody waits, except for a state that the log does not show here yet, as can happen on a file system that several
machines share: the search looks for it during `LAG_S`, and the caller may ask again.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexing.corpus.stores.changes import contains
from indexing.corpus.stores.filters import Filter
from indexing.corpus.stores.live_store import LiveStore
from indexing.corpus.stores.metadata import MetadataColumns
from indexing.hits import UNCHANGED, CorpusState, best_first
from indexing.lexical.lexical import LexicalHits, LexicalIndex, build_lexical, texts_of

LAG_S, POLL_S = 5.0, 0.05


class CorpusLag(TimeoutError):
    """The error if the log here does not show a version of the corpus yet that is served elsewhere."""


@dataclass(frozen=True)
class _View:
    """Everything that is searched; replaced as a whole."""

    version: int  # version of the corpus
    added: LexicalIndex
    allowed: np.ndarray | None  # bool [passages of the base]: those that may be found; None: all
    added_allowed: np.ndarray  # bool [passages added]


class LiveLexical:
    """The BM25 search over a store and its changes. Safe from several threads."""

    def __init__(self, base: LexicalIndex, store: LiveStore, lag_s: float = LAG_S, where: Filter | None = None) -> None:
        """Prepare the search. Only passages that pass `where` are found. Raises ValueError if `base` was built from
        another store, and for a field that no passage has."""
        if base.corpus != store.fingerprint:
            raise ValueError(f"the lexical index was built from another corpus than {store.path}: it cannot serve it")
        self.base, self.store, self.lag_s, self.where = base, store, lag_s, where
        self._metadata = MetadataColumns(store, 0, stop=base.num_passages)
        empty = build_lexical(base.config, base.corpus, ())
        added = LexicalIndex(base.config, base.corpus, postings=empty.postings, statistics=base.postings)
        self._lock = threading.Lock()
        self._view = _View(-1, added, None, np.empty(0, bool))  # of no version, so that the first look reads all
        self._follow(UNCHANGED)

    @staticmethod
    def open(path: str | Path, store: str | Path, corpus: str | Path, where: Filter | None = None) -> "LiveLexical":
        """Open the lexical index at `path` of a base store, with the changes in the folder `corpus`. Raises as its
        parts do."""
        return LiveLexical(LexicalIndex.load(path), LiveStore.open_with(store, corpus), where=where)

    def search(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> LexicalHits:
        """Return the best `n` passages (0: none) of the corpus at `wanted` (None: at its present state), with the
        scores of passages `of` int64 [batch, m]. Raises CorpusLag if the log does not show that state."""
        view = self._follow(wanted or UNCHANGED)
        state = CorpusState(view.version if wanted is None else wanted.added, view.version)
        scores, ids = np.zeros((len(texts), 0), np.float32), np.zeros((len(texts), 0), np.int64)
        if n:
            scores, ids = self._search(view, texts, n, self.store.log.num_numbers(state.added))
        return LexicalHits(ids, scores, state, None if of is None else self._scores(view, texts, of))

    def _search(self, view: _View, texts: Sequence[str], n: int, numbers: int) -> tuple[np.ndarray, np.ndarray]:
        """Search among the first `numbers` passages."""
        scores, ids = self.base.search(texts, n, view.allowed)
        first = self.base.num_passages
        allowed = view.added_allowed & (np.arange(len(view.added_allowed)) < numbers - first)
        if not allowed.any():
            return scores, ids
        more, places = view.added.search(texts, n, allowed)
        places = np.where(places < 0, -1, places + first)
        return best_first(np.hstack([scores, more]), np.hstack([ids, places]), n)

    def _scores(self, view: _View, texts: Sequence[str], of: np.ndarray) -> np.ndarray:
        first = self.base.num_passages
        found = self.base.scores(texts, np.where(of < first, of, -1))
        if (of >= first).any():
            found += view.added.scores(texts, np.where(of < first, -1, of - first))
        return found

    def _follow(self, wanted: CorpusState) -> _View:
        """Read new changes and return what is searched then."""
        log, needed, deadline = self.store.log, max(wanted.added, wanted.hidden), time.monotonic() + self.lag_s
        while self.store.refresh() or log.version < needed:
            if log.version < needed and time.monotonic() > deadline:
                raise CorpusLag(
                    f"{log.folder} shows version {log.version} of the corpus, and not {needed} after {self.lag_s:g} s, "
                    "which the index serves: it must be the same folder on every machine"
                )
            time.sleep(POLL_S if log.version < needed else 0)
        with self._lock:
            if self._view.version != log.version:
                self._view = self._see(self._view, log.version)
            return self._view

    def _see(self, view: _View, version: int) -> _View:
        """Return what is searched at `version`, in place of an older `view`."""
        log, first = self.store.log, self.base.num_passages
        numbers, deleted = log.num_numbers(version), log.deleted_at(version)
        added, known = view.added, first + view.added.num_passages
        if numbers > known:
            added = added.extended(texts_of(self.store, range(known, numbers)))
        allowed = ~contains(deleted, np.arange(numbers))
        if self.where is not None:
            allowed &= self._metadata.passes(self.where, np.arange(numbers))
        return _View(version, added, None if allowed[:first].all() else allowed[:first], allowed[first:])
