"""A figure to draw on, and its PNG. Owns what each picture of the bench needs of matplotlib, which
is optional and slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualpath.transfer.errors import Unavailable

_PNG_DPI = 90


def new_figure(width_in: float, height_in: float) -> Any:
    """An empty matplotlib figure of that size in inches. Raises Unavailable without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(
            f"no picture: {error}; install it with `pip install 'dualpath[bench]'`"
        ) from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: str | Path) -> None:
    """Raises Unavailable if `path` cannot be written."""
    try:
        figure.savefig(path, dpi=_PNG_DPI, format="png")
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}") from error
