"""Join the token rows of question and passage to the one sequence that a cross-encoder reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.models.text.packing import pad_rows
from training.models.text.token_rows import surrounding_tokens
from training.models.text.tokenizers import pad_id, plain_backend


@dataclass
class PairBatch:
    """Pairs, padded on the right."""

    ids: Tensor  # int64 [pairs, tokens]
    mask: Tensor  # bool [pairs, tokens]
    first: Tensor  # int64 [pairs]: number of tokens of the first segment; the others are the second one

    def to(self, device: torch.device | str) -> "PairBatch":
        """Return the same pairs on `device`."""
        return PairBatch(*(t.to(device, non_blocking=True) for t in (self.ids, self.mask, self.first)))


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Joins token rows of `side` as a tokeniser joins two texts. Rows of the retriever are whole sequences already, and
    the `strip` special tokens that begin a passage are left out; rows of a re-ranker are bare, and get `start`,
    `between` and `end`. With `segments`, the passage is marked as the second segment."""

    side: str
    pad_id: int
    start: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    strip: int = 0
    segments: bool = True

    def __call__(self, questions: Sequence[np.ndarray], passages: Sequence[Sequence[np.ndarray]], k: int) -> PairBatch:
        """Join question rows [batch] with up to `k` passage rows each; a missing passage is an empty one."""
        nothing = np.empty(0, dtype=np.int32)
        rows: list[np.ndarray] = []
        first: list[int] = []
        for question, some in zip(questions, passages, strict=True):
            head = np.concatenate([self.start, question, self.between]).astype(np.int64)
            for passage in [*some, *[nothing] * (k - len(some))]:
                rows.append(np.concatenate([head, passage[self.strip :], self.end]).astype(np.int64))
                first.append(len(head) if self.segments else len(rows[-1]))
        return PairBatch(*pad_rows(rows, self.pad_id), torch.tensor(first))


def retriever_pairing(tokenizer: PreTrainedTokenizerFast) -> Pairing:
    """Return the pairing of the retriever's rows: `[CLS] question [SEP]` and `title [SEP] text [SEP]`."""
    return Pairing(side="retriever", pad_id=pad_id(tokenizer), strip=len(surrounding_tokens(tokenizer)[0]))


def reranker_pairing(tokenizer: PreTrainedTokenizerFast) -> Pairing:
    """Return the pairing of a re-ranker's rows, with the special tokens that its tokeniser puts around two texts."""
    backend = plain_backend(tokenizer)
    bare = backend.encode("x", add_special_tokens=False).ids
    both = backend.encode("x", "x", add_special_tokens=True)
    full = both.ids
    places = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    if len(places) < 2:
        raise ValueError("reranker.name: its tokeniser does not join two texts")
    first, second = places[0], places[-1]
    return Pairing(
        side="reranker",
        pad_id=pad_id(tokenizer),
        start=tuple(full[:first]),
        between=tuple(full[first + len(bare) : second]),
        end=tuple(full[second + len(bare) :]),
        segments=both.type_ids[second] == 1 and "token_type_ids" in tokenizer.model_input_names,
    )
