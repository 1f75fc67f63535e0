"""Makes api.md: every public name of `tandem` with signature, fields and docstring, read from the source."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import tandem

HEAD = """# Python

`import tandem` is the whole public interface. It imports neither torch nor Ray; they come when they are needed. The
examples below are run by the tests; `run` in them is a small trained run.

```python
import tandem

run = tandem.train("configs/quickstart.yaml", "run.seed=1")   # resumes, like the command
run = tandem.load("runs/quickstart/joint")                    # a finished run, wherever its folder is
print(run.ask("What job does Boges Troto do?").text)
```
"""
SETTINGS = "\nAll settings of one stage, as dataclasses: see the [settings page](settings.md).\n"
ORDER = ("train", "load", "Run", "Corpus", "Answer", "Passage", "Results", "Difference", "Update", "Settings")


def api_page() -> str:
    """Return the page. Raises ValueError where a public name lacks here, or one here is not public."""
    public = set(tandem.__all__) - {"__version__"}
    if public != set(ORDER):
        raise ValueError(f"docs/api_page.py: ORDER and tandem.__all__ differ in {sorted(public ^ set(ORDER))}")
    return "\n".join([HEAD, *(entry(name) for name in ORDER)])


def entry(name: str) -> str:
    """Return the section of one public name."""
    if name == "Settings":
        return f"## `{name}`\n{SETTINGS}"
    source = inspect.getsourcefile(getattr(tandem, name))
    assert source is not None
    text = Path(source).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    node = next(node for node in nodes if node.name == name)
    if isinstance(node, ast.FunctionDef):
        return f"## `{name}`\n\n{function(node, 'tandem.')}"
    parts = [f"## `{name}`\n\n{prose(node)}", fields(node, text.splitlines())]
    methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")]
    methods = [method for method in methods if not has(method, "overload")]
    parts += [f"### `{name}.{method.name}`\n\n{function(method, '')}" for method in methods]
    return "\n".join(part for part in parts if part)


def has(node: ast.FunctionDef, decorator: str) -> bool:
    """Return True if the function has this decorator."""
    return any(isinstance(each, ast.Name) and each.id == decorator for each in node.decorator_list)


def function(node: ast.FunctionDef, prefix: str) -> str:
    """Return signature and docstring; a property has no parentheses."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    returns = f" -> {ast.unparse(node.returns).strip(chr(39))}" if node.returns else ""
    shown = f"{prefix}{node.name}{'' if has(node, 'property') else f'({arguments})'}{returns}"
    return f"```python\n{shown}\n```\n\n{prose(node)}"


def prose(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the docstring as Markdown, its example as a block of code."""
    text, _, example = (ast.get_docstring(node) or "").partition("Example\n-------\n")
    example = re.sub(r"  # doctest: .*", "", textwrap.dedent(example).strip())
    block = f"\n\n```pycon\n{example}\n```" if example else ""
    return f"{text.strip()}{block}\n"


def fields(node: ast.ClassDef, lines: list[str]) -> str:
    """Return the fields of a dataclass as a table, their comments as meanings; empty for another class."""
    rows = []
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign):
            _, _, comment = lines[inner.lineno - 1].partition("  # ")
            kind = ast.unparse(inner.annotation).replace("|", "\\|")
            rows.append(f"| `{ast.unparse(inner.target)}` | `{kind}` | {comment} |\n")
    return f"| field | type | meaning |\n| --- | --- | --- |\n{''.join(rows)}" if rows else ""
