"""Draws the gets of all entries, those that are compared beside each other. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpath.bench.peers.catalogue import Reach
from dualpath.bench.peers.comparison import Row
from dualpath.bench.peers.report import PeersReport, size_name
from dualpath.bench.picture import new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 0.8
_OURS = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
_PEERS = ("#d9d9d9", "#bdbdbd", "#969696", "#636363")


def draw(report: PeersReport, path: str) -> None:
    """Write the PNG. Raises Unavailable if matplotlib is not installed or `path` not writable."""
    counts = {
        reach: sum(1 for row in report.comparison.rows if _shown(report, row, reach))
        for reach in Reach
    }
    kinds = [reach for reach in Reach if counts[reach]]
    figure = new_figure(9, 1.5 + 0.55 * sum(counts.values()))
    grid = figure.subplots(
        max(1, len(kinds)), 1, squeeze=False, height_ratios=[counts[each] for each in kinds] or [1]
    )
    for axes, reach in zip(grid[:, 0], kinds, strict=False):
        _draw(axes, report, reach)
    write_png(figure, path)


def _shown(report: PeersReport, row: Row, reach: Reach) -> bool:
    return row.entry.reach is reach and any(row.runs.get(size) for size in report.sizes)


def _draw(axes: Axes, report: PeersReport, reach: Reach) -> None:
    shown = [row for row in report.comparison.rows if _shown(report, row, reach)]
    height = _BAR / len(report.sizes)
    for number, row in enumerate(shown):
        colours = _OURS if row.entry.ours else _PEERS
        for place, size in enumerate(report.sizes):
            rate = row.gibs("get", size, report.total_bytes) or 0.0
            at = number + (place - (len(report.sizes) - 1) / 2) * height
            axes.barh(at, rate, height=height, color=colours[place % len(colours)])
            axes.text(rate, at, f" {rate:.2g}", va="center", fontsize=6)
    axes.set_yticks(range(len(shown)), [row.entry.title for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    sizes = ", ".join(size_name(size) for size in report.sizes)
    axes.set_xlabel(f"GiB/s of gets, {reach.value}; blocks of {sizes} from above", fontsize=8)
