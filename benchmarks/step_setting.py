"""What `benchmarks/step.py` measures on: models, corpus, stores and a real index service."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from cluster.machines import session
from cluster.machines.allocator import keeping_freed_memory

NOT_YET = keeping_freed_memory()  # of what a process reads when it starts
session.set_environment()

from cluster.config.settings import ClusterConfig, RefreshConfig, Settings  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.prepare.stores import Prepared, prepare_data, prepare_tokenizers  # noqa: E402
from cluster.service.search import IndexClient  # noqa: E402
from cluster.service.start import start_index_service  # noqa: E402
from indexing.indexing_settings import CorpusConfig, IndexConfig, QuestionsConfig  # noqa: E402
from training.models.build import build_system  # noqa: E402
from training.models.parts.weights import to_numpy  # noqa: E402
from training.models.retriever.encoder import passage_state  # noqa: E402
from training.models.system import System  # noqa: E402
from training.models.text.tokenizers import end_id, load_tokenizer, pad_id  # noqa: E402
from training.training_settings import (  # noqa: E402
    EncoderConfig,
    FreshEncoderConfig,
    FreshGeneratorConfig,
    GeneratorConfig,
    TokenizerConfig,
)

LAYERS, HIDDEN, HEADS = 4, 256, 4
MAX_TOKENS, VOCABULARY = 200, 12_000
NAMESPACE = "benchmark"
LIKE_ENCODER = "like encoder"
READERS = {"T5": "8 heads of 64, feed-forward 2048", LIKE_ENCODER: "4 heads of 64, feed-forward 1024"}


def start_as_trainer() -> None:
    """Start this command again with a CPU trainer's environment, which a process reads when it starts."""
    if NOT_YET:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **NOT_YET})


def make_settings(corpus: Path, root: Path, reader: str) -> Settings:
    """Sections that matter here. Every reader's data lies in `root / reader`, tokenised by one tokeniser."""
    settings = Settings(
        corpus=CorpusConfig(path=str(corpus)),
        questions=QuestionsConfig(path=str(corpus)),
        encoder=EncoderConfig(
            fresh=FreshEncoderConfig(num_layers=LAYERS, hidden=HIDDEN, num_heads=HEADS, intermediate=4 * HIDDEN),
            tokenizer=TokenizerConfig(vocabulary=VOCABULARY),
            max_passage_tokens=MAX_TOKENS,
        ),
        generator=GeneratorConfig(
            kind="fusion",
            fresh=FreshGeneratorConfig(
                num_encoder_layers=LAYERS,
                num_decoder_layers=LAYERS,
                hidden=HIDDEN,
                num_heads=HEADS,
                intermediate=4 * HIDDEN,
            ),
            max_passage_tokens=MAX_TOKENS,
        ),
    )
    tokenizer = prepare_tokenizers(settings, root / LIKE_ENCODER, quiet).retriever
    if reader == LIKE_ENCODER:
        return settings
    shutil.copytree(root / LIKE_ENCODER / "tokenizers" / "retriever", root / reader / "tokenizers" / "retriever")
    checkpoint = write_t5(root / "checkpoint", tokenizer)
    return replace(settings, generator=replace(settings.generator, name=str(checkpoint)))


def prepare(settings: Settings, root: Path) -> Prepared:
    """Stores of the passages and of the training questions."""
    return prepare_data(settings, root, quiet, splits=["train"])


def build(settings: Settings, prepared: Prepared) -> System:
    """The system, the same every time."""
    folder = prepared.tokenizers
    tokenizers = load_tokenizer(folder / "retriever"), load_tokenizer(folder / "generator")
    return build_system(settings.encoder, settings.generator, train="both", tokenizers=tokenizers, seed=0)


def write_t5(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of random weights, as a user would bring one."""
    torch.manual_seed(0)
    pad = pad_id(tokenizer)
    ids: dict[str, Any] = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": end_id(tokenizer)}
    shape = T5Config(d_model=HIDDEN, num_layers=LAYERS, vocab_size=len(tokenizer), dropout_rate=0.0, **ids)
    T5ForConditionalGeneration(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_random_corpus(folder: Path) -> Path:
    """Words with lengths as in encyclopaedic paragraphs, and questions about them."""
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice(list("abcdefghijklmnop"), 5)) for _ in range(4000)]
    texts = [" ".join(chance.choice(words, int(n))) for n in np.clip(chance.gamma(12, 8, 1500), 20, 180)]
    (folder / "qrels").mkdir(parents=True)
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries-train.jsonl").open("w") as queries,
        (folder / "qrels" / "train.tsv").open("w") as qrels,
    ):
        print("query-id\tcorpus-id\tscore", file=qrels)
        for number, text in enumerate(texts):
            answer = " ".join(text.split()[4:6])
            question = {"_id": f"q{number}", "text": text[:60], "answers": [answer]}
            print(json.dumps({"_id": f"p{number}", "title": text[:11], "text": text}), file=corpus)
            print(json.dumps(question), file=queries)
            print(f"q{number}\tp{number}\t1", file=qrels)
    return folder


@contextmanager
def index_service(settings: Settings, prepared: Prepared, root: Path) -> Iterator[IndexClient]:
    """Two shards and a refresh worker on this machine's Ray, serving the vectors of the untrained encoder."""
    connection = session.start_or_join(NAMESPACE, log_to_driver=False)
    refresh, index = RefreshConfig(), IndexConfig(num_shards=2)
    service = None
    try:
        service = start_index_service(
            run_dir=root / "run",
            namespace=NAMESPACE,
            store=prepared.passages,
            tokenizer=prepared.tokenizers / "retriever",
            encoder=settings.encoder,
            index=index,
            refresh=refresh,
            placement=plan(ClusterConfig(), refresh, index, nodes_of_cluster()),
        )
        client = service.connect()
        client.publish(0, to_numpy(passage_state(build(settings, prepared).retriever)))
        client.wait_for_version(0, 600.0)
        yield client
    finally:
        if service is not None:
            service.stop()
        connection.stop()


def quiet(_: str) -> None:
    """Preparing says nothing."""
