"""The lexical indexes of one service, by the corpus that each was built from: directories beside one another.

A search names its corpus, so that a process that was started anew answers as the one before it: it maps the directory
that is asked for. The two that were used last stay open: the serving state of the corpus, and the one that comes next
or was before. Every method may be called from any thread; loading takes turns, searching does not.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from indexing.lexical import LexicalHits, LexicalIndex, lexical_name
from indexing.settings import LexicalConfig
from indexing.snapshot import is_complete

OPEN = 2


class LexicalShelf:
    """Searches any of the indexes of `folder` that were built with `config`."""

    def __init__(self, folder: str | Path, config: LexicalConfig) -> None:
        self.folder, self.config = Path(folder), config
        self._open: OrderedDict[str, LexicalIndex] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, corpus: str) -> Path:
        """Where the index of a corpus lies, or would."""
        return self.folder / lexical_name(self.config, corpus)

    def index(self, corpus: str) -> LexicalIndex:
        """The index of the corpus with this fingerprint. Raises ValueError where there is none, TornSnapshot where it
        is damaged."""
        with self._lock:
            found = self._open.get(corpus)
            if found is None:
                if not self.path(corpus).is_dir():
                    raise ValueError(f"{self.folder} has no lexical index of corpus {corpus[:12]}")
                found = self._open[corpus] = LexicalIndex.load(self.path(corpus))
            self._open.move_to_end(corpus)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return found

    def derive(self, base: str, corpus: str, added: Iterable[str], deleted: Sequence[int] | np.ndarray) -> None:
        """Write the index of another state of the corpus, `base` without the passages `deleted` and with `added` texts
        behind its last number, unless it is there. Errors as `index`, and OSError with the path."""
        if not is_complete(self.path(corpus)):
            self.index(base).updated(corpus, added, deleted).save(self.path(corpus))

    def search(
        self,
        texts: Sequence[str],
        n: int,
        corpus: str,
        of: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
    ) -> LexicalHits:
        """The best `n` passages of that corpus (0: none), with the scores of passages `of` int64 [batch, m]. `allowed`
        bool [passages]: True for those that may be found. Errors as `index`."""
        index = self.index(corpus)
        if n:
            scores, ids = index.search(texts, n, allowed)
        else:
            scores, ids = np.zeros((len(texts), 0), np.float32), np.zeros((len(texts), 0), np.int64)
        return LexicalHits(ids, scores, index.corpus, None if of is None else index.scores(texts, of))
