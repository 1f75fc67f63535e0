"""The report of an experiment shows as many examples as `evaluation.examples` says."""

from pathlib import Path

import pytest

from cluster.results.findings import Findings, Measured
from cluster.results.summary import REPORT_FILE, write_findings


def stage(name: str, num_questions: int) -> Measured:
    rows = [
        {"id": f"q{i}", "question": f"Question {i}?", "answers": ["krob"], "prediction": f"{name} {i}"}
        for i in range(num_questions)
    ]
    return Measured(name, {"metrics": {"exact_match": 0.0}}, rows)


@pytest.mark.parametrize(("num_examples", "shown"), [(0, 0), (2, 2), (50, 7)])
def test_the_report_shows_so_many_examples(tmp_path: Path, num_examples: int, shown: int) -> None:
    findings = Findings({"frozen": stage("frozen", 9), "joint": stage("joint", 7)})
    write_findings(findings, tmp_path, {}, num_examples=num_examples)
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert [f"<h3>Question {i}?</h3>" in page for i in range(8)] == [i < shown for i in range(8)]
    assert [f"joint {i}<" in page for i in range(8)] == [f"frozen {i}<" in page for i in range(8)]
    assert ("<h2>Examples</h2>" in page) == bool(shown)
