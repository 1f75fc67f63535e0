"""The index service on a real Ray: what it answers. What it survives: `tests/cluster/survival`."""

import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.machines.session import Session
from cluster.planning.placement import Node, PlacementPlan, plan
from cluster.refresh.coordinator import CoordinatorStatus
from cluster.service.search import IndexClient
from cluster.service.start import IndexServiceHandle
from indexing.corpus.snapshot import TornSnapshot
from indexing.corpus.stores.filters import parse_filter
from indexing.dense.exact import recall, search_exactly
from indexing.hits import Hits
from indexing.indexing_settings import IndexConfig
from tests.cluster.services import start_service
from tests.cluster.small_corpus import ENCODER, NUM_PASSAGES, Corpus

INDEX = IndexConfig(num_shards=3, search_timeout_s=60.0)
REFRESH = RefreshConfig(num_workers=1, chunk_passages=40, chunk_timeout_s=60.0)
WAIT_S = 90.0
Launch = Callable[..., IndexServiceHandle]
QUERIES = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)


def placement(index: IndexConfig = INDEX) -> PlacementPlan:
    return plan(ClusterConfig(), REFRESH, index, [Node(4, 0)])


def start(corpus: Corpus, run_dir: Path, **changes: Any) -> IndexServiceHandle:
    settings: dict[str, Any] = {
        "index": INDEX,
        "refresh": REFRESH,
        "placement": placement(),
        "start_timeout_s": 60.0,
    }
    return start_service(corpus, run_dir, **settings | changes)


@pytest.fixture(scope="module")
def service(
    ray_session: Session, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[IndexServiceHandle]:
    """One service for all tests that leave it whole."""
    handle = start(corpus, tmp_path_factory.mktemp("service"))
    yield handle
    handle.stop()


@pytest.fixture
def launch(ray_session: Session, corpus: Corpus, run_dir: Path) -> Iterator[Launch]:
    """Starts services that are stopped when the test ends, however it ends."""
    started: list[IndexServiceHandle] = []

    def launch_one(**changes: Any) -> IndexServiceHandle:
        started.append(start(corpus, run_dir, **changes))
        return started[-1]

    yield launch_one
    for service in started:
        service.stop()


@pytest.fixture
def client(service: IndexServiceHandle, corpus: Corpus) -> IndexClient:
    """A client of a service that serves version 1."""
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    return client


def process_of(name: str) -> int:
    """Process id of an actor that works."""
    actor: Any = ray.get_actor(name, namespace="tests")
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def events(service: IndexServiceHandle, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(service.address.events_path).read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def check(hits: Hits, vectors: dict[int, np.ndarray], queries: np.ndarray = QUERIES) -> None:
    """The hits are those of brute force over the vectors of one version: its own."""
    scores, rows = search_exactly(vectors[hits.weights_version], queries, hits.ids.shape[1])
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(hits.ids, rows)


def test_hits_under_a_filter(client: IndexClient, corpus: Corpus) -> None:
    """Exactly the best that pass; too few are an error, unless fewer are wanted; a filter of all searches."""
    allowed = np.arange(NUM_PASSAGES) % 3 == 1
    where, few = parse_filter({"third": 1}), parse_filter({"number": {"<": 3}})
    scores, rows = search_exactly(corpus.vectors(1), QUERIES, 20, allowed)
    everywhere = IndexClient(replace(client.address, where=where, num_passages=int(allowed.sum())))
    everywhere = pickle.loads(pickle.dumps(everywhere))
    for hits in (client.submit(QUERIES, 20, where=where).result(), everywhere.submit(QUERIES, 20).result()):
        np.testing.assert_array_equal(hits.ids, rows)
        np.testing.assert_allclose(hits.scores, scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"retrieval\.k=4: must be at most 3, the passages that pass the filter"):
        client.submit(QUERIES, 4, where=few).result()
    hits = client.submit(QUERIES, 4, num_vectors=2, where=few, allow_fewer=True).result()
    assert np.sort(hits.ids).tolist() == [[0, 1, 2]] * len(QUERIES)
    with pytest.raises(ValueError, match=rf"must be 1 to {allowed.sum()}"):
        everywhere.submit(QUERIES, int(allowed.sum()) + 1)
    with pytest.raises(ValueError, match=r"retrieval\.where\.lang: no passage has this field"):
        client.submit(QUERIES, 4, where=parse_filter({"lang": "en"})).result()


@pytest.mark.parametrize("k", [1, 7, 150, NUM_PASSAGES])
def test_hits_are_those_of_brute_force(client: IndexClient, corpus: Corpus, k: int) -> None:
    """Also where k is larger than a shard."""
    hits = client.submit(QUERIES, k).result()
    assert hits.ids.shape == (len(QUERIES), k)
    check(hits, {1: corpus.vectors(1)})


@pytest.mark.parametrize("k", [0, NUM_PASSAGES + 1])
def test_k_beyond_the_corpus_is_refused(client: IndexClient, k: int) -> None:
    with pytest.raises(ValueError, match=rf"retrieval\.k={k}: must be 1 to {NUM_PASSAGES}"):
        client.submit(QUERIES, k)


def test_queries_that_the_index_refuses(client: IndexClient) -> None:
    with pytest.raises(ValueError, match="not finite"):
        client.submit(np.full((1, 16), np.nan, np.float32), 3).result()
    with pytest.raises(ValueError, match="shape"):
        client.submit(np.zeros((1, 15), np.float32), 3).result()


def test_some_passages_are_encoded_with_newer_weights(launch: Launch, corpus: Corpus) -> None:
    """Every hit is that of brute force over vectors of two versions, and tells its own."""
    service = launch()
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    only = np.arange(3, NUM_PASSAGES, 7)
    client.publish(2, corpus.weights(2), only)
    client.wait_for_version(2, WAIT_S)
    vectors = corpus.vectors(1)
    vectors[only] = corpus.vectors(2)[only]
    hits = client.submit(QUERIES, NUM_PASSAGES, num_vectors=4).result()
    assert (hits.generation, hits.weights_version) == (2, 2)
    check(hits, {2: vectors})
    assert hits.versions is not None
    assert np.array_equal(hits.versions == 2, np.isin(hits.ids, only))
    assert hits.vectors is not None
    np.testing.assert_allclose(hits.vectors, vectors[hits.ids[:, :4]], rtol=1e-4, atol=1e-5)
    status = client.status()
    assert (status.weights_version, status.oldest) == (2, 1)
    (_, event) = events(service, "refresh_committed")
    assert (event["partial"], event["passages"]) == (True, len(only))
    client.publish(3, corpus.weights(3))
    client.wait_for_version(3, WAIT_S)
    assert client.status().oldest == 3
    check(client.submit(QUERIES, 9).result(), {3: corpus.vectors(3)})


def test_unchanged_weights_give_identical_hits_in_a_new_generation(client: IndexClient, corpus: Corpus) -> None:
    first = client.submit(QUERIES, 20).result()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    second = client.submit(QUERIES, 20).result()
    assert second.generation > first.generation
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_a_large_batch_and_a_client_in_another_process(client: IndexClient, corpus: Corpus) -> None:
    queries = np.random.default_rng(2).normal(size=(3000, 16)).astype(np.float32)
    check(client.submit(queries, 4).result(), {1: corpus.vectors(1)}, queries)
    other = pickle.loads(pickle.dumps(client))
    check(other.submit(QUERIES, 4).result(), {1: corpus.vectors(1)})

    @ray.remote(num_cpus=0)
    def elsewhere(connect: IndexServiceHandle) -> Hits:
        return connect.connect().submit(QUERIES, 4).result()

    service = IndexServiceHandle(client.address, ())
    check(ray.get(elsewhere.remote(service), timeout=60), {1: corpus.vectors(1)})


def test_status_and_publish_return_at_once(client: IndexClient, corpus: Corpus) -> None:
    weights = corpus.weights(2)
    begin = time.monotonic()
    client.publish(2, weights)
    client.status()
    assert time.monotonic() - begin < 1.0
    told: list[int] = []
    client.wait_for_version(2, WAIT_S, lambda encoded, doing: told.append(encoded))
    assert told == sorted(told)
    assert 0 <= told[-1] <= NUM_PASSAGES
    status = client.status()
    assert status.weights_version == 2
    assert status.refresh_seconds > 0
    assert status.refresh_passages_per_s > 0


def test_a_refresh_worker_on_cpu_steps_back(client: IndexClient, service: IndexServiceHandle) -> None:
    """The thread that has encoded is nice, and so are those that torch starts from it."""
    task = Path(f"/proc/{process_of(service.workers[0])}/task")
    assert 10 in [os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in task.iterdir()]


def test_a_version_that_never_comes_is_a_timeout(client: IndexClient) -> None:
    with pytest.raises(TimeoutError, match=r"no index of version 99 after 0\.3 s"):
        client.wait_for_version(99, 0.3)


class SlowClient(IndexClient):
    """Hears of ten passages more each time, and of the generation at last."""

    heard = 0

    def _ask(self, timeout_s: float) -> CoordinatorStatus:
        self.heard += 1
        return CoordinatorStatus(
            generation=7, weights_version=99 if self.heard == 8 else -1, passages_encoded=10 * self.heard
        )


def test_a_wait_is_as_long_as_passages_are_encoded(client: IndexClient) -> None:
    """A first index may take hours: the bound counts from the last passage."""
    slow, told, begin = SlowClient(client.address), list[int](), time.monotonic()
    slow.wait_for_version(99, 0.6, lambda encoded, doing: told.append(encoded))
    assert time.monotonic() - begin > 0.6
    assert told == [0, 10, 20, 30, 40, 50, 60, 70]


def test_weights_of_another_encoder_are_given_up_and_the_old_generation_serves(
    client: IndexClient, service: IndexServiceHandle, corpus: Corpus
) -> None:
    client.publish(5, {"nonsense": np.zeros(3, np.float32)})
    with pytest.raises(RuntimeError, match="not of this encoder"):
        client.wait_for_version(5, WAIT_S)
    check(client.submit(QUERIES, 4).result(), {1: corpus.vectors(1)})
    assert events(service, "refresh_failed")[-1]["given_up"]


def test_coordinator_and_shard_die_before_the_snapshot(launch: Launch, corpus: Corpus, run_dir: Path) -> None:
    """Nobody has the weights any more but the trainer, whose waiting search hands them in again."""
    service = launch()
    (run_dir / "index").rmdir()
    (run_dir / "index").write_text("no snapshot can be written here")
    client = service.connect()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    os.kill(process_of(service.address.shards[1]), signal.SIGKILL)
    os.kill(process_of(service.address.coordinator), signal.SIGKILL)
    check(client.submit(QUERIES, 9).result(), {1: corpus.vectors(1)})
    assert events(service, "refresh_committed")[-1]["generation"] != 1


@pytest.mark.gpu
def test_refresh_on_a_gpu(ray_session: Session, corpus: Corpus, run_dir: Path) -> None:
    """The worker encodes on the GPU; the hits are those of the CPU's vectors."""
    seats = plan(ClusterConfig(trainer_gpus=0.5, refresh_gpus=0.5), REFRESH, INDEX, [Node(4, 1)])
    service = start(corpus, run_dir, placement=seats)
    try:
        client = service.connect()
        client.publish(1, corpus.weights(1))
        client.wait_for_version(1, WAIT_S)
        hits = client.submit(QUERIES, 9).result()
        scores, _ = search_exactly(corpus.vectors(1), QUERIES, 9)
        np.testing.assert_allclose(hits.scores, scores, atol=2e-3)
    finally:
        service.stop()


def test_resume_from_a_snapshot(launch: Launch, corpus: Corpus, run_dir: Path) -> None:
    """The generation that a checkpoint names serves at once, and the numbers go on."""
    service = launch()
    client = service.connect()
    client.publish(10, corpus.weights(1))
    client.wait_for_version(10, WAIT_S)
    first = client.submit(QUERIES, 9).result()
    path = client.save_generation(first.generation, WAIT_S)
    assert Path(path) == run_dir / "index" / f"generation-{first.generation}"
    for _ in range(3):
        client.publish(11, corpus.weights(2))
        client.wait_for_version(11, WAIT_S)
    assert client.save_generation(first.generation, WAIT_S) == path  # protected from pruning
    with pytest.raises(OSError, match="neither on disk nor serving"):
        client.save_generation(77, WAIT_S)
    service.stop()

    again = launch(snapshot=path)
    client = again.connect()
    hits = client.submit(QUERIES, 9).result()
    assert (hits.generation, hits.weights_version) == (first.generation, 10)
    np.testing.assert_array_equal(hits.ids, first.ids)
    np.testing.assert_array_equal(hits.scores, first.scores)
    client.wait_for_version(10, WAIT_S)
    assert client.status().generations_committed == 4
    client.publish(12, corpus.weights(2))
    client.wait_for_version(12, WAIT_S)
    assert client.submit(QUERIES, 9).result().generation == first.generation + 4

    again.stop()
    split = launch(snapshot=path, index=replace(INDEX, num_shards=4), placement=placement(replace(INDEX, num_shards=4)))
    hits = split.connect().submit(QUERIES, 9).result()
    np.testing.assert_array_equal(hits.ids, first.ids)
    np.testing.assert_array_equal(hits.scores, first.scores)
    split.stop()
    with pytest.raises(ValueError, match="another encoder or tokeniser"):
        launch(snapshot=path, encoder=replace(ENCODER, pooling="cls"))
    with pytest.raises(ValueError, match=r"index\.factory=Flat instead of SQfp16"):
        launch(snapshot=path, index=replace(INDEX, factory="SQfp16"))
    damaged = next(Path(path).rglob("*.faiss"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(TornSnapshot, match=damaged.name):
        launch(snapshot=path)


def test_a_compressed_index_under_a_filter_of_all_searches(launch: Launch, corpus: Corpus) -> None:
    """Proposals are scored again, every generation is measured, and its snapshot serves on fewer shards."""
    index = replace(INDEX, factory="PQ8x4", rescore_candidates=60, probe_queries=16)
    where = parse_filter({"third": [0, 2]})
    allowed = np.arange(NUM_PASSAGES) % 3 != 1
    service = launch(index=index, where=where)
    client = service.connect()
    assert client.num_passages == allowed.sum()
    client.publish(1, corpus.weights(1))
    client.wait_for_version(1, WAIT_S)
    expected = search_exactly(corpus.vectors(1), QUERIES, 9, allowed)[1]
    hits = client.submit(QUERIES, 9).result()
    assert allowed[hits.ids].all()
    assert recall(hits.ids, expected) > 0.9
    (committed,) = events(service, "refresh_committed")
    figures = client.status().figures
    assert committed["recall"] == pytest.approx(figures.recall, abs=1e-3)
    assert committed["recall"] > 0.9
    assert committed["bytes_per_passage"] == pytest.approx(4 + 4 * 16 * 16 / (NUM_PASSAGES / 3) + 2 * 16, abs=0.1)
    path = client.save_generation(hits.generation, WAIT_S)
    service.stop()
    fewer = replace(index, num_shards=2)
    again = launch(index=fewer, where=where, snapshot=path, placement=placement(fewer)).connect()
    assert recall(again.submit(QUERIES, 9).result().ids, expected) > 0.9


def test_actors_that_cannot_be_placed_are_a_message_not_a_hang(launch: Launch, corpus: Corpus, run_dir: Path) -> None:
    before = set(ray.util.list_named_actors())
    seat = replace(placement().workers, gpus=64.0)
    with pytest.raises(TimeoutError, match=r"1 of 5 actors.*cluster\.start_timeout_s(.|\n)*refresh worker"):
        launch(placement=replace(placement(), workers=seat), start_timeout_s=10.0)
    wait_until(lambda: set(ray.util.list_named_actors()) <= before, 20)
