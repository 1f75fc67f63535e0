"""Messages that docs/troubleshooting.md quotes must be messages of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PLACEHOLDER = re.compile(r"\b(?:PATH|NAME|N)\b")


def messages() -> list[str]:
    """First cells of the tables that are code and not a metric or a setting."""
    cells = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [cell for cell in cells if " " in cell]


def texts_of_code() -> str:
    """All string literals of the packages, a mark where a value is filled in, and the launcher as it is."""
    found = [(ROOT / "launch.sh").read_text(encoding="utf-8")]
    for package in ("indexing", "training", "cluster", "tandem"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if is_text(part) else "\0" for part in node.values))  # pyright: ignore[reportAttributeAccessIssue]
                elif is_text(node):
                    found.append(node.value)  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(found)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


CODE = texts_of_code()


def test_there_are_messages_to_check():
    assert len(messages()) > 30


@pytest.mark.parametrize("message", messages())
def test_the_code_has_the_message(message: str):
    parts = [part.strip() for part in PLACEHOLDER.split(message)]
    missing = [part for part in parts if part and part not in CODE]
    assert not missing, f"no string of the code contains {missing}"
