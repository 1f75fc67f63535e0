"""CONTRIBUTING.md names every place that an addition needs: no other file asks for a kind by its name."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.generator_kinds import GENERATOR_KINDS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for package in ("indexing", "training", "cluster")
    for path in sorted((ROOT / package).rglob("*.py"))
}
FACTORY = re.compile(r"Flat|SQfp16|SQ8|PQ|(IVF|HNSW|OPQ|PQ)\d+.*")
KIND_FIELDS = {"codec", "links", "lists", "parts", "bits", "rotated"}


def places(heading: str) -> list[str]:
    """Return the first path of each numbered line below a heading."""
    section = TEXT.split(f"### {heading}\n")[1].split("\n### ")[0]
    return [match[1] for match in re.finditer(r"^\d\. `([^`]+)`", section, re.MULTILINE)]


def texts(node: ast.AST) -> Iterator[str]:
    """Yield every text that stands in an expression."""
    yield from (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))


def asks_for_generator(tree: ast.AST) -> bool:
    """Return True if something called `kind` is compared with the name of a kind of generator."""
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Compare) and getattr(node.left, "attr", getattr(node.left, "id", "")) == "kind":
            names = {text for each in node.comparators for text in texts(each)}
        if isinstance(node, ast.Match) and getattr(node.subject, "attr", "") == "kind":
            names = {text for case in node.cases for text in texts(case.pattern)}
        if names & set(GENERATOR_KINDS):
            return True
    return False


def asks_for_index(tree: ast.AST) -> bool:
    """Return True if a factory string is written, or a field of a parsed one is read."""
    fields = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "kind" in ast.dump(node.value)
    }
    return bool(fields & KIND_FIELDS) or any(FACTORY.fullmatch(text) for text in texts(tree))


@pytest.mark.parametrize("heading", ["An objective", "A generator kind", "An index kind", "A verb"])
def test_four_places_at_most(heading: str) -> None:
    found = places(heading)
    assert 2 <= len(found) <= 4
    assert all((ROOT / path).exists() for path in found)


@pytest.mark.parametrize(
    ("heading", "asks"), [("A generator kind", asks_for_generator), ("An index kind", asks_for_index)]
)
def test_no_other_file_asks_for_a_kind(heading: str, asks: Callable[[ast.AST], bool]) -> None:
    asking = {str(path.relative_to(ROOT)) for path, tree in FILES.items() if asks(tree)}
    allowed = tuple(places(heading))
    assert asking, "the test looks for nothing"
    assert [path for path in sorted(asking) if not path.startswith(allowed)] == []
