"""A corpus that changes under a real index service on a real Ray, searched without a pause, with kill -9 in between."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayError

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.machines.session import Session
from cluster.planning.placement import Node, plan
from cluster.prepare.corpus_changes import wait_until_served
from cluster.service.search import IndexClient
from cluster.service.start import IndexServiceHandle, start_index_service
from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.dense.encode import encode_numbers
from indexing.dense.exact import search_exactly
from indexing.indexing_settings import IndexConfig
from tests.cluster.small_corpus import ENCODER, NUM_PASSAGES, Corpus
from training.models.text.token_rows import retriever_passage_side
from training.models.text.tokenizers import load_tokenizer

INDEX = IndexConfig(num_shards=2, search_timeout_s=60.0)
REFRESH = RefreshConfig(num_workers=1, chunk_passages=40, chunk_timeout_s=60.0)
WAIT_S = 90.0
QUERIES = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
pytestmark = pytest.mark.timeout(280)


class Living:
    """The corpus as another process changes it, and what brute force finds in it."""

    def __init__(self, corpus: Corpus, run_dir: Path) -> None:
        self.corpus, self.folder = corpus, run_dir / "corpus"
        self.store = LiveStore.open_with(corpus.store, self.folder)
        self.side = retriever_passage_side(load_tokenizer(corpus.tokenizer), ENCODER)
        self._vectors: dict[int, np.ndarray] = {}

    def change(self, **wanted: Any) -> int:
        """Make a change and wait until it is served; the version."""
        version = change_corpus(self.store, Wanted(**wanted), sides=[self.side]).version
        assert wait_until_served(self.folder, version, WAIT_S)["version"] >= version
        return version

    def vectors(self, weights_version: int) -> np.ndarray:
        """All numbers by that tower: float32 [numbers, dim]."""
        known = self._vectors.get(weights_version)
        if known is None or len(known) < len(self.store):
            encoder = self.corpus.encoder(weights_version)
            self._vectors[weights_version] = known = encode_with(encoder, self.store)
        return known

    def check(self, client: IndexClient, weights_version: int, k: int = 9) -> None:
        """A client finds what brute force over the living passages does, as soon as it has heard of the newest
        generation."""
        client.submit(QUERIES, k).result()
        hits = client.submit(QUERIES, k).result()
        numbers = np.arange(len(self.store))
        living = numbers[self.store.is_living(numbers)]
        scores, rows = search_exactly(self.vectors(weights_version)[living], QUERIES, k)
        assert hits.weights_version == weights_version
        np.testing.assert_allclose(hits.scores, scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(hits.ids, living[rows])


def encode_with(encoder: Any, store: LiveStore) -> np.ndarray:
    import torch

    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return encode_numbers(store.tokens("retriever"), np.arange(len(store)), encode=encode, batch_tokens=4096)


class Searcher(threading.Thread):
    """Searches everything without a pause; what was deleted before a search began must not be found by it."""

    def __init__(self, client: IndexClient) -> None:
        super().__init__(daemon=True)
        self.client, self.stopped, self.gone = client, threading.Event(), set[int]()
        self.found: list[set[int]] = []
        self.answered = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                gone = set(self.gone)
                ids = self.client.submit(QUERIES, 60).result().ids
                self.found += [set(ids.ravel().tolist()) & gone] if gone else []
                self.answered += 1
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        self.stopped.set()
        self.join(90)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        assert self.answered > 5
        assert not set().union(*self.found)


@pytest.fixture
def launch(ray_session: Session, corpus: Corpus, run_dir: Path) -> Iterator[Callable[..., IndexServiceHandle]]:
    started: list[IndexServiceHandle] = []

    def launch_one(**changes: Any) -> IndexServiceHandle:
        seats = plan(ClusterConfig(), REFRESH, INDEX, [Node(4, 0)])
        settings: dict[str, Any] = {"run_dir": run_dir, "namespace": "tests", "store": corpus.store}
        settings |= {"tokenizer": corpus.tokenizer, "encoder": ENCODER, "index": INDEX, "refresh": REFRESH}
        settings |= {"placement": seats, "start_timeout_s": 60.0}
        started.append(start_index_service(**(settings | changes)))
        return started[-1]

    yield launch_one
    for service in started:
        service.stop()


def kill(name: str) -> None:
    """SIGKILL an actor's process; returns when another one answers."""
    actor: Any = ray.get_actor(name, namespace="tests")
    process: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            if ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60) != process:
                return
        except RayError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def new(number: int, text: str) -> Passage:
    return Passage(f"new-{number}", "", text)


def test_changes_while_searching_with_deaths_in_between(
    launch: Callable[..., IndexServiceHandle], corpus: Corpus, run_dir: Path
) -> None:
    service = launch()
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    living, searcher = Living(corpus, run_dir), Searcher(service.connect())
    searcher.start()
    text = living.store.passage(7).text

    # Added, deleted, updated: each is served when the command returns, and nothing but what is new was encoded.
    encoded = client._ask(10.0)
    living.change(put=[new(number, text[: 10 + number]) for number in range(5)])
    living.check(client, 1)
    assert client.num_passages == NUM_PASSAGES + 5
    after = client._ask(10.0)
    assert encoded is not None
    assert after is not None
    assert after.passages_encoded - encoded.passages_encoded == 5
    best = client.submit(QUERIES, 3).result().ids.ravel()
    ids = [living.store.passage(int(number)).id for number in np.unique(best)]
    living.change(delete=ids)
    searcher.gone |= set(best.tolist())
    living.check(client, 1)
    living.change(put=[Passage("p7", "t", f"{text} {text}")], mode="update")
    searcher.gone.add(7)
    living.check(client, 1)

    # A shard dies: it comes back with what was added, and without what was deleted.
    client.save_generation(client._ask(10.0).generation, WAIT_S)  # pyright: ignore[reportOptionalMemberAccess]
    kill(service.address.shards[0])
    living.check(client, 1)

    # The coordinator dies before a change, which the next one follows with the weights of the snapshot.
    kill(service.address.coordinator)
    living.change(put=[new(10, text)], delete=["p8"])
    searcher.gone.add(8)
    living.check(client, 1)

    # A whole refresh while the corpus changes.
    client.publish(2, corpus.weights(2))
    living.change(put=[new(11, text[::2])], delete=["new-10", "p9"])
    searcher.gone.add(9)
    client.wait_for_version(2, WAIT_S)
    living.check(client, 2)
    client.publish(3, corpus.weights(3))
    client.wait_for_version(3, WAIT_S)
    living.check(client, 3)
    searcher.finish()

    # Stopped, changed while nobody runs, and started again from the snapshot: only what is new is encoded.
    status = client._ask(10.0)
    assert status is not None
    path = client.save_generation(status.generation, WAIT_S)
    service.stop()
    change_corpus(living.store, Wanted(put=[new(12, text[1:])], delete=["new-11", "p10"]), sides=[living.side])
    again = launch(snapshot=path)
    client = again.connect()
    wait_until_served(living.folder, living.store.log.version, WAIT_S)
    living.check(client, 3)
    assert [row["passages"] for row in events(run_dir, "derive_started")][-1] == 1


def test_a_filter_of_all_searches_sees_changes_also_on_another_number_of_shards(
    launch: Callable[..., IndexServiceHandle], corpus: Corpus, run_dir: Path
) -> None:
    where = parse_filter({"third": 0})
    assert where is not None
    service = launch(where=where)
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    living = Living(corpus, run_dir)
    text = living.store.passage(5).text

    def check(client: IndexClient) -> None:
        client.submit(QUERIES, 9).result()
        hits = client.submit(QUERIES, 9).result()
        numbers = np.arange(len(living.store))
        passing = np.array([where.passes(living.store.metadata(int(number))) for number in numbers])
        allowed = passing & living.store.is_living(numbers)
        np.testing.assert_array_equal(hits.ids, search_exactly(living.vectors(1), QUERIES, 9, allowed)[1])
        assert client.num_passages == allowed.sum()
        every = client.submit(QUERIES, 9, where=parse_filter({"third": [0, 1, 2]})).result().ids
        assert not passing[every].all()
        assert client.num_passages == allowed.sum()  # another search's filter does not count

    check(client)
    put = [Passage(f"new-{n}", "", text[n:], {"third": n % 3}) for n in range(7)]
    living.change(put=put, delete=["p0", "p3", "p4"])
    check(client)
    assert client._ask(10.0).figures.recall == 1.0  # pyright: ignore[reportOptionalMemberAccess]
    path = client.save_generation(client.submit(QUERIES, 1).result().generation, WAIT_S)
    service.stop()

    index = replace(INDEX, num_shards=3)
    placement = plan(ClusterConfig(), REFRESH, index, [Node(4, 0)])
    again = launch(snapshot=path, where=where, index=index, placement=placement).connect()
    check(again)
    more = [Passage(f"more-{n}", "", text[n:] + text, {"third": 0}) for n in range(4)]
    living.change(put=more, delete=["new-0", "p6"])
    check(again)
