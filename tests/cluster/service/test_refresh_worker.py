"""What a refresh worker computes, in the test's own process."""

import os
from pathlib import Path

import numpy as np
import pytest

from cluster.service.actors import RefreshWorkerActor, WorkerSettings
from tests.cluster.small_corpus import ENCODER, Corpus
from training.engine import engine_setup
from training.models.retriever.encoder import load_passage_weights


def vectors_of(corpus: Corpus, precision: str, folder: Path) -> np.ndarray:
    """Of the first 32 passages at step 7: float32 [32, dim]."""
    settings = WorkerSettings(
        store=str(corpus.store),
        side="retriever",
        encoder=ENCODER,
        tokenizer=str(corpus.tokenizer),
        batch_tokens=4096,
        precision=precision,
        threads=1,
        device="cpu",
        corpus=str(folder),
    )
    worker = RefreshWorkerActor(settings)
    encoder, table, pad = worker._load()
    load_passage_weights(encoder, corpus.weights(7))
    ids, mask = table.padded(np.arange(32), pad)
    return worker._encode(ids, mask)


@pytest.mark.parametrize(("has_products", "rounds"), [(True, True), (False, False)])
def test_products_are_of_bfloat16_only_where_the_processor_has_them(
    has_products: bool, rounds: bool, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_setup, "processor_multiplies_bf16", lambda: has_products)
    monkeypatch.setattr(os, "setpriority", lambda *arguments: None)
    exact, half = vectors_of(corpus, "float32", tmp_path), vectors_of(corpus, "bfloat16", tmp_path)
    assert half.dtype == np.float32
    assert (np.abs(half - exact).max() > 0) == rounds
    np.testing.assert_allclose(half, exact, atol=0.03)
