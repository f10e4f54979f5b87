"""Draws the published results beside the simulated ones. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.simulate.paper import PaperReport


def draw(report: PaperReport, folder: Path) -> tuple[Path, ...]:
    """Write the pictures; their paths. Raises Unavailable without matplotlib or right to write."""
    figure = new_figure(9, 0.36 * len(report.comparisons) + 1.4)
    axes = figure.subplots()
    names = [one.name for one in report.comparisons]
    places = range(len(names))
    axes.barh([y + 0.2 for y in places], [one.published for one in report.comparisons], 0.36)
    axes.barh([y - 0.2 for y in places], [one.simulated for one in report.comparisons], 0.36)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(("published", "simulated"), loc="lower right")
    path = folder / "paper.png"
    write_png(figure, path)
    return (path,)
