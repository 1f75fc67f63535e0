"""Make the token rows of the store from text, once: one side for the retriever, one for the generator.

Rows of the retriever are complete (special tokens included). Rows of a generator are segments without special tokens,
which the generator puts together; each segment is tokenised as it stands after the text that precedes it in the prompt.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from indexing.corpus.stores.passages import TokenSide
from training.models.parts.checkpoint_layout import read_layout
from training.models.text.prompts import CONTEXT_END, passage_template, prompt_segments
from training.models.text.tokenizers import fingerprint, plain_backend
from training.training_settings import EncoderConfig, GeneratorConfig

Pairs = Sequence[tuple[str, str]]
FUSION_QUESTION = "question: {question}"  # as pretrained fusion-in-decoder models read it (Izacard & Grave 2021)
FUSION_PASSAGE = "title: {title} context: {text}"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Tokenises each part of `start title between text end` alone; the title is cut first, then the whole."""

    max_tokens: int
    max_title_tokens: int
    start: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def rows(self, backend: Tokenizer, pairs: Pairs) -> list[list[int]]:
        titles = _encode(backend, [title for title, _ in pairs])
        texts = _encode(backend, [text for _, text in pairs])
        room = self.max_tokens - len(self.end)
        rows: list[list[int]] = []
        for title, text in zip(titles, texts, strict=True):
            head = [*title[: self.max_title_tokens], *self.between] if title else []
            rows.append([*self.start, *head, *text][:room] + list(self.end))
        return rows


@dataclass(frozen=True)
class Joined:
    """Tokenises `prompt title text` as one sequence with special tokens, as pretrained encoders expect it."""

    max_tokens: int
    prompt: str = ""

    def rows(self, backend: Tokenizer, pairs: Pairs) -> list[list[int]]:
        texts = [self.prompt + f"{title} {text}".strip() for title, text in pairs]
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=True)]


@dataclass(frozen=True)
class InContext:
    """Tokenises a text as it stands after `before`; spaces that end `before` go with the text."""

    max_tokens: int
    before: str
    with_title: str  # template of {title} and {text}
    without_title: str  # template of {text} alone

    def rows(self, backend: Tokenizer, pairs: Pairs) -> list[list[int]]:
        stem = self.before.rstrip(" ")
        space = self.before[len(stem) :]
        known = backend.encode(stem, add_special_tokens=False).ids
        texts = [space + self._render(title, text) for title, text in pairs]
        rows = _encode(backend, [stem + text for text in texts])
        for i, row in enumerate(rows):
            joined = row[: len(known)] != known  # the first token of the text covers the end of the stem
            rows[i] = backend.encode(texts[i], add_special_tokens=False).ids if joined else row[len(known) :]
        return [row[: self.max_tokens] for row in rows]

    def _render(self, title: str, text: str) -> str:
        if title:
            return self.with_title.replace("{text}", "\0").replace("{title}", title).replace("\0", text)
        return self.without_title.replace("{text}", text)


@dataclass(frozen=True)
class WithContext:
    """Tokenises pairs (context, question). If `marked`, the context is whole and ends with `CONTEXT_END`; otherwise
    both share `max_tokens`, and the beginning of the context is cut."""

    max_tokens: int
    question: Pieces | InContext
    marked: bool

    def rows(self, backend: Tokenizer, pairs: Pairs) -> list[list[int]]:
        rows = self.question.rows(backend, [("", text) for _, text in pairs])
        for i, (context, _) in enumerate(pairs):
            if context:
                before = _encode(backend, [context])[0]
                if self.marked:
                    before = [*before, CONTEXT_END]
                else:
                    before = before[max(0, len(before) + len(rows[i]) - self.max_tokens) :]
                rows[i] = [*before, *rows[i]]
        return rows


@dataclass(frozen=True)
class Tokenize:
    """Makes the rows of a `TokenSide`; can be pickled."""

    backend: Tokenizer
    plan: Pieces | Joined | InContext | WithContext

    def __call__(self, pairs: Pairs) -> list[list[int]]:
        return self.plan.rows(self.backend, pairs)


def retriever_passage_side(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig) -> TokenSide:
    """Return the side of passages. A fresh encoder reads `[CLS] title [SEP] text [SEP]`, the title cut at
    `max_title_tokens`; a checkpoint reads its passage prompt, title and text as one sequence."""
    limit, titles = config.max_passage_tokens, config.max_title_tokens
    if config.name:
        layout = read_layout(config.name)
        return _side("retriever", tokenizer, Joined(limit, layout.passage_prompt if layout else ""))
    start, end = surrounding_tokens(tokenizer)
    plan = Pieces(max_tokens=limit, max_title_tokens=titles, start=start, between=end, end=end)
    return _side("retriever", tokenizer, plan)


def retriever_question_side(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig) -> TokenSide:
    """Return the side of questions with special tokens, after a checkpoint's query prompt; pairs are ("", text)."""
    limit = config.max_question_tokens
    if config.name:
        layout = read_layout(config.name)
        return _side("retriever", tokenizer, Joined(limit, layout.query_prompt if layout else ""))
    start, end = surrounding_tokens(tokenizer)
    return _side("retriever", tokenizer, Pieces(max_tokens=limit, max_title_tokens=limit, start=start, end=end))


def generator_passage_side(
    tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig, max_title_tokens: int
) -> TokenSide:
    """Return the side of a passage segment without special tokens, cut at `generator.max_passage_tokens`. The title of
    a fresh generator is cut at `max_title_tokens`. A causal model's segment ends with {text}: the model adds the rest
    of `passage_template`."""
    if config.traits.one_sequence:
        literals, fields = passage_template(config)
        head = "".join(f"{literal}{{{name}}}" for literal, name in zip(literals, fields, strict=False))
        bare = head if "title" not in fields else "{text}"
        return _side("generator", tokenizer, InContext(config.max_passage_tokens, literals[-1], head, bare))
    if config.traits.encoder_decoder and config.name:
        bare = FUSION_PASSAGE.partition("{title} ")[2]
        return _side("generator", tokenizer, InContext(config.max_passage_tokens, "x ", FUSION_PASSAGE, bare))
    plan = Pieces(max_tokens=config.max_passage_tokens, max_title_tokens=max_title_tokens)
    return _side("generator", tokenizer, plan)


def generator_question_side(tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig) -> TokenSide:
    """Return the side of a question segment without special tokens, cut at `generator.max_question_tokens`; pairs are
    (context, question) of `QuestionText`."""
    limit = config.max_question_tokens
    if config.traits.one_sequence:
        literals, fields = prompt_segments(tokenizer, config)
        plan = InContext(limit, literals[fields.index("question")], "{title} {text}", "{text}")
        return _side("generator", tokenizer, WithContext(limit, plan, marked=True))
    if config.traits.encoder_decoder and config.name:
        template = FUSION_QUESTION.replace("{question}", "{text}")
        plan = InContext(limit, "", template, template)
        return _side("generator", tokenizer, WithContext(limit, plan, marked=False))
    pieces = Pieces(max_tokens=limit, max_title_tokens=limit)
    return _side("generator", tokenizer, WithContext(limit, pieces, marked=False))


def generator_answer_side(tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig) -> TokenSide:
    """Return the side of an answer without special tokens, cut at `generator.max_answer_tokens`; the generator adds
    end-of-sequence."""
    limit = config.max_answer_tokens
    if config.traits.one_sequence:
        last = prompt_segments(tokenizer, config)[0][-1]
        before = last if last[-1:].isspace() else last + " "
        return _side("answer", tokenizer, InContext(limit, before, "{title} {text}", "{text}"))
    return _side("answer", tokenizer, Pieces(max_tokens=limit, max_title_tokens=limit))


def reranker_side(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> TokenSide:
    """Return the side of title and text, or a question, without special tokens; a `Pairing` joins them."""
    return _side("reranker", tokenizer, InContext(max_tokens, "", "{title} {text}", "{text}"))


def surrounding_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that this tokeniser puts before and after one sequence."""
    backend = plain_backend(tokenizer)
    bare = backend.encode("x", add_special_tokens=False).ids
    full = backend.encode("x", add_special_tokens=True).ids
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return tuple(full[:at]), tuple(full[at + len(bare) :])
    return (), ()


def plain_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    return _encode(plain_backend(tokenizer), texts)


def _side(name: str, tokenizer: PreTrainedTokenizerFast, plan: Pieces | Joined | InContext | WithContext) -> TokenSide:
    """Return the side; its fingerprint covers the tokeniser and the plan by which it is used."""
    backend = plain_backend(tokenizer, plan.max_tokens if isinstance(plan, Joined) else 0)
    text = json.dumps([fingerprint(tokenizer), type(plan).__name__, asdict(plan)], sort_keys=True)
    return TokenSide(name, Tokenize(backend, plan), hashlib.sha256(text.encode()).hexdigest())


def _encode(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
