"""Write the text around passages and question that a generator reads: templates, system prompts, chats and options.

`training/models/text/token_rows.py` turns this text into token rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from indexing.corpus.files.corpus import Question
from indexing.declare import refuse
from training.models.text.tokenizers import plain_backend
from training.training_settings import GeneratorConfig

CONTEXT_END = -1  # in a question row of a causal model; the tokens before it replace the beginning of the prompt
_FIELDS = {"passages": "\ue000", "question": "\ue001"}  # stand for the fields while a chat template is filled in


def prompt_template(config: GeneratorConfig) -> tuple[list[str], list[str]]:
    """Split `generator.template` into literals and the fields between them. Raises ValueError if a field is missing."""
    return split_template(config.template, "generator.template", ("passages", "question"), ("passages", "question"))


def passage_template(config: GeneratorConfig) -> tuple[list[str], list[str]]:
    """Split `generator.passage_template` likewise; {title} may be left out, {text} comes last."""
    name = "generator.passage_template"
    literals, fields = split_template(config.passage_template, name, ("text",), ("title", "text"))
    if fields[-1] != "text":
        raise refuse(name, repr(config.passage_template), "must have {title} before {text}")
    return literals, fields


def split_template(
    template: str, setting: str, required: Sequence[str], allowed: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Split `"a{x}b{y}c"` into `["a", "b", "c"], ["x", "y"]`. Raises ValueError naming `setting` if a field is missing,
    unknown or repeated."""
    parts = re.split(r"\{(\w*)\}", template)
    literals, fields = parts[::2], parts[1::2]
    wrong = [name for name in required if name not in fields]
    wrong += [name for name in fields if name not in allowed or fields.count(name) > 1]
    if wrong:
        once = ", ".join(f"{{{name}}}" for name in allowed)
        raise refuse(setting, repr(template), f"must have each of {once} once; wrong or missing is {{{wrong[0]}}}")
    return literals, fields


def prompt_segments(
    tokenizer: PreTrainedTokenizerFast, config: GeneratorConfig, earlier: Sequence[dict[str, str]] = ()
) -> tuple[list[str], list[str]]:
    """Return a causal model's whole prompt as literals and the fields between them: the system prompt, the `earlier`
    messages of a chat, then `generator.template`. If the tokeniser has a chat template and `generator.chat_template` is
    auto, these are turns of that template. Only the first literal depends on `earlier`."""
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
    """Return true if prompts are turns of the tokeniser's chat template."""
    return config.traits.one_sequence and config.chat_template == "auto" and bool(tokenizer.chat_template)


def with_system_prompt(config: GeneratorConfig, earlier: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the `earlier` messages after a system message: the first of them, or `generator.system_prompt` if set."""
    if config.system_prompt and not (earlier and earlier[0]["role"] == "system"):
        return [{"role": "system", "content": config.system_prompt}, *earlier]
    return list(earlier)


@dataclass(frozen=True)
class QuestionText:
    """Returns the text of a question that each side reads; it is the `render` of a question store.

    The retriever reads the question alone. The generator reads it with its options in `choice_template`, after its
    context: system prompt and earlier turns. The context of a causal model is the whole beginning of its prompt, if it
    differs from the usual one. The oldest turns are left out of a chat that `generator.max_context_tokens` cannot hold.
    """

    tokenizer: PreTrainedTokenizerFast
    config: GeneratorConfig
    choice_template: str = "{question}"

    def __call__(self, side: str, question: Question) -> tuple[str, str]:
        """Return (context, text). Raises ValueError for a system prompt that is too long."""
        if side != "generator":
            return "", question.text
        return self._context(question), self._with_options(question)

    def _with_options(self, question: Question) -> str:
        if not question.options:
            return question.text
        options = "; ".join(question.options)
        marked = self.choice_template.replace("{question}", "\0").replace("{options}", options)
        return marked.replace("\0", question.text)

    def _context(self, question: Question) -> str:
        if not self.config.traits.one_sequence:
            return "\n".join(_line(message) for message in with_system_prompt(self.config, question.earlier))
        if not question.earlier:
            return ""
        first = question.earlier[0]
        system, turns = ([first], question.earlier[1:]) if first["role"] == "system" else ([], question.earlier)
        while True:
            literals, fields = prompt_segments(self.tokenizer, self.config, [*system, *turns])
            context = literals[0] if fields[0] == "passages" else literals[0].rstrip(" ")
            tokens = len(plain_backend(self.tokenizer).encode(context, add_special_tokens=False).ids)
            if tokens <= self.config.max_context_tokens:
                return context
            if not turns:
                raise ValueError(
                    f"generator.max_context_tokens={self.config.max_context_tokens}: the system prompt of question "
                    f"{question.id!r} takes {tokens} tokens with what the prompt has around it"
                )
            turns = turns[2:]  # a question with its answer


def split_context(question: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Split a causal model's question row into the beginning of its prompt (None: the usual one) and the question."""
    ends = np.flatnonzero(question == CONTEXT_END)
    return (question[: ends[0]], question[ends[0] + 1 :]) if len(ends) else (None, question)


def _line(message: dict[str, str]) -> str:
    """Write a message as text; a system message names no speaker."""
    speaker = "" if message["role"] == "system" else f"{message['role'].capitalize()}: "
    return speaker + message["content"]


def _chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], turn: str) -> str:
    """Write the chat up to the place where the assistant answers `turn`. If the template knows no system role, the
    system message begins the first turn of the user."""
    chat = [*messages, {"role": "user", "content": turn}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        if chat[0]["role"] != "system":
            raise
        first = {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
        return str(tokenizer.apply_chat_template([first, *chat[2:]], tokenize=False, add_generation_prompt=True))
