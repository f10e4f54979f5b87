"""Tables for people: with `rich` where it is installed, else plain text; and for documents.

The first column stands to the left, the others to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

Row = Sequence[str]
TABLE_COLUMNS = 132
"""Width when the output is no terminal: nothing is cut in a log."""


def plain_table(headings: Row, rows: Sequence[Row]) -> str:
    """Columns padded with spaces."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = []
    for row in (headings, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(headings: Row, rows: Sequence[Row]) -> str:
    """For a document."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in (headings, rule, *rows)
    )


def print_table(headings: Row, rows: Sequence[Row], out: TextIO) -> None:
    """Write a table to a stream."""
    try:
        from rich.console import Console  # noqa: PLC0415 - an optional dependency
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        print(plain_table(headings, rows), file=out)
        return
    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(file=out, width=None if out.isatty() else TABLE_COLUMNS).print(table)
