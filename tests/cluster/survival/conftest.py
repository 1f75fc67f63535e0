"""One service for all tests that leave it able to go on, and its weights, a version more each time."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.settings import RefreshConfig
from cluster.machines.session import Session
from cluster.service.search import IndexClient
from cluster.service.start import IndexServiceHandle
from indexing.indexing_settings import IndexConfig
from tests.cluster.services import start_service
from tests.cluster.small_corpus import Corpus
from tests.cluster.survival.checker import Checker, K, Versions, events_of, wrong
from tests.cluster.survival.observers import WAIT_S, serve

# hung_s is a quarter of the search timeout; a refresh worker that imports torch again must fit into a chunk's time.
INDEX = IndexConfig(num_shards=3, search_timeout_s=36.0)
REFRESH = RefreshConfig(num_workers=1, chunk_passages=5, chunk_timeout_s=20.0)

BOUND_S = 100.0  # of a search while something dies: an overloaded machine starts a process in half a minute
QUERIES = np.random.default_rng(5).normal(size=(5, 16)).astype(np.float32)


def start(corpus: Corpus, run_dir: Path, **changes: Any) -> IndexServiceHandle:
    """A service with these settings, but for `changes`."""
    settings: dict[str, Any] = {"index": INDEX, "refresh": REFRESH, "start_timeout_s": 90.0}
    return start_service(corpus, run_dir, **settings | changes)


@dataclass
class Victim:
    """A service, a client that publishes to it, and the versions that it may answer with."""

    service: IndexServiceHandle
    corpus: Corpus
    client: IndexClient
    oracle: Versions
    disk_is_small: bool
    versions: Iterator[int] = field(default_factory=lambda: count(2))

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shard actors."""
        return self.service.address.shards

    @property
    def index_folder(self) -> Path:
        """Where the generations lie."""
        return Path(self.service.address.events_path).parent / "index"

    def publish(self) -> int:
        """Hand out the next version; returns it."""
        version = next(self.versions)
        self.client.publish(version, self.corpus.weights(version))
        return version

    def await_version(self, version: int) -> None:
        """Wait until it serves."""
        self.client.wait_for_version(version, WAIT_S)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds so far."""
        return events_of(self.service.address.events_path, *kinds)

    def checker(self, bound_s: float = BOUND_S) -> Checker:
        """A client of its own that searches and checks while a block runs."""
        address = replace(self.service.address, search_timeout_s=bound_s)
        return Checker(IndexClient(address), self.oracle, bound_s)


def answer(victim: Victim) -> int:
    """Search once, check the hits, and return the generation that answered."""
    hits = victim.client.submit(QUERIES, K).result()
    assert not wrong(hits, QUERIES, victim.oracle)
    return hits.generation


@pytest.fixture(scope="package")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bool]]:
    """A run directory whose index lies on a file system of one megabyte, where one can be mounted."""
    run_dir = tmp_path_factory.mktemp("survival")
    folder = run_dir / "index"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    yield run_dir, mounted
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="package")
def victim(ray_session: Session, corpus: Corpus, small_disk: tuple[Path, bool]) -> Iterator[Victim]:
    """Serves version 1 at first; each test leaves it serving some version on every shard."""
    run_dir, mounted = small_disk
    service = start(corpus, run_dir)
    try:
        client = serve(service, 1, corpus.weights(1))
        yield Victim(service, corpus, client, Versions(corpus.vectors), mounted)
    finally:
        service.stop()


@pytest.fixture
def launch(ray_session: Session, corpus: Corpus) -> Iterator[Callable[..., IndexServiceHandle]]:
    """Starts services that are stopped when the test ends, however it ends."""
    started: list[IndexServiceHandle] = []

    def launch_one(run_dir: Path, **changes: Any) -> IndexServiceHandle:
        started.append(start(corpus, run_dir, **changes))
        return started[-1]

    yield launch_one
    for service in started:
        service.stop()
