"""Measures the code of the three packages: lines per room, and the longest functions.

Every line of a file counts, also empty ones and docstrings. Tests, benchmarks and the public face do not count.
"""

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("indexing", "training", "cluster")
BUDGET = 28_726  # lines that the three packages should not exceed


@dataclass(frozen=True)
class Function:
    """One function or method, and where it stands."""

    name: str
    path: Path
    lines: int  # Number of lines of its definition, without decorators


def lines_per_room() -> Counter[str]:
    """Return the number of lines of each folder that holds code, by its path below the project."""
    rooms: Counter[str] = Counter()
    for path in python_files():
        rooms[str(path.parent.relative_to(ROOT))] += len(path.read_text(encoding="utf-8").splitlines())
    return rooms


def longest_functions() -> list[Function]:
    """Return every function of the three packages, longest first. Paths are relative to the project."""
    return sorted(
        (
            Function(node.name, path.relative_to(ROOT), (node.end_lineno or node.lineno) - node.lineno + 1)
            for path in python_files()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ),
        key=lambda function: function.lines,
        reverse=True,
    )


def python_files(packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Return the paths of all Python files of these packages, sorted."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def print_code_size() -> None:
    """Print the lines of each room against the budget of all, and the ten longest functions."""
    rooms = lines_per_room()
    total = sum(rooms.values())
    for room in sorted(rooms):
        print(f"{rooms[room]:7,}  {room.replace('/', '.')}")
    over = f", {total - BUDGET:,} over" if total > BUDGET else ""
    print(f"{total:7,}  lines in all; the budget is {BUDGET:,}{over}", flush=True)
    for function in longest_functions()[:10]:
        print(f"{function.lines:7}  {function.name} ({function.path})", flush=True)


if __name__ == "__main__":
    print_code_size()
