"""Draws the published results beside the simulated ones. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from dualpath.bench.simulate.paper import PaperReport
from dualpath.transfer.errors import Unavailable

_PNG_DPI = 90


def draw(report: PaperReport, folder: Path) -> tuple[Path, ...]:
    """Write the pictures; their paths. Raises Unavailable without matplotlib or right to write."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(
            f"no picture: {error}; install it with `pip install 'dualpath[bench]'`"
        ) from error
    figure = Figure(figsize=(9, 0.36 * len(report.comparisons) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
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
    try:
        figure.savefig(path, dpi=_PNG_DPI, format="png")
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}") from error
    return (path,)
