"""A small corpus with a tokeniser and a tower, and what an index over it must answer."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.passages import Store, write_store
from indexing.dense.encode import encode_range
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import TextEncoder, build_encoder
from training.models.text.token_rows import retriever_passage_side
from training.models.text.tokenizers import build_tokenizer, load_tokenizer
from training.training_settings import EncoderConfig, FreshEncoderConfig, TokenizerConfig

NUM_PASSAGES = 301
SEEDING = threading.Lock()  # torch's generator belongs to all threads
ENCODER = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32),
    tokenizer=TokenizerConfig(vocabulary=120),
    max_passage_tokens=16,
    max_title_tokens=4,
)


@dataclass(frozen=True)
class Corpus:
    """Where the store and the tokeniser lie."""

    store: Path
    tokenizer: Path

    def encoder(self, version: int) -> TextEncoder:
        """The tower as it is at optimiser step `version`."""
        with SEEDING:
            torch.manual_seed(version)
            return build_encoder(ENCODER, len(load_tokenizer(self.tokenizer))).eval()

    def weights(self, version: int) -> dict[str, np.ndarray]:
        """What the trainer publishes at that step."""
        return to_numpy(self.encoder(version).state_dict())

    def vectors(self, version: int) -> np.ndarray:
        """All passages by that tower: float32 [NUM_PASSAGES, dim]."""
        encoder, table = self.encoder(version), Store.open(self.store).tokens("retriever")

        def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

        return encode_range(table, 0, stop=len(table), encode=encode, batch_tokens=4096)


def make_corpus(folder: Path) -> Corpus:
    """Passages of random words."""
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice(list("abcdefghij"), 4)) for _ in range(60)]
    texts = [" ".join(chance.choice(words, chance.integers(3, 12))) for _ in range(NUM_PASSAGES)]
    tokenizer = build_tokenizer("", ENCODER.tokenizer, texts=texts, save_dir=folder / "tokenizer")
    passages = [
        Passage(f"p{number}", words[number % 60], text, {"third": number % 3, "number": number})
        for number, text in enumerate(texts)
    ]
    write_store(folder / "store", passages, [retriever_passage_side(tokenizer, ENCODER)])
    return Corpus(folder / "store", folder / "tokenizer")
