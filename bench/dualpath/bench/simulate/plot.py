"""Draws the published results beside the simulated ones, and curves. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.simulate.comparison import PaperReport

Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
_RATIO_MAX = 5.0
_COLUMNS = 2


def draw(report: PaperReport, folder: Path) -> tuple[Path, ...]:
    """Write the pictures; their paths. Raises Unavailable without matplotlib or right to write."""
    # Seconds and bytes would dwarf the ratios.
    shown = [one for one in report.comparisons if one.published <= _RATIO_MAX]
    figure = new_figure(9, 0.36 * len(shown) + 1.4)
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh([y + 0.2 for y in places], [one.published for one in shown], 0.36)
    axes.barh([y - 0.2 for y in places], [one.simulated for one in shown], 0.36)
    axes.set_yticks(list(places), [one.name for one in shown], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(("published", "simulated"), loc="lower right")
    path = folder / "paper.png"
    write_png(figure, path)
    return (path, draw_curves(report.curves, folder / "paper_curves.png"))


def draw_curves(curves: Curves, path: Path) -> Path:
    """A picture a group of curves, in one file. Raises as `draw`."""
    rows = -(-len(curves) // _COLUMNS)
    figure = new_figure(9, 3.0 * max(1, rows))
    grid = figure.subplots(max(1, rows), _COLUMNS, squeeze=False)
    places = [axes for row in grid for axes in row]
    for axes, (title, lines) in zip(places, curves.items(), strict=False):
        for name, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, label=name)
        axes.set_title(title, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    for axes in places[len(curves) :]:
        axes.set_axis_off()
    write_png(figure, path)
    return path
