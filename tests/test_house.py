"""The house rules that no linter checks, against every file of the packages."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.code_size import PACKAGES, ROOT, longest_functions, python_files

FACE = "tandem"
MAX_FUNCTION_LINES, MAX_FILE_LINES = 75, 450  # a signature with an argument a line, and the docstring, count
NO_FIRST_WORD = re.compile(r"(What|Whether|Where|How|Of|Which|As)\b")
NO_NAMES = {"own", "told", "said", "still", "chief"}
ONE_CLASS = ("Plan", "Serving", "Question")  # names that at most one class has
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files((*PACKAGES, FACE))}


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def public_docstrings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, docstring) of the module and of every class and function whose name has no underscore first."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if not isinstance(node, ast.Module) and node.name.startswith("_") and not node.name.endswith("__"):
            return
        if docstring := ast.get_docstring(node):
            yield node.body[0].lineno, docstring
    for child in ast.iter_child_nodes(node):
        yield from public_docstrings(child)


def names(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every definition, argument, variable and attribute."""
    for inner in ast.walk(node):
        match inner:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield inner.lineno, inner.name
            case ast.Name():
                yield inner.lineno, inner.id
            case ast.arg():
                yield inner.lineno, inner.arg
            case ast.Attribute():
                yield inner.lineno, inner.attr


def test_files_have_names_of_their_own() -> None:
    counts = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [str(path.relative_to(ROOT)) for path in FILES if counts[path.name] > 1] == []


def test_functions_and_files_are_short() -> None:
    too_long = [each for each in longest_functions() if each.lines > MAX_FUNCTION_LINES]
    assert [f"{each.path}: {each.name}, {each.lines} lines" for each in too_long] == []
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert [f"{place(path, count)}" for path, count in lines.items() if count > MAX_FILE_LINES] == []


def test_packages_import_nothing_by_themselves() -> None:
    """An `__init__.py` holds a docstring only, except that of the public face."""
    modules = {path: tree for path, tree in FILES.items() if path.name == "__init__.py" and path.parent.name != FACE}
    assert modules
    bad = [path for path, tree in modules.items() if len(tree.body) != 1 or ast.get_docstring(tree) is None]
    assert [str(path.relative_to(ROOT)) for path in bad] == []


def test_docstrings_begin_with_a_sentence() -> None:
    bad = [
        f"{place(path, line)}: {docstring.splitlines()[0]}"
        for path, tree in FILES.items()
        for line, docstring in public_docstrings(tree)
        if NO_FIRST_WORD.match(docstring)
    ]
    assert not bad, f"{len(bad)} docstrings:\n" + "\n".join(bad)


def test_names_are_words_of_the_field() -> None:
    bad = [
        f"{place(path, line)}: {name}"
        for path, tree in FILES.items()
        for line, name in names(tree)
        if name.strip("_") in NO_NAMES
    ]
    assert not bad, f"{len(bad)} names:\n" + "\n".join(bad)


def test_classes_of_one_name() -> None:
    found = [
        f"{place(path, node.lineno)}: {node.name}"
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in ONE_CLASS
    ]
    assert all(sum(each.endswith(f": {name}") for each in found) <= 1 for name in ONE_CLASS), "\n".join(found)
