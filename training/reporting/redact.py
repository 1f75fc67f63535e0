"""Takes secrets out of a configuration before it is stored or sent."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[A-Z]")
_SECRET = ("key", "token", "secret", "password", "passwd", "credential")
_PLURAL = tuple(f"{word}s" for word in _SECRET)
_IN_TEXT = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), rf"\1{REDACTED}@"),  # scheme://user:pass@host
    (re.compile(r"((?:key|token|secret|password|passwd|credential)=)[^\s&,;]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|AKIA)[A-Za-z0-9_-]{16,}"), REDACTED),  # shapes of well-known tokens
)


def redact(value: Any) -> Any:
    """Return a copy of `value`, dataclasses as dictionaries, with the values of secret keys replaced at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: REDACTED if _is_secret(str(key), item) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return `text` without credentials in URLs, `...key=VALUE` assignments and tokens of well-known shape."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _is_secret(key: str, value: Any) -> bool:
    """Return whether `key` names a secret. `max_tokens: 64` is none: a plural with a number counts things."""
    words = [word.lower() for word in _WORDS.findall(key)]
    if any(word.endswith(_SECRET) for word in words):
        return value is not None
    return any(word.endswith(_PLURAL) for word in words) and not (value is None or isinstance(value, int | float))
