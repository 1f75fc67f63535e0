"""The search behind `ask`, in this process: a filter shows what there is, also where that is less than k."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.ask import _search
from cluster.settings import Settings
from indexing.exact import search_exactly
from indexing.settings import IndexConfig
from indexing.store import Store
from tests.cluster.corpus import NUM_PASSAGES, Corpus
from training.settings import RetrievalConfig


def test_ask_searches_among_what_passes(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"generation": -1}))
    store, encoder, vectors = Store.open(corpus.store), corpus.encoder(1), corpus.vectors(1)
    settings = Settings(retrieval=RetrievalConfig(k=5), index=IndexConfig(num_shards=3))
    queries = np.random.default_rng(1).normal(size=(1, 16)).astype(np.float32)
    numbers = np.arange(NUM_PASSAGES)

    def found(where: dict) -> list[int]:
        asked = replace(settings, retrieval=replace(settings.retrieval, where=where))
        with torch.inference_mode():
            return _search(asked, store, encoder, tmp_path, queries).ids[0].tolist()

    for where, allowed in (
        ({}, numbers >= 0),
        ({"third": [0, 2], "number": {">=": 40}}, (numbers % 3 != 1) & (numbers >= 40)),
    ):
        assert found(where) == search_exactly(vectors, queries, 5, allowed)[1][0].tolist()
    assert sorted(found({"number": {"<": 2}})) == [0, 1]
    assert found({"number": 1000}) == []
    with pytest.raises(ValueError, match=r"retrieval\.where\.lang: no passage has this field; .* number, third"):
        found({"lang": "en"})
