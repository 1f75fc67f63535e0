"""Words and vectors of a corpus that changes, on a real Ray: one state of it in every answer, kill -9 in between."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from cluster.machines.session import Session
from cluster.service.search import IndexClient
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.live_store import Wanted, change_corpus
from indexing.corpus.stores.passages import Store
from indexing.dense.exact import search_exactly
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.lexical import lexical_name, write_lexical
from indexing.lexical.rank_fusion import reciprocal_rank_fusion
from tests.cluster.service.test_index_service import INDEX, QUERIES, WAIT_S, process_of, start, wait_until
from tests.cluster.service.test_live_service import Living
from tests.cluster.small_corpus import Corpus
from tests.indexing.lexical.test_live_lexical import bm25
from training.retrieving.hybrid import HybridSearch
from training.training_settings import RetrievalConfig

CONFIG = LexicalConfig(stemmer="", stop_words="")
RETRIEVAL = RetrievalConfig(hybrid="rrf", candidates=40)
NUMBERS = np.arange(len(QUERIES))
K = 8
pytestmark = pytest.mark.timeout(280)


class Both(Living):
    """A corpus that changes, and what brute force over words and vectors finds in it."""

    def __init__(self, corpus: Corpus, run_dir: Path, questions: list[str]) -> None:
        super().__init__(corpus, run_dir)
        self.questions = questions

    def texts(self) -> list[str]:
        """Of all numbers."""
        passages = [self.store.passage(number) for number in range(len(self.store))]
        return [f"{passage.title} {passage.text}" for passage in passages]

    def check_both(self, client: IndexClient, weights_version: int) -> None:
        """A client that has heard of the newest generation answers as brute force over the living passages."""
        search = search_of(client, self)
        search(NUMBERS, QUERIES, K).result()
        hits = search(NUMBERS, QUERIES, K).result()
        texts, numbers = self.texts(), np.arange(len(self.store))
        living = numbers[self.store.is_living(numbers)]
        dense = living[search_exactly(self.vectors(weights_version)[living], QUERIES, RETRIEVAL.candidates)[1]]
        base = texts[: self.store.num_base]
        words = np.stack([bm25(base, texts, question) for question in self.questions]).astype(np.float32)[:, living]
        order = np.argsort(-words, axis=1, kind="stable")[:, : RETRIEVAL.candidates]
        lexical = np.where(np.take_along_axis(words, order, axis=1) > 0, living[order], -1)
        expected = reciprocal_rank_fusion([dense, lexical], RETRIEVAL.rrf_constant, K)[1]
        np.testing.assert_array_equal(hits.ids, expected)
        assert (
            hits.corpus.added == self.store.log.version
            or not self.store.log.added_between(hits.corpus.added, self.store.log.version).size
        )
        assert hits.corpus.hidden == self.store.log.version
        assert hits.lexical is not None
        np.testing.assert_array_equal(hits.lexical, np.where(lexical_places(hits.ids, lexical), hits.lexical, 0))


def lexical_places(ids: np.ndarray, lexical: np.ndarray) -> np.ndarray:
    return (ids[:, :, None] == lexical[:, None, :]).any(axis=2)


def search_of(client: IndexClient, both: Both) -> HybridSearch:
    assert client.lexical is not None
    living = both.store.is_living
    return HybridSearch(client, client.lexical, text_of=both.questions.__getitem__, config=RETRIEVAL, is_living=living)


class Searcher(threading.Thread):
    """Searches without a pause. What was deleted before a search began is not in its answer, nor is anything that came
    after the state which the answer names."""

    def __init__(self, client: IndexClient, both: Both) -> None:
        super().__init__(daemon=True)
        self.client, self.both, self.gone = client, both, set[int]()
        self.stopped, self.answers, self.error = threading.Event(), 0, None

    def run(self) -> None:
        try:
            search, log = search_of(self.client, self.both), self.both.store.log
            while not self.stopped.is_set():
                gone = set(self.gone)
                hits = search(NUMBERS, QUERIES, K).result()
                found = set(hits.ids.ravel().tolist())
                assert not found & gone
                assert max(found) < log.num_numbers(hits.corpus.added)
                assert min(found) >= 0
                assert not np.isin(hits.ids, log.deleted_at(hits.corpus.hidden)).any()
                self.answers += 1
        except Exception as error:
            self.error: Exception | None = error

    def finish(self) -> None:
        self.stopped.set()
        self.join(90)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        assert self.answers > 5


def test_words_follow_the_changes_of_the_corpus(ray_session: Session, corpus: Corpus, run_dir: Path) -> None:
    base = Store.open(corpus.store)
    words = write_lexical(CONFIG, base, run_dir / lexical_name(CONFIG, base.fingerprint))
    questions = [" ".join(base.passage(7 * int(number)).text.split()[:3]) for number in NUMBERS]
    service = start(corpus, run_dir, lexical=run_dir / lexical_name(CONFIG, base.fingerprint))
    try:
        client, both = service.connect(), Both(corpus, run_dir, questions)
        client.publish(1, corpus.weights(1))
        client.wait_for_version(1, WAIT_S)
        both.check_both(client, 1)
        searcher = Searcher(service.connect(), both)
        searcher.start()

        # Added: found by its words, beside everything else.
        first = len(both.store)
        both.change(put=[Passage(f"new-{number}", "", question) for number, question in enumerate(questions)])
        both.check_both(client, 1)
        assert client.lexical is not None
        found = client.lexical.submit(questions, 20).result().ids
        assert all(first + number in row for number, row in enumerate(found))

        # Deleted: in no answer from the moment on at which the command has returned, found by words or by vectors.
        best = words.search(questions, 2)[1]
        both.change(delete=[base.passage(int(number)).id for number in np.unique(best[best >= 0])])
        searcher.gone |= set(best[best >= 0].tolist())
        both.check_both(client, 1)

        # Updated: under the new text's words, and no more under the old ones'.
        both.change(put=[Passage("new-0", "", questions[1])], mode="update")
        searcher.gone.add(first)
        both.check_both(client, 1)

        # The actor dies: the next one has read the log before it answers.
        process = process_of(service.address.lexical)
        os.kill(process, signal.SIGKILL)
        both.change(put=[Passage("late", "", questions[2])], delete=["new-3"])
        searcher.gone.add(first + 3)
        both.check_both(client, 1)
        assert process_of(service.address.lexical) != process

        # A whole refresh beside a change.
        client.publish(2, corpus.weights(2))
        both.change(put=[Passage("later", "", questions[4])], delete=["late"])
        client.wait_for_version(2, WAIT_S)
        both.check_both(client, 2)
        seen = searcher.answers
        wait_until(lambda: searcher.answers > seen + 2 or searcher.error is not None)
        searcher.finish()

        # Started again from the snapshot, after a change that nobody served.
        status = client._ask(10.0)
        assert status is not None
        path = client.save_generation(status.generation, WAIT_S)
        service.stop()
        change_corpus(both.store, Wanted(put=[Passage("last", "", questions[3])], delete=["later"]), sides=[both.side])
        service = start(corpus, run_dir, lexical=run_dir / lexical_name(CONFIG, base.fingerprint), snapshot=path)
        client = service.connect()
        wait_until(lambda: (s := client._ask(10.0)) is not None and s.corpus_version == both.store.log.version)
        both.check_both(client, 2)
        assert INDEX.num_shards > 1
    finally:
        service.stop()
