"""Tables for the console and for the report."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | float | int | None


@dataclass
class Table:
    """Rows of cells under named columns; fractions are shown with three digits, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, but the row {list(row)}")


def cell_text(cell: Cell) -> str:
    """Return the text of one cell."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def print_table(table: Table) -> str:
    """Return the table as aligned text: words to the left, numbers to the right."""
    texts = [[cell_text(cell) for cell in row] for row in table.rows]
    widths = [max(len(text) for text in column) for column in zip(table.columns, *texts, strict=True)]
    numeric = _numeric_columns(table)

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, "", line(table.columns), rule, *map(line, texts), *table.notes])


def table_html(table: Table) -> str:
    """Return the table as escaped HTML."""
    numeric = _numeric_columns(table)

    def row(tag: str, cells: Sequence[str]) -> str:
        inner = "".join(
            f"<{tag}{' class=number' if right else ''}>{html.escape(cell)}</{tag}>"
            for cell, right in zip(cells, numeric, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(row("td", [cell_text(cell) for cell in cells]) for cells in table.rows)
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    title = f"<h3>{html.escape(table.title)}</h3>\n" if table.title else ""
    head = row("th", table.columns)
    return f"{title}<div class=wide><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n{notes}"


def _numeric_columns(table: Table) -> list[bool]:
    """Return, for each column, whether every cell that holds something is a number."""
    columns = [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.columns))]
    return [bool(column) and not any(isinstance(cell, str) for cell in column) for column in columns]
