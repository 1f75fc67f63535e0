"""The search behind `ask`, in this process: a filter shows what there is, also where that is less than k, and a saved
index is brought up to the corpus as it is now."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.commands.loaded_run import encode_function
from cluster.commands.local_search import OneGeneration
from cluster.config.settings import Settings
from indexing.corpus.files.corpus import Passage
from indexing.corpus.snapshot import write_once
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.dense.encode import encode_numbers
from indexing.dense.exact import search_exactly
from indexing.hits import Hits
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard, shard_ranges
from tests.cluster.small_corpus import ENCODER, NUM_PASSAGES, Corpus
from training.models.text.token_rows import retriever_passage_side
from training.models.text.tokenizers import load_tokenizer
from training.training_settings import RetrievalConfig


def search(
    settings: Settings, store: LiveStore, encoder: torch.nn.Module, checkpoint: Path, queries: np.ndarray
) -> Hits:
    index = OneGeneration(
        settings, store, checkpoint=checkpoint, encode=encode_function(cast(Any, encoder)), lexical=None
    )
    return index.submit(queries, min(settings.retrieval.k, index.num_passages)).result()


def test_ask_searches_among_what_passes(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"generation": -1}))
    store = LiveStore.open_with(corpus.store, tmp_path / "corpus")
    encoder, vectors = corpus.encoder(1), corpus.vectors(1)
    settings = Settings(retrieval=RetrievalConfig(k=5), index=IndexConfig(num_shards=3))
    queries = np.random.default_rng(1).normal(size=(1, 16)).astype(np.float32)
    numbers = np.arange(NUM_PASSAGES)

    def found(where: dict) -> list[int]:
        asked = replace(settings, retrieval=replace(settings.retrieval, where=where))
        with torch.inference_mode():
            return search(asked, store, encoder, tmp_path, queries).ids[0].tolist()

    for where, allowed in (
        ({}, numbers >= 0),
        ({"third": [0, 2], "number": {">=": 40}}, (numbers % 3 != 1) & (numbers >= 40)),
    ):
        assert found(where) == search_exactly(vectors, queries, 5, allowed)[1][0].tolist()
    assert sorted(found({"number": {"<": 2}})) == [0, 1]
    with pytest.raises(ValueError, match=r"no passage passes the filter retrieval\.where="):
        found({"number": 1000})
    with pytest.raises(ValueError, match=r"retrieval\.where\.lang: no passage has this field; .* number, third"):
        found({"lang": "en"})


def test_a_saved_index_serves_a_changed_corpus_under_a_filter(corpus: Corpus, tmp_path: Path) -> None:
    """Saved on two shards, asked on three; only what was added is encoded."""
    checkpoint, index = tmp_path / "checkpoints" / "step-9", tmp_path / "index" / "generation-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"generation": 4}))
    encoder, config = corpus.encoder(1), IndexConfig(num_shards=2)
    vectors = corpus.vectors(1)
    with write_once(index, {}) as folder:
        for number, (start, stop) in enumerate(shard_ranges(NUM_PASSAGES, 2)):
            shard = Shard(number, start, stop=stop, config=config)
            shard.stage(4, 9, start, vectors[start:stop])
            shard.prepare(4)
            shard.commit(4)
            shard.save(4, folder)
    store = LiveStore.open_with(corpus.store, tmp_path / "corpus")
    put = [Passage(f"new{n}", "", f"abcd {n}", {"third": n % 3, "origin": "live"}) for n in range(7)]
    side = retriever_passage_side(load_tokenizer(corpus.tokenizer), ENCODER)
    change_corpus(store, Wanted(put=put, delete=["p0", "p3", "p8"]), sides=[side])
    change_corpus(store, Wanted(delete=["new3"]), sides=[])
    numbers = np.arange(len(store))
    encoded: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            encoded.append(len(ids))
            return encoder(ids, mask)

    with torch.inference_mode():
        now = encode_numbers(store.tokens("retriever"), numbers, encode=encode_function(encoder), batch_tokens=4096)
        queries = now[[NUM_PASSAGES + 1]]
        for where in ({}, {"third": 0}, {"origin": "live"}):
            passing = np.array([all(store.metadata(int(n)).get(f) == v for f, v in where.items()) for n in numbers])
            allowed = passing & store.is_living(numbers)
            settings = Settings(retrieval=RetrievalConfig(k=6, where=where), index=IndexConfig(num_shards=3))
            encoded.clear()
            hits = search(settings, store, Counting(), checkpoint, queries)
            assert hits.ids.tolist() == search_exactly(now, queries, 6, allowed)[1].tolist()
            assert sum(encoded) == 6
