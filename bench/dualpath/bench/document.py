"""Puts measured figures into a document, between two marks, so that nobody copies them by hand."""

from __future__ import annotations

from pathlib import Path

from dualpath.transfer.errors import InvalidRequest


def put_figures(path: Path, text: str, mark: str = "measured") -> None:
    """Replace what lies between `<!-- MARK: begin -->` and `<!-- MARK: end -->`; a file that is not
    there is made of the text alone. Raises InvalidRequest if the marks are missing, OSError."""
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        return
    document = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise InvalidRequest(
            f"{path} has no place for figures: put the lines {begin.strip()} and {end} into it"
        )
    path.write_text(f"{head}{begin}{text.rstrip()}\n{end}{tail}", encoding="utf-8")
