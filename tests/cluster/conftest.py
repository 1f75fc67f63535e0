"""One Ray for all tests of this folder; its settings are set before anything imports it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.machines import session

session.set_environment()

from cluster.refresh import coordinator, encode_queue, shards  # noqa: E402
from tests.cluster.fakes import World  # noqa: E402
from tests.cluster.small_corpus import Corpus, make_corpus  # noqa: E402  (imports Ray's users)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[session.Session]:
    """A local Ray, ended at the end."""
    connection = session.start_or_join("tests", log_to_driver=False)
    yield connection
    connection.stop()
    connection.stop()  # harmless


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small store with its tokeniser."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator among fakes tries again at once."""
    monkeypatch.setattr(coordinator, "RETRY_S", 0.0)
    monkeypatch.setattr(encode_queue, "RETRY_S", 0.0)
    monkeypatch.setattr(shards, "POLL_S", 0.01)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Fakes behind the ports of a coordinator."""
    return World(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run writes."""
    return tmp_path / "run"
