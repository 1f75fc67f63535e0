"""A corpus that is changed while it is served, and what a search must find in it.

One thread changes it; others ask what must be found. A passage is sure to be found in every generation from the one
that served when its change was served, until somebody begins to delete it; it is gone when the deletion is served. In
between it may be found or not.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.prepare.corpus_changes import wait_until_served
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.dense.encode import encode_numbers
from tests.cluster.small_corpus import ENCODER, NUM_PASSAGES, Corpus
from training.models.text.token_rows import retriever_passage_side
from training.models.text.tokenizers import load_tokenizer


class LiveOracle:
    """An `Oracle` (`checker.py`) over the corpus in `run_dir`, and the one who changes it."""

    def __init__(self, corpus: Corpus, run_dir: Path) -> None:
        self.folder = run_dir / "corpus"
        self.num_added = 0
        self._corpus = corpus
        self._side = retriever_passage_side(load_tokenizer(corpus.tokenizer), ENCODER)
        self._store = LiveStore.open_with(corpus.store, self.folder)  # of the thread that changes
        self._read = LiveStore.open_with(corpus.store, self.folder)  # of those that ask
        self._lock = threading.Lock()
        self._since = np.zeros(NUM_PASSAGES, np.int64)  # by number: the generation from which it is found
        self._doomed = np.zeros(NUM_PASSAGES, bool)
        self._gone = np.empty(0, np.int64)
        self._encoders: dict[int, Any] = {}
        self._vectors: dict[int, np.ndarray] = {}

    def gone(self) -> np.ndarray:
        with self._lock:
            return self._gone

    def found_in(self, generation: int) -> np.ndarray:
        with self._lock:
            return np.flatnonzero((self._since <= generation) & ~self._doomed)

    def vectors(self, weights_version: int, num_numbers: int = 0) -> np.ndarray:
        with self._lock:
            wanted = max(num_numbers, len(self._since))
            known = self._vectors.get(weights_version, np.empty((0, 16), np.float32))
            if len(known) < wanted:
                new = self._encode(weights_version, np.arange(len(known), wanted))
                self._vectors[weights_version] = known = np.concatenate([known, new])
            return known

    def add(self, texts: list[str], timeout_s: float) -> None:
        """Add passages, and wait until they are served."""
        first = self.num_added
        self.num_added += len(texts)
        put = [Passage(f"new{first + number}", "", text) for number, text in enumerate(texts)]
        change = change_corpus(self._store, Wanted(put=put), sides=[self._side])
        served = wait_until_served(self.folder, change.version, timeout_s)
        with self._lock:  # changes come one at a time, so that the numbers are the next ones
            assert change.first == len(self._since)
            self._since = np.append(self._since, np.full(len(texts), served["generation"]))
            self._doomed = np.append(self._doomed, np.zeros(len(texts), bool))

    def delete(self, numbers: list[int], timeout_s: float) -> None:
        """Delete passages, and wait until they are gone."""
        with self._lock:
            self._doomed[numbers] = True
        change = change_corpus(self._store, Wanted(delete=self._store.ids(numbers)), sides=[])
        wait_until_served(self.folder, change.version, timeout_s)
        with self._lock:
            self._gone = np.append(self._gone, np.array(numbers, np.int64))

    def living(self) -> list[int]:
        """Numbers that could be deleted."""
        with self._lock:
            return np.flatnonzero(~self._doomed).tolist()

    def _encode(self, weights_version: int, numbers: np.ndarray) -> np.ndarray:
        """float32 [numbers, dim]. Call with the lock held."""
        if weights_version not in self._encoders:
            self._encoders[weights_version] = self._corpus.encoder(weights_version)
        encoder, table = self._encoders[weights_version], self._read.tokens("retriever")
        self._read.refresh()

        def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

        return encode_numbers(table, numbers, encode=encode, batch_tokens=4096)
