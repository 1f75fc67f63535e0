"""Writes `report.html`: the results of one run, or of several side by side, in one file that needs no other."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.metrics import exact_match
from training.reporting.jsonl import read_rows
from training.reporting.plots import COLOURS, Plot, plot_svg
from training.reporting.redact import redact, redact_text
from training.reporting.tables import Cell, Table, print_table, table_html

__all__ = ["Example", "ReadPassage", "Section", "Table", "print_table", "read_metrics", "run_report", "write_report"]

Metrics = dict[str, tuple[list[int], list[float]]]

MAX_EVENTS = 200  # Number of events of a run that its table shows, half of them from either end
STYLE = """
:root { color-scheme: light dark; }
body { background: Canvas; color: CanvasText; font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
.number { text-align: right; } .wide { overflow-x: auto; } .note { color: #888; margin: .3rem 0; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { height: auto; max-width: 100%; width: 30rem; }
.gold { color: #2a9d62; } pre { background: #8881; overflow-x: auto; padding: .8rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


@dataclass
class Section:
    """A heading and the HTML below it; whoever makes `body` escapes it."""

    title: str
    body: str


@dataclass
class ReadPassage:
    """A passage that a generator read."""

    title: str
    text: str
    score: float | None = None
    relevant: bool = False


@dataclass
class Example:
    """A question, the answer of each run, and the passages that one of them read."""

    question: str
    gold: list[str]
    answers: dict[str, str]  # run name to its decoded answer
    passages: list[ReadPassage] = field(default_factory=list)


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page at once: a reader never sees half of it."""
    parts = [f"<h2>{html.escape(section.title)}</h2>\n{section.body}" for section in sections]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def run_report(
    run_dirs: Mapping[str, Path],
    tables: Sequence[Table],
    *,
    examples: Sequence[Example],
    out: Path,
    title: str = "Tandem",
    more: Sequence[Section] = (),
) -> None:
    """Write the report of one or several runs, by name: tables, `more`, curves over steps, examples, events and
    configuration."""
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in run_dirs.items()}
    sections = [Section("Results", "\n".join(table_html(table) for table in tables))] if tables else []
    sections += more
    sections.append(Section("Curves", curves_html(metrics)))
    if examples:
        sections.append(Section("Examples", "\n".join(map(example_html, examples))))
    events = [event_table(name, folder / "events.jsonl") for name, folder in run_dirs.items()]
    folded = [f"<details><summary>{html.escape(t.title)}</summary>{table_html(t)}</details>" for t in events if t.rows]
    if folded:
        sections.append(Section("Events", "\n".join(folded)))
    configs = [config_html(name, folder / "config.yaml") for name, folder in run_dirs.items()]
    if any(configs):
        sections.append(Section("Configuration", "\n".join(configs)))
    write_report(out, title, sections)


def read_metrics(path: Path) -> Metrics:
    """Return every metric of `metrics.jsonl` as (steps, values), by key; absent and not finite values are left out.

    A step smaller than the one before it means that the run was resumed. The lines that the earlier attempt logged from
    that step on are dropped.
    """
    rows: list[dict[str, Any]] = []
    for row in read_rows(path):
        if not isinstance(row.get("step"), int):
            continue
        if rows and rows[-1]["step"] > (resumed_at := row["step"]):
            rows = [earlier for earlier in rows if earlier["step"] < resumed_at]
        rows.append(row)
    metrics: Metrics = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                steps, values = metrics.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return metrics


def curves_html(metrics: Mapping[str, Metrics]) -> str:
    """Return the plots of all runs, overlaid; a plot that no run has numbers for is left out."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(metrics)}
    svgs = [plot_svg(plot, colours) for plot in choose_plots(metrics) if plot.curves]
    note = "<p class=note>Dotted lines: steps at which a new index generation began to answer.</p>"
    return f"<div class=plots>{''.join(svgs)}</div>{note}" if svgs else "<p class=note>No metrics yet.</p>"


def choose_plots(metrics: Mapping[str, Metrics]) -> list[Plot]:
    """Return the metrics that are worth a plot, in the order of the report."""
    marks = {name: generation_steps(found) for name, found in metrics.items()}

    def plot(key: str, title: str = "", *, smooth: bool = True, share: bool = False, steps: bool = False) -> Plot:
        curves = {name: found[key] for name, found in metrics.items() if key in found}
        bounds = (-0.02, 1.02) if share else None
        marked = {} if key.startswith("optim/") else marks
        return Plot(title=title or key, curves=curves, marks=marked, smooth=smooth, bounds=bounds, steps=steps)

    def evaluated(name: str) -> list[Plot]:
        keys = sorted({key for found in metrics.values() for key in found if is_evaluation(key, name)})
        return [plot(key, key.removeprefix("eval/"), smooth=False, share=True) for key in keys]

    best = "overlap of the index's best with those by fresh scores"
    return [
        plot("loss/total"),
        *evaluated("recall@1"),
        plot("retrieval/gold_in_k", "gold passage among the k of the step", share=True),
        *evaluated("exact_match"),
        plot("index/staleness_steps", "staleness of the index (steps)", smooth=False, steps=True),
        plot("drift/overlap", best, smooth=False, share=True),
        plot("loss/generator"),
        plot("loss/retriever"),
        plot("retrieval/entropy", "entropy of p(z|q)"),
        plot("optim/grad_norm_retriever", "gradient norm, retriever"),
        plot("optim/grad_norm_generator", "gradient norm, generator"),
        plot("time/step_s", "step time (s)"),
        plot("time/search_wait_share", "search wait (share of the step)"),
    ]


def is_evaluation(key: str, name: str) -> bool:
    """Return whether `key` is `eval/<split>/<name>`."""
    return key.startswith("eval/") and key.endswith(f"/{name}")


def generation_steps(metrics: Metrics) -> list[float]:
    """Return the steps whose hits came from a newer index generation than those of the step before."""
    steps, generations = metrics.get("index/generation", ([], []))
    return [float(steps[i]) for i in range(1, len(steps)) if generations[i] > generations[i - 1]]


def event_table(name: str, path: Path) -> Table:
    """Return the events of one run with the seconds since the first, at most MAX_EVENTS, half of them from either
    end."""
    rows = [row for row in read_rows(path) if isinstance(row.get("time"), int | float)]
    half = MAX_EVENTS // 2
    shown = rows if len(rows) <= MAX_EVENTS else [*rows[:half], *rows[-half:]]
    cells: list[Sequence[Cell]] = []
    for row in shown:
        details = {key: value for key, value in row.items() if key not in ("time", "event")}
        text = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in redact(details).items())
        cells.append([float(row["time"] - rows[0]["time"]), str(row.get("event", "")), text])
    notes = [] if len(rows) == len(shown) else [f"{len(rows) - len(shown)} events in between are in {path.name}."]
    if rows:
        notes.append(f"The first was at {datetime.fromtimestamp(rows[0]['time'], UTC):%Y-%m-%d %H:%M:%S} UTC.")
    return Table(f"{name}: {len(rows)} events", ["seconds", "event", "details"], cells, notes)


def example_html(example: Example) -> str:
    """Return one decoded question as HTML."""
    right = {name: "yes" if exact_match(answer, example.gold) else "no" for name, answer in example.answers.items()}
    table = Table("", ["run", "answer", "right"], [[*item, right[item[0]]] for item in example.answers.items()])
    passages = "".join(
        f"<li{' class=gold' if passage.relevant else ''}>"
        f"{'' if passage.score is None else f'{passage.score:.3f} '}<b>{html.escape(passage.title)}</b> "
        f"{html.escape(passage.text)}</li>"
        for passage in example.passages
    )
    read = f"<details><summary>Passages that were read</summary><ol>{passages}</ol></details>" if passages else ""
    gold = html.escape(" | ".join(example.gold))
    return f"<h3>{html.escape(example.question)}</h3><p class=note>Gold: {gold}</p>{table_html(table)}{read}"


def config_html(name: str, path: Path) -> str:
    """Return the resolved configuration of one run without secrets; empty if the run has none."""
    if not path.exists():
        return ""
    import yaml

    text = yaml.safe_dump(redact(yaml.safe_load(path.read_text(encoding="utf-8"))), sort_keys=False)
    return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(redact_text(text))}</pre></details>"
