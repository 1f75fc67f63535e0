"""Shards with replicas: one that is slow, one that dies, one that is held in the middle of a refresh."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray

from cluster.machines.session import Session
from cluster.service.fanout import SearchRefused, Slowness
from cluster.service.search import IndexClient
from indexing.hits import ShardHits
from indexing.indexing_settings import IndexConfig
from tests.cluster.small_corpus import Corpus
from tests.cluster.survival.checker import K, Versions
from tests.cluster.survival.conftest import QUERIES, Victim, answer, start
from tests.cluster.survival.observers import (
    Held,
    actor,
    is_prepared,
    kill,
    process_of,
    serve,
    status_of,
    stopped,
    wait_until,
)

INDEX = IndexConfig(num_shards=2, search_timeout_s=36.0, replicas=2, slow_after_s=1.0, on_slow="hedge")


@pytest.fixture(scope="module")
def pairs(ray_session: Session, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Two shards in two processes each."""
    service = start(corpus, tmp_path_factory.mktemp("replicas"), index=INDEX)
    try:
        yield Victim(service, corpus, serve(service, 1, corpus.weights(1)), Versions(corpus.vectors), False)
    finally:
        service.stop()


def replicas_of(victim: Victim, client: IndexClient, shard: int) -> tuple[str, str]:
    """Names of the replica that this client asks first, and of the other one."""
    first = client._fanout.preferred[shard]
    names = victim.service.address.by_shard()[shard]
    return names[first], names[1 - first]


def with_slowness(victim: Victim, after_s: float, action: str) -> IndexClient:
    """A client of the same service with other settings."""
    client = IndexClient(replace(victim.service.address, slowness=Slowness(after_s, action)))
    client.submit(QUERIES, K).result()
    return client


def test_a_slow_shard_is_hedged(pairs: Victim) -> None:
    """The replica answers, from the same generation; it is counted, told, and asked first from then on."""
    client, generation = with_slowness(pairs, 1.0, "hedge"), answer(pairs)
    told = len(pairs.events("shard_slow"))
    first, other = replicas_of(pairs, client, 0)
    with stopped(process_of(first)):
        begin = time.monotonic()
        hits = client.submit(QUERIES, K).result()
        assert 1.0 <= time.monotonic() - begin < 5.0
        assert hits.generation == generation
        begin = time.monotonic()
        client.submit(QUERIES, K).result()
        assert time.monotonic() - begin < 1.0
        assert replicas_of(pairs, client, 0) == (other, first)
    status = client.status()
    assert (status.slow, status.hedged, status.refused) == (1, 1, 0)
    assert pairs.events("shard_slow")[told]["shard"] == 0
    assert pairs.events("shard_slow")[told]["on_slow"] == "hedge"


def test_a_slow_shard_is_refused(pairs: Victim) -> None:
    """The search ends with an error that names the shard and the setting; later ones are answered again."""
    client = with_slowness(pairs, 0.5, "refuse")
    with stopped(*map(process_of, replicas_of(pairs, client, 1))):
        begin = time.monotonic()
        with pytest.raises(SearchRefused, match=r"0\.5 s \(index\.slow_after_s, index\.on_slow=refuse\).*shard 1"):
            client.submit(QUERIES, K).result()
        assert time.monotonic() - begin < 2.0
    wait_until(lambda: refused_or_none(client) is None, "answer")
    status = client.status()
    assert status.slow >= status.refused >= 1
    assert status.hedged == 0


def refused_or_none(client: IndexClient) -> SearchRefused | None:
    """How one more search ended."""
    try:
        client.submit(QUERIES, K).result()
    except SearchRefused as refused:
        return refused
    return None


def test_a_slow_shard_is_waited_for(pairs: Victim) -> None:
    """And still counted."""
    client = with_slowness(pairs, 0.2, "wait")
    with ThreadPoolExecutor(1) as threads:
        with stopped(process_of(replicas_of(pairs, client, 0)[0])):
            hits = threads.submit(client.submit(QUERIES, K).result)
            wait_until(lambda: client.status().slow, "slow search")
            assert not hits.done()
        assert hits.result(30).generation == answer(pairs)
    status = client.status()
    assert (status.slow, status.hedged, status.refused) == (1, 0, 0)


def test_a_replica_dies_and_nobody_waits(pairs: Victim) -> None:
    """The other one answers at once; the one that comes back has the same generation."""
    client, generation = with_slowness(pairs, 0.0, "wait"), answer(pairs)
    first, other = replicas_of(pairs, client, 0)
    with pairs.checker(bound_s=8.0):
        process = kill(first)
        begin = time.monotonic()
        assert client.submit(QUERIES, K).result().generation == generation
        assert time.monotonic() - begin < 3.0
        wait_until(lambda: process_of(first) != process, "another process")
        wait_until(lambda: status_of(first).committed == status_of(other).committed, "the same generation")
    assert "shard 0, replica" in pairs.events("shard_lost")[-1]["why"]


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_all_replicas_commit_or_none(pairs: Victim, step: str) -> None:
    """One replica is held before it prepares, or before it commits, and another one dies: nothing is mixed, and in the
    end all have the same generation with the same answers."""
    generation, names = answer(pairs), pairs.service.address.by_shard()
    held = Held(names[0][1], step)
    with pairs.checker():
        version = pairs.publish()
        wait_until(held.reached, f"a replica before its {step}")
        if step == "prepare":
            wait_until(lambda: all(is_prepared(name) for name in (names[0][0], *names[1])), "prepared")
            assert all(status_of(name).committed == generation for name in pairs.shards)
        else:
            wait_until(lambda: all(status_of(name).committed > generation for name in names[1]), "commits")
        kill(names[1][0])
        held.release()
        pairs.await_version(version)
        assert answer(pairs) > generation

        wait_until(lambda: len({status_of(name).committed for name in pairs.shards}) == 1, "one generation everywhere")
    newest = status_of(pairs.shards[0]).committed
    for first, second in names:
        one: ShardHits = ray.get(actor(first).search.remote(QUERIES, K, newest, 0), timeout=30)
        two: ShardHits = ray.get(actor(second).search.remote(QUERIES, K, newest, 0), timeout=30)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.scores, two.scores)
