"""Fenced samples of a Markdown page by the file name that their title gives, like ```jsonl title="corpus.jsonl"."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)


def samples(page: Path) -> dict[str, str]:
    """Text of each titled sample. Raises AssertionError where two have one title."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    texts = dict(found)
    assert len(texts) == len(found), f"{page.name}: two samples with one title"
    return texts
