"""Settings of every test: one thread, no hub, no W&B server, and where the real data lies."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

DATA = Path(os.environ.get("TANDEM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real corpora; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"waits for real corpora in {DATA} (set TANDEM_DATA)")
    return DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, saying so, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="waits for a CUDA device"))
