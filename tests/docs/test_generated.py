"""Pages that are made from the code must be as the code is now."""

import pytest

from docs import generate

PAGES = generate.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_is_fresh(path):
    assert path.read_text(encoding="utf-8") == PAGES[path], f"{path.name} is stale: run python -m docs.generate"


def test_check_writes_nothing_and_names_a_stale_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    stale = tmp_path / "metrics.md"
    stale.write_text("old", encoding="utf-8")
    monkeypatch.setattr(generate, "pages", lambda: {stale: "new"})
    assert generate.main(["--check"]) == 1
    assert "metrics.md is stale" in capsys.readouterr().err
    assert stale.read_text(encoding="utf-8") == "old"
    assert generate.main([]) == 0
    assert stale.read_text(encoding="utf-8") == "new"
    assert generate.main(["--check"]) == 0


def test_every_objective_has_a_row_and_a_gradient():
    rows = [line.split(" | ") for line in generate.objectives_table().splitlines()[2:]]
    assert len(rows) == 15
    assert all(row[3].startswith("through ") for row in rows)
    assert [row[0].strip("| `") for row in rows if row[2] == "none"] == ["inverse_cloze", "independent_cropping"]


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="needs the marks"):
        generate.between_marks("no marks here", "table")
