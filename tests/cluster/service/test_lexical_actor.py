"""The lexical part of the index service on a real Ray: what it answers, and what it survives."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.machines.session import Session
from cluster.service.lexical_actor import LexicalClient
from cluster.service.search import IndexClient
from cluster.service.start import IndexServiceHandle
from indexing.corpus.snapshot import TornSnapshot, verify
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.passages import Store
from indexing.dense.exact import search_exactly
from indexing.hits import UNCHANGED, Hits
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.lexical import LexicalIndex, build_lexical, lexical_name, write_lexical
from indexing.lexical.rank_fusion import reciprocal_rank_fusion
from indexing.shard.serving import GenerationGone
from tests.cluster.service.test_index_service import INDEX, QUERIES, WAIT_S, events, process_of, start, wait_until
from tests.cluster.small_corpus import NUM_PASSAGES, Corpus
from training.retrieving.hybrid import HybridSearch
from training.training_settings import RetrievalConfig

CONFIG = LexicalConfig(stemmer="", stop_words="")
RETRIEVAL = RetrievalConfig(hybrid="rrf", candidates=30)
NUMBERS = np.arange(len(QUERIES))


@pytest.fixture(scope="module")
def words(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lexical index of the corpus."""
    store = Store.open(corpus.store)
    path = tmp_path_factory.mktemp("lexical") / lexical_name(CONFIG, store.fingerprint)
    write_lexical(CONFIG, store, path)
    return path


@pytest.fixture(scope="module")
def service(
    ray_session: Session, corpus: Corpus, words: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[IndexServiceHandle]:
    """One service for all tests that leave it whole."""
    handle = start(corpus, tmp_path_factory.mktemp("service"), lexical=words)
    yield handle
    handle.stop()


@pytest.fixture
def client(service: IndexServiceHandle, corpus: Corpus) -> IndexClient:
    """A client of a service that serves version 1."""
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    return client


def texts(corpus: Corpus) -> list[str]:
    """Questions: words of passages."""
    store = Store.open(corpus.store)
    return [" ".join(store.passage(7 * int(number)).text.split()[:3]) for number in NUMBERS]


def expected_hits(corpus: Corpus, words: Path, version: int, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Ids of brute force over both indexes, among those that are `allowed`."""
    dense = search_exactly(corpus.vectors(version), QUERIES, RETRIEVAL.candidates, allowed)[1]
    lexical = LexicalIndex.load(words).search(texts(corpus), RETRIEVAL.candidates, allowed)[1]
    return reciprocal_rank_fusion([dense, lexical], RETRIEVAL.rrf_constant, k)[1]


def hybrid(client: IndexClient, corpus: Corpus) -> HybridSearch:
    assert client.lexical is not None
    return HybridSearch(client, client.lexical, text_of=texts(corpus).__getitem__, config=RETRIEVAL)


def lexical_of(client: IndexClient) -> LexicalClient:
    assert client.lexical is not None
    return client.lexical


def test_both_parts_answer_and_the_generation_names_them(
    client: IndexClient, service: IndexServiceHandle, corpus: Corpus, words: Path
) -> None:
    hits = hybrid(client, corpus)(NUMBERS, QUERIES, 6, num_vectors=6).result()
    np.testing.assert_array_equal(hits.ids, expected_hits(corpus, words, 1, 6))
    assert hits.vectors is not None
    np.testing.assert_allclose(hits.vectors, corpus.vectors(1)[hits.ids], rtol=1e-4, atol=1e-6)
    store = Store.open(corpus.store)
    assert hits.corpus == UNCHANGED
    identity = verify(client.save_generation(hits.generation, WAIT_S))
    assert identity["lexical"] == words.name
    assert identity["corpus_fingerprint"] == store.fingerprint == verify(words)["corpus_fingerprint"]


def test_a_filter_holds_for_vectors_and_for_words(
    ray_session: Session, corpus: Corpus, words: Path, tmp_path: Path
) -> None:
    """Brute force over both indexes among the passages that pass, and among them alone."""
    where = parse_filter({"third": 1})
    handle = start(corpus, tmp_path, lexical=words, where=where)
    try:
        client = handle.connect()
        client.publish(1, corpus.weights(1))
        client.wait_for_version(1, WAIT_S)
        passing = np.arange(NUM_PASSAGES) % 3 == 1
        hits = hybrid(client, corpus)(NUMBERS, QUERIES, 6).result()
        np.testing.assert_array_equal(hits.ids, expected_hits(corpus, words, 1, 6, passing))
        assert passing[hits.ids].all()
    finally:
        handle.stop()


def test_scores_of_named_passages(client: IndexClient, corpus: Corpus, words: Path) -> None:
    local, asked = LexicalIndex.load(words), texts(corpus)
    of = np.random.default_rng(0).integers(0, NUM_PASSAGES, (len(asked), 9))
    found = lexical_of(client).submit(asked, 4, of=of).result()
    np.testing.assert_array_equal(found.ids, local.search(asked, 4)[1])
    np.testing.assert_array_equal(found.of, local.scores(asked, of))


def test_what_is_known_of_passages_wherever_they_lie(client: IndexClient, corpus: Corpus) -> None:
    ids = np.array([[0, NUM_PASSAGES - 1, -1], [150, 0, 99]])
    wait_until(lambda: client.status().generation > 0)
    status = client.status()
    found = client.indexed(ids, status.generation)
    expected = np.where(ids[:, :, None] < 0, 0, corpus.vectors(status.weights_version)[ids])
    assert found.vectors is not None
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.versions, np.full(ids.shape, status.weights_version))
    assert client.indexed(ids, status.generation, with_vectors=False).vectors is None
    with pytest.raises(GenerationGone):
        client.indexed(ids, 999)


class HybridSearcher(threading.Thread):
    """Searches without a pause, and checks that each answer is that of one weights version."""

    def __init__(self, client: IndexClient, corpus: Corpus, words: Path, versions: range) -> None:
        super().__init__(daemon=True)
        self.client, self.corpus = client, corpus
        self.expected = {version: expected_hits(corpus, words, version, 6) for version in versions}
        self.stopped, self.error = threading.Event(), None
        self.slowest_s, self.answers = 0.0, 0

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                begin = time.monotonic()
                hits: Hits = hybrid(self.client, self.corpus)(NUMBERS, QUERIES, 6).result()
                self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
                np.testing.assert_array_equal(hits.ids, self.expected[hits.weights_version])
                assert hits.corpus == UNCHANGED
                self.answers += 1
        except Exception as error:
            self.error: Any = error

    def finish(self) -> None:
        self.stopped.set()
        self.join(90)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_kill_9_of_the_lexical_actor_while_searching_and_refreshing(
    client: IndexClient, service: IndexServiceHandle, corpus: Corpus, words: Path
) -> None:
    """Answers come again, bounded."""
    searcher = HybridSearcher(service.connect(), corpus, words, range(1, 4))
    searcher.start()
    for version in (2, 3):
        process = process_of(service.address.lexical)
        client.publish(version, corpus.weights(version))
        os.kill(process, signal.SIGKILL)
        client.wait_for_version(version, WAIT_S)
        seen = searcher.answers
        wait_until(lambda seen=seen: searcher.answers > seen + 2 or searcher.error is not None)
        assert process_of(service.address.lexical) != process
    searcher.finish()
    assert searcher.slowest_s < INDEX.search_timeout_s
    assert events(service, "lexical_lost")


def test_a_silent_actor_is_killed(service: IndexServiceHandle, corpus: Corpus) -> None:
    lexical = LexicalClient(service.address.lexical, "tests", 24.0, service.address.events_path)
    expected = lexical.submit(texts(corpus), 3).result()
    process = process_of(service.address.lexical)
    os.kill(process, signal.SIGSTOP)
    begin = time.monotonic()
    found = lexical.submit(texts(corpus), 3).result()
    assert 5 < time.monotonic() - begin < 24
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert process_of(service.address.lexical) != process
    assert "silent for 6 s" in events(service, "lexical_killed")[-1]["why"]


def test_a_search_without_an_actor_ends(service: IndexServiceHandle, corpus: Corpus) -> None:
    lexical = LexicalClient("no-such-actor", "tests", 1.0, service.address.events_path)
    begin = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"no lexical hits for 1 s \(index.search_timeout_s\): there is no such actor"
    ):
        lexical.submit(texts(corpus), 3).result()
    assert time.monotonic() - begin < 3


def test_a_lexical_index_that_does_not_fit_is_refused(
    corpus: Corpus, words: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Before any actor starts."""
    build_lexical(CONFIG, "other", ["more"]).save(tmp_path / "other")
    with pytest.raises(ValueError, match="was built from another corpus"):
        start(corpus, run_dir, lexical=tmp_path / "other")
    (tmp_path / "other" / "weights").unlink()
    with pytest.raises(TornSnapshot, match="weights is missing"):
        start(corpus, run_dir, lexical=tmp_path / "other")
    started = run_dir / "events.jsonl"
    assert not started.exists() or not [json.loads(line) for line in started.read_text().splitlines()]
