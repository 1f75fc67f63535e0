"""Holds the rules by which the models of a run read and write text; tokenisers and four sections of the settings decide
them.

Preparation tokenises passages and questions with these rules; training and answering pad, join and decode with them.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from indexing.corpus.stores.passages import TokenSide
from indexing.indexing_settings import QuestionsConfig
from training.models.retriever.reranker import has_tokenizer
from training.models.text.pairs import Pairing, reranker_pairing, retriever_pairing
from training.models.text.prompts import QuestionText
from training.models.text.token_rows import (
    generator_answer_side,
    generator_passage_side,
    generator_question_side,
    reranker_side,
    retriever_passage_side,
    retriever_question_side,
)
from training.models.text.tokenizers import load_tokenizer, pad_id, to_text
from training.training_settings import EncoderConfig, GeneratorConfig, RerankerConfig


class TextSettings(Protocol):
    """The sections of the settings that decide how text is read."""

    encoder: EncoderConfig
    generator: GeneratorConfig
    reranker: RerankerConfig
    questions: QuestionsConfig


class RunText:
    """The tokenisers of a run, with the rules that follow from them."""

    def __init__(
        self,
        settings: TextSettings,
        retriever: PreTrainedTokenizerFast,
        generator: PreTrainedTokenizerFast,
        reranker: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """`reranker` is None if there is no re-ranker, or if it reads the retriever's tokens."""
        self.settings, self.retriever, self.generator, self.reranker = settings, retriever, generator, reranker
        self.pad_id = pad_id(retriever)  # padding of the retriever's rows

    @staticmethod
    def load(settings: TextSettings, folder: Path) -> "RunText":
        """Read the tokenisers in `folder`: retriever/, generator/ and, if the re-ranker has another, reranker/."""
        reranker = load_tokenizer(folder / "reranker") if has_tokenizer(settings.reranker) else None
        return RunText(settings, load_tokenizer(folder / "retriever"), load_tokenizer(folder / "generator"), reranker)

    @property
    def tokenizers(self) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
        """The tokenisers of the retriever and of the generator."""
        return self.retriever, self.generator

    @cached_property
    def passage_sides(self) -> list[TokenSide]:
        """Tokenisation of a passage for the retriever, the generator and, if its tokeniser is another, the
        re-ranker."""
        encoder, generator = self.settings.encoder, self.settings.generator
        return [
            retriever_passage_side(self.retriever, encoder),
            generator_passage_side(self.generator, generator, encoder.max_title_tokens),
            *self._reranker_sides(self.settings.reranker.max_passage_tokens),
        ]

    @cached_property
    def question_sides(self) -> list[TokenSide]:
        """Tokenisation of a question for the same models."""
        return [
            retriever_question_side(self.retriever, self.settings.encoder),
            generator_question_side(self.generator, self.settings.generator),
            *self._reranker_sides(self.settings.reranker.max_question_tokens),
        ]

    @cached_property
    def answer_side(self) -> TokenSide:
        """Tokenisation of an answer that the generator learns from."""
        return generator_answer_side(self.generator, self.settings.generator)

    @property
    def render(self) -> QuestionText:
        """The text that each side reads of a question; the `render` of a question store."""
        return QuestionText(self.generator, self.settings.generator, self.settings.questions.choice_template)

    @cached_property
    def pairing(self) -> Pairing | None:
        """A function that joins question and passage to the one sequence that a re-ranker reads; None without a
        re-ranker."""
        if self.settings.reranker.mode == "off":
            return None
        return retriever_pairing(self.retriever) if self.reranker is None else reranker_pairing(self.reranker)

    @property
    def separator_id(self) -> int:
        """The token id that separates title and text in the retriever's rows; -1 if its tokeniser has none."""
        found = self.retriever.sep_token_id
        return found if isinstance(found, int) else -1

    def answer_row(self, text: str) -> np.ndarray:
        """Return the token row of one answer; int32 [tokens]."""
        return np.array(self.answer_side.tokenize([("", text)])[0], dtype=np.int32)

    def to_text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that the generator wrote, without special tokens."""
        return to_text(self.generator, tokens)

    def _reranker_sides(self, max_tokens: int) -> list[TokenSide]:
        return [] if self.reranker is None else [reranker_side(self.reranker, max_tokens)]
