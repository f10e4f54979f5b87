"""Draws our rates beside their limits, a group a section, and the ratios. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.store.report import StoreReport, flat
from dualpath.bench.store.section import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUFFIX = "_gibs"
_OURS = frozenset(["ours", "ours_read", "ours_write", "one_writer", "durable_at_end", "verified"])
_OURS_COLOUR, _LIMIT_COLOUR = "#1f77b4", "#b0b0b0"


def rates(figures: Figures) -> list[tuple[str, float]]:
    """The figures in GiB/s."""
    found = [
        (name.removesuffix(_SUFFIX), float(value))
        for name, value in flat(figures)
        if name.endswith(_SUFFIX) and isinstance(value, int | float)
        if not name.endswith(".unverified_gibs")
    ]
    return found


def _is_ours(name: str) -> bool:
    return name.rsplit(".", maxsplit=1)[-1] in _OURS


def draw(report: StoreReport, path: str) -> None:
    """Write the PNG. Raises Unavailable if matplotlib is not installed or `path` not writable."""
    shown = [
        (section.name, found)
        for section in report.sections
        if (found := rates(report.figures[section.name]))
    ]
    rows_in = 0.2 * sum(len(found) + 1 for _, found in shown)
    figure = new_figure(9, 1.2 + rows_in)
    _draw_rates(figure.subplots(), shown)
    figure.suptitle(
        f"{report.machine['cores']} cores of {report.machine['processor']}, {report.date}",
        fontsize=9,
    )
    write_png(figure, path)


def _draw_rates(axes: Axes, shown: list[tuple[str, list[tuple[str, float]]]]) -> None:
    row, labels = 0, []
    for section, found in shown:
        for name, value in found:
            colour = _OURS_COLOUR if _is_ours(name) else _LIMIT_COLOUR
            axes.barh(row, value, color=colour, height=0.8)
            axes.text(value, row, f" {value:.2f}", va="center", fontsize=7)
            labels.append((row, f"{section}: {name}"))
            row += 1
        row += 1
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GiB/s, median of the rounds")
    axes.margins(x=0.12, y=0.01)
