"""A synthetic world that several test files read, and a look at the metrics of every stage that a test runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from indexing.indexing_settings import WorldConfig
from tests.helpers.metric_names import undeclared
from tests.helpers.tiny_world import TinyWorld, make_world

REPORTING = Path(__file__).resolve().parent / "reporting"  # writes metrics of its own invention


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """30 people, 180 passages, 138 training and 36 test questions; to be read, never written to."""
    return make_world(tmp_path_factory.mktemp("tiny"), WorldConfig(num_people=30, num_values=20))


@pytest.fixture(autouse=True)
def _every_metric_is_declared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each key that a stage of this test wrote to metrics.jsonl stands in `training/reporting/metric_keys.py`."""
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None and REPORTING not in request.path.parents:
        assert undeclared(folder) == set()
