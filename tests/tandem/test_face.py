"""What `import tandem` offers: its names, its speed, and that its examples run."""

import doctest
import subprocess
import sys

import pytest

import tandem

NAMES = [
    "Answer",
    "Corpus",
    "Difference",
    "Passage",
    "Results",
    "Run",
    "Settings",
    "Update",
    "__version__",
    "load",
    "train",
]
CODE = """
import sys, time
begin = time.perf_counter()
import tandem
seconds = time.perf_counter() - begin
heavy = {"torch", "ray", "faiss", "transformers"} & set(sys.modules)
print(seconds, sorted(heavy))
"""


def test_the_public_names() -> None:
    assert tandem.__all__ == NAMES
    assert all(hasattr(tandem, name) for name in NAMES)


def test_importing_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 5  # 0.2 s on an idle machine


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("__version__", "Settings")])
def test_the_example_of_each_public_name_runs(name: str, run: tandem.Run) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(tandem, name), name, globs={"run": run, "tandem": tandem})
    assert len(found[0].examples) > 0, f"tandem.{name} has no example"
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found[0], out=report.append)
    assert not outcome.failed, "".join(report)


def test_every_public_method_has_a_docstring() -> None:
    for name in NAMES:
        shown = getattr(tandem, name)
        members = vars(shown).items() if isinstance(shown, type) else ()
        methods = [value for key, value in members if not key.startswith("_")]
        assert all(method.__doc__ for method in methods if callable(method) or isinstance(method, property)), name
