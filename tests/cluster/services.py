"""A real index service over the small corpus."""

from pathlib import Path
from typing import Any

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.planning.placement import Node, plan
from cluster.service.start import IndexServiceHandle, start_index_service
from indexing.indexing_settings import IndexConfig
from tests.cluster.small_corpus import ENCODER, Corpus


def start_service(
    corpus: Corpus, run_dir: Path, index: IndexConfig, refresh: RefreshConfig, **changes: Any
) -> IndexServiceHandle:
    """An index service over `corpus`, on one machine of four processors, with these settings but for `changes`."""
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "namespace": "tests",
        "store": corpus.store,
        "tokenizer": corpus.tokenizer,
        "encoder": ENCODER,
        "index": index,
        "refresh": refresh,
        "placement": plan(ClusterConfig(), refresh, index, [Node(4, 0)]),
    }
    return start_index_service(**(settings | changes))
