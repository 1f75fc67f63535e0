"""A synthetic world that several test files read."""

import pytest

from indexing.indexing_settings import WorldConfig
from tests.helpers.tiny_world import TinyWorld, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """30 people, 180 passages, 138 training and 36 test questions; to be read, never written to."""
    return make_world(tmp_path_factory.mktemp("tiny"), WorldConfig(num_people=30, num_values=20))
