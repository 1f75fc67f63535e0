"""The pages that people read, and what stands in them: links, paths, anchors and commands."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TOP = "benchmarks|cluster|configs|docs|indexing|tandem|tests|training"
NAMED = re.compile(rf"`((?:{TOP})/[\w./-]*|[A-Za-z_.-]+\.(?:toml|sh))`")


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[tuple[str, str]]:
    """(target, anchor) of every relative link; either may be empty."""
    return re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def named_paths(page: Path) -> list[str]:
    """Paths of the project that stand as code in the prose."""
    return NAMED.findall(prose(page))


def commands(page: Path) -> list[list[str]]:
    """Words of every command of the page's shell blocks, without comments and leading variables."""
    found = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("bash", "sh", "shell"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    inline = re.findall(r"`((?:\./launch\.sh|python -m) [^`]+)`", prose(page))
    return found + [shlex.split(re.sub(r"=S\b", "=0", text)) for text in inline]  # S: any seed
