"""The report: one file without references outward, escaped, with every run's curves; and the console's tables."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training.reporting.jsonl import append_line
from training.reporting.plots import COLOURS, Plot, plot_svg, running_mean
from training.reporting.report import (
    Example,
    ReadPassage,
    Section,
    Table,
    event_table,
    generation_steps,
    print_table,
    read_metrics,
    run_report,
    write_report,
)

VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects text and whatever points out of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.outward: list[str] = []
        self.tags: list[str] = []
        self.identifiers: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.outward.append(f"{tag} {name}={value}")
            if name == "id":
                self.identifiers.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(folder: Path, recall: float, steps: int = 60) -> Path:
    folder.mkdir()
    for step in range(1, steps + 1):
        generation = step // 20
        row: dict[str, Any] = {
            "step": step,
            "time": 1.7e9 + step,
            "loss/total": 3.0 / step,
            "index/generation": generation,
        }
        append_line(folder / "metrics.jsonl", {**row, "index/staleness_steps": step - 20 * generation})
        if step % 20 == 0:
            scores = {"eval/test/recall@1": recall * step / steps, "eval/test/exact_match": recall * 0.8 * step / steps}
            append_line(folder / "metrics.jsonl", {"step": step, "time": 1.7e9 + step, **scores})
            event = {"event": "commit", "generation": step // 20, "note": "<b>bold</b>", "url": "http://me:hidden@host"}
            append_line(folder / "events.jsonl", {"time": 1.7e9 + step, **event})
    (folder / "config.yaml").write_text("run:\n  name: <x>\n  api_key: hidden\ntraining:\n  steps: 60\n")
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    runs = {"joint <1>": write_run(tmp_path / "joint", 0.9), "frozen": write_run(tmp_path / "frozen", 0.2)}
    table = Table("Held-out people", ["run", "recall@1"], [["joint <1>", 0.93], ["frozen", None]], ["<i>one seed</i>"])
    passages = [ReadPassage("Marno <Velik>", "plays the tokari & more", 12.5, relevant=True)]
    example = Example("Who <plays>?", ["tokari"], {"joint <1>": "the Tokari", "frozen": "</td>"}, passages)
    run_report(runs, [table], examples=[example], out=tmp_path / "out" / "report.html", title="Two & more")
    return tmp_path / "out" / "report.html"


def test_report_needs_no_other_file(report: Path) -> None:
    page = Page(report)
    content = report.read_text(encoding="utf-8")
    assert page.outward == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", content)
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]
    assert len(content) < 500_000


def test_report_shows_what_was_asked_for(report: Path) -> None:
    page = Page(report)
    for text in (
        "Two & more",
        "Held-out people",
        "0.930",
        "<i>one seed</i>",
        "joint <1>",
        "Who <plays>?",
        "Marno <Velik>",
        "</td>",
        "loss/total",
        "test/recall@1",
        "test/exact_match",
        "staleness of the index (steps)",
        "3 events",
        "<b>bold</b>",
        "steps: 60",
    ):
        assert text in page.text, text
    assert page.tags.count("svg") == 4
    assert "hidden" not in report.read_text(encoding="utf-8")


def test_plots_are_whole_and_their_references_stay_inside(report: Path) -> None:
    content = report.read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    seen: set[str] = set()
    for svg in svgs:
        element = ElementTree.fromstring(svg)
        identifiers = {node.get("id") for node in element.iter() if node.get("id")}
        references = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert references <= identifiers
        assert not seen & identifiers
        seen |= {str(identifier) for identifier in identifiers}
        assert "currentColor" in svg
        assert all(colour in svg for colour in COLOURS[:2])


def test_both_runs_and_their_refreshes_are_drawn() -> None:
    marks = {"joint": [20.0, 40.0]}
    curves = {"joint": ([1, 2, 3], [0.1, 0.2, 0.3]), "frozen": ([1, 2, 3], [0.1, 0.1, 0.1])}
    svg = plot_svg(Plot(title="recall", curves=curves, marks=marks), {"joint": "#aa0001", "frozen": "#aa0002"})
    assert svg.count('stroke-dasharray: 1,1.65') == 2  # dotted verticals  # fmt: skip
    assert "joint" in svg
    assert "frozen" in svg
    assert svg == plot_svg(Plot(title="recall", curves=curves, marks=marks), {"joint": "#aa0001", "frozen": "#aa0002"})


def test_a_run_without_metrics_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run_report({"run": tmp_path / "run"}, [], examples=[], out=tmp_path / "report.html")
    assert "No metrics yet." in Page(tmp_path / "report.html").text


def test_sections_are_written_in_order(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", "T", [Section("B & b", "<p>one</p>"), Section("A", "<p>two</p>")])
    text = Page(tmp_path / "report.html").text
    assert text.index("B & b") < text.index("one") < text.index("two")


def test_read_metrics_drops_what_a_resume_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (3, 30.0)):
        append_line(path, {"step": step, "time": 0.0, "loss/total": loss})
    append_line(path, {"step": 3, "time": 0.0, "eval/test/recall@1": 0.5, "loss/total": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 4, "loss/to')
    assert read_metrics(path) == {"loss/total": ([1, 2, 3], [5.0, 4.0, 30.0]), "eval/test/recall@1": ([3], [0.5])}
    assert read_metrics(tmp_path / "absent.jsonl") == {}


def test_generation_steps() -> None:
    assert generation_steps({"index/generation": ([1, 2, 3, 4, 5], [0, 0, 1, 1, 3])}) == [3.0, 5.0]
    assert generation_steps({}) == []


def test_long_event_lists_are_cut_in_the_middle(tmp_path: Path) -> None:
    for number in range(250):
        append_line(tmp_path / "events.jsonl", {"time": 100.0 + number, "event": "x", "number": number})
    table = event_table("run", tmp_path / "events.jsonl")
    assert len(table.rows) == 200
    assert [table.rows[i][0] for i in (0, 99, 100, 199)] == [0.0, 99.0, 150.0, 249.0]
    assert table.notes[0] == "50 events in between are in events.jsonl."


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0]) == [1.0, 2.0]
    assert running_mean([float(i) for i in range(40)])[-1] == pytest.approx(sum(range(25, 40)) / 15)


def test_print_table() -> None:
    rows = [["joint", 0.9312, 1080, None], ["frozen (fused)", 0.15, 12, 0.5]]
    table = Table("Held-out people", ["run", "recall@1", "questions", "f1"], rows, ["one seed"])
    assert print_table(table).splitlines() == [
        "Held-out people",
        "",
        "run             recall@1  questions     f1",
        "--------------  --------  ---------  -----",
        "joint              0.931      1,080      -",
        "frozen (fused)     0.150         12  0.500",
        "one seed",
    ]


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table 'T' has 2 columns, but the row \['a'\]"):
        Table("T", ["x", "y"], [["a"]])


def test_metrics_lines_are_strict_json(tmp_path: Path) -> None:
    append_line(tmp_path / "x.jsonl", {"a": float("inf"), "b": [float("nan")], "c": Path("p")})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"a": None, "b": [None], "c": "p"}
