"""How text becomes the token rows of the store: one side for the retriever, one for the generator, made once.

Rows of the retriever are complete (special tokens included). Rows of a generator are segments without special tokens,
which the generator puts together; each segment is tokenised as it stands after the text that precedes it in the prompt.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from indexing.corpus import Question
from indexing.store import TokenSide
from training.models.checkpoint_layout import read_layout
from training.models.tokenizers import fingerprint, plain_backend
from training.settings import EncoderConfig, GeneratorConfig

Pairs = Sequence[tuple[str, str]]
FUSION_QUESTION = "question: {question}"  # of pretrained readers, as in fusion-in-decoder (Izacard & Grave 2021)
FUSION_PASSAGE = "title: {title} context: {text}"
CONTEXT_END = -1  # in a row of a causal model's question: what is before it takes the place of the prompt's beginning
_FIELDS = {"passages": "\ue000", "question": "\ue001"}  # stand for the fields while a chat template is filled in


@dataclass(frozen=True)
class Pieces:
    """`start title between text end`, each tokenised alone; the title is cut first, then the whole."""

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
    """`prompt title text` as one sequence with the tokeniser's own special tokens: what pretrained encoders expect."""

    max_tokens: int
    prompt: str = ""

    def rows(self, backend: Tokenizer, pairs: Pairs) -> list[list[int]]:
        texts = [self.prompt + f"{title} {text}".strip() for title, text in pairs]
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=True)]


@dataclass(frozen=True)
class InContext:
    """Tokens that a text has after `before`; spaces that end `before` go with the text."""

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
            joined = row[: len(known)] != known  # the text melts with what is before it
            rows[i] = backend.encode(texts[i], add_special_tokens=False).ids if joined else row[len(known) :]
        return [row[: self.max_tokens] for row in rows]

    def _render(self, title: str, text: str) -> str:
        if title:
            return self.with_title.replace("{text}", "\0").replace("{title}", title).replace("\0", text)
        return self.without_title.replace("{text}", text)


@dataclass(frozen=True)
class WithContext:
    """A question after what is said before it, pairs (context, question). `marked`: the context is whole and ends with
    `CONTEXT_END`; otherwise both share `max_tokens`, the question is kept and of the context the end."""

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
    """The callable of a `TokenSide`; can be pickled."""

    backend: Tokenizer
    plan: Pieces | Joined | InContext | WithContext

    def __call__(self, pairs: Pairs) -> list[list[int]]:
        return self.plan.rows(self.backend, pairs)


def retriever_passage_side(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig) -> TokenSide:
    """Fresh: `[CLS] title [SEP] text [SEP]`, title cut at `max_title_tokens`. Checkpoint: title and text as one
    sequence, after the checkpoint's own passage prompt."""
    if config.name:
        layout = read_layout(config.name)
        return _side("retriever", tokenizer, Joined(config.max_passage_tokens, layout.passage_prompt if layout else ""))
    start, end = surrounding_tokens(tokenizer)
    return _side("retriever", tokenizer, Pieces(config.max_passage_tokens, config.max_title_tokens, start, end, end))


def retriever_question_side(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig) -> TokenSide:
    """A question with special tokens, after the checkpoint's own query prompt. Questions are pairs ("", text)."""
    if config.name:
        layout = read_layout(config.name)
        return _side("retriever", tokenizer, Joined(config.max_question_tokens, layout.query_prompt if layout else ""))
    start, end = surrounding_tokens(tokenizer)
    return _side("retriever", tokenizer, Pieces(config.max_question_tokens, config.max_question_tokens, start, (), end))


def generator_passage_side(
    tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig, max_title_tokens: int
) -> TokenSide:
    """A passage segment without special tokens, cut at `generator.max_passage_tokens`; `max_title_tokens` cuts the
    title of fresh readers. A causal model's ends with {text}: the model adds what `passage_template` has after it."""
    if config.kind == "causal":
        literals, fields = passage_template(config)
        head = "".join(f"{literal}{{{name}}}" for literal, name in zip(literals, fields, strict=False))
        bare = head if "title" not in fields else "{text}"
        return _side("generator", tokenizer, InContext(config.max_passage_tokens, literals[-1], head, bare))
    if config.kind == "fusion" and config.name:
        bare = FUSION_PASSAGE.partition("{title} ")[2]
        return _side("generator", tokenizer, InContext(config.max_passage_tokens, "x ", FUSION_PASSAGE, bare))
    return _side("generator", tokenizer, Pieces(config.max_passage_tokens, max_title_tokens))


def generator_question_side(tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig) -> TokenSide:
    """A question segment without special tokens, cut at `generator.max_question_tokens`; pairs (context, question) as
    `QuestionText` makes them."""
    limit = config.max_question_tokens
    if config.kind == "causal":
        literals, fields = prompt_segments(tokenizer, config)
        plan = InContext(limit, literals[fields.index("question")], "{title} {text}", "{text}")
        return _side("generator", tokenizer, WithContext(limit, plan, marked=True))
    if config.kind == "fusion" and config.name:
        template = FUSION_QUESTION.replace("{question}", "{text}")
        plan = InContext(limit, "", template, template)
        return _side("generator", tokenizer, WithContext(limit, plan, marked=False))
    return _side("generator", tokenizer, WithContext(limit, Pieces(limit, limit), marked=False))


def generator_answer_side(tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig) -> TokenSide:
    """An answer without special tokens, cut at `generator.max_answer_tokens`; the generator adds end-of-sequence."""
    limit = config.max_answer_tokens
    if config.kind == "causal":
        last = prompt_segments(tokenizer, config)[0][-1]
        before = last if last[-1:].isspace() else last + " "
        return _side("answer", tokenizer, InContext(limit, before, "{title} {text}", "{text}"))
    return _side("answer", tokenizer, Pieces(limit, limit))


def prompt_template(config: GeneratorConfig) -> tuple[list[str], list[str]]:
    """`generator.template` as literals and the fields between them. Raises ValueError when a field lacks."""
    return split_template(config.template, "generator.template", ("passages", "question"), ("passages", "question"))


def prompt_segments(
    tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig, earlier: Sequence[dict[str, str]] = ()
) -> tuple[list[str], list[str]]:
    """A causal model's whole prompt as literals and the fields between them: `generator.template` after the system
    prompt and the `earlier` messages of a chat; as the last turn of the tokeniser's chat template, where it has one and
    `generator.chat_template` is auto. Only the first literal depends on `earlier`."""
    literals, fields = prompt_template(config)
    messages = with_system_prompt(config, earlier)
    if not has_chat_template(tokenizer, config):
        return ["\n\n".join([*map(_line, messages), literals[0]]), *literals[1:]], fields
    turn = config.template
    for name, mark in _FIELDS.items():
        turn = turn.replace(f"{{{name}}}", mark)
    prompt = _chat(tokenizer, messages, turn)
    return re.split("[" + "".join(_FIELDS.values()) + "]", prompt), fields


def has_chat_template(tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig) -> bool:
    """Whether prompts are turns of the tokeniser's own chat format."""
    return config.kind == "causal" and config.chat_template == "auto" and bool(tokenizer.chat_template)


def with_system_prompt(config: GeneratorConfig, earlier: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """`earlier` messages after a system message: their own, or `generator.system_prompt` where there is one."""
    if config.system_prompt and not (earlier and earlier[0]["role"] == "system"):
        return [{"role": "system", "content": config.system_prompt}, *earlier]
    return list(earlier)


@dataclass(frozen=True)
class QuestionText:
    """What each side reads of a question; the `render` of a question store.

    The retriever reads the question alone. The generator reads it with its options in `choice_template`, after its
    context: system prompt and earlier turns. A causal model's context is the whole beginning of its prompt, where that
    differs from the usual one; of a chat that is too long for `generator.max_context_tokens` the oldest turns are left
    out.
    """

    tokenizer: PreTrainedTokenizerFast
    config: GeneratorConfig
    choice_template: str = "{question}"

    def __call__(self, side: str, question: Question) -> tuple[str, str]:
        """(context, text). Raises ValueError for a system prompt that is too long."""
        if side != "generator":
            return "", question.text
        return self._context(question), self._with_options(question)

    def _with_options(self, question: Question) -> str:
        if not question.options:
            return question.text
        options = "; ".join(question.options)
        return (
            self.choice_template.replace("{question}", "\0").replace("{options}", options).replace("\0", question.text)
        )

    def _context(self, question: Question) -> str:
        if self.config.kind != "causal":
            return "\n".join(_line(message) for message in with_system_prompt(self.config, question.earlier))
        if not question.earlier:
            return ""
        first = question.earlier[0]
        system, turns = ([first], question.earlier[1:]) if first["role"] == "system" else ([], question.earlier)
        while True:
            literals, fields = prompt_segments(self.tokenizer, self.config, [*system, *turns])
            context = literals[0] if fields[0] == "passages" else literals[0].rstrip(" ")
            tokens = len(plain_ids(self.tokenizer, [context])[0])
            if tokens <= self.config.max_context_tokens:
                return context
            if not turns:
                raise ValueError(
                    f"generator.max_context_tokens={self.config.max_context_tokens}: the system prompt of question "
                    f"{question.id!r} takes {tokens} tokens with what the prompt has around it"
                )
            turns = turns[2:]  # a question with its answer


def split_context(question: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """A row of a causal model's question as the beginning of its prompt (None: the usual one) and the question."""
    ends = np.flatnonzero(question == CONTEXT_END)
    return (question[: ends[0]], question[ends[0] + 1 :]) if len(ends) else (None, question)


def passage_template(config: GeneratorConfig) -> tuple[list[str], list[str]]:
    """`generator.passage_template` likewise; {title} may be left out, {text} comes last."""
    name = "generator.passage_template"
    literals, fields = split_template(config.passage_template, name, ("text",), ("title", "text"))
    if fields[-1] != "text":
        raise ValueError(f"{name} is {config.passage_template!r}; allowed: {{title}} before {{text}}")
    return literals, fields


def split_template(
    template: str, setting: str, required: Sequence[str], allowed: Sequence[str]
) -> tuple[list[str], list[str]]:
    """`"a{x}b{y}c"` to `["a", "b", "c"], ["x", "y"]`. Raises ValueError naming `setting` when a field lacks, is unknown
    or repeated."""
    parts = re.split(r"\{(\w*)\}", template)
    literals, fields = parts[::2], parts[1::2]
    wrong = [name for name in required if name not in fields]
    wrong += [name for name in fields if name not in allowed or fields.count(name) > 1]
    if wrong:
        once = ", ".join(f"{{{name}}}" for name in allowed)
        raise ValueError(
            f"{setting} is {template!r}: wrong or missing field {{{wrong[0]}}}; allowed: each of {once} once"
        )
    return literals, fields


def surrounding_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that this tokeniser puts before and after one sequence."""
    backend = plain_backend(tokenizer)
    bare = backend.encode("x", add_special_tokens=False).ids
    full = backend.encode("x", add_special_tokens=True).ids
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return tuple(full[:at]), tuple(full[at + len(bare) :])
    return (), ()


def plain_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return _encode(plain_backend(tokenizer), texts)


def _line(message: dict[str, str]) -> str:
    """A message as text; a system message has no speaker."""
    return (
        message["content"] if message["role"] == "system" else f"{message['role'].capitalize()}: {message['content']}"
    )


def _chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], turn: str) -> str:
    """The chat up to where the assistant answers `turn`. A template that knows no system role has that message in the
    user's first turn."""
    chat = [*messages, {"role": "user", "content": turn}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        if chat[0]["role"] != "system":
            raise
        first = {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
        return str(tokenizer.apply_chat_template([first, *chat[2:]], tokenize=False, add_generation_prompt=True))


def _side(name: str, tokenizer: PreTrainedTokenizerFast, plan: Pieces | Joined | InContext | WithContext) -> TokenSide:
    """The fingerprint covers the tokeniser and everything that decides how it is used."""
    backend = plain_backend(tokenizer, plan.max_tokens if isinstance(plan, Joined) else 0)
    text = json.dumps([fingerprint(tokenizer), type(plan).__name__, asdict(plan)], sort_keys=True)
    return TokenSide(name, Tokenize(backend, plan), hashlib.sha256(text.encode()).hexdigest())


def _encode(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
