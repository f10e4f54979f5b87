"""Draws the links' utilisation over time, a row a policy, into a PNG. Needs matplotlib.

Rows share the time axis, so a faster policy is visibly shorter. Links are told apart by colour
(node) and line (kind); the limit is the line at 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dualpath.bench.demo.report import DemoReport
from dualpath.bench.testbed.link_meter import LinkKind, LinkUse
from dualpath.transfer.errors import Unavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as FigureType

Colour = tuple[float, float, float, float]

SMOOTH_S = 0.3
"""Samples are averaged over about this time: HTB serves in bursts."""
NODES_WITH_A_LEGEND_MAX = 12
_STYLES = {LinkKind.SNIC_IN: "-", LinkKind.CNIC_IN: "--", LinkKind.CNIC_OUT: ":"}
_PNG_DPI = 120


def smoothed(
    series: Sequence[tuple[float, float]], window_s: float
) -> tuple[list[float], list[float]]:
    """Mean over a trailing window; (times, values)."""
    times, values = [], []
    start = 0
    for end in range(len(series)):
        while series[end][0] - series[start][0] >= window_s:
            start += 1
        part = [value for _, value in series[start : end + 1]]
        times.append(series[end][0])
        values.append(sum(part) / len(part))
    return times, values


def _shown(uses: Sequence[LinkUse]) -> list[LinkUse]:
    """Links that carried something; a compute link out of a prefill node never does."""
    carried = max((use.nbytes for use in uses), default=0)
    return [use for use in uses if use.nbytes > 0.01 * carried]


def _draw(axes: Axes, uses: Sequence[LinkUse], colours: Mapping[str, Colour]) -> None:
    for use in _shown(uses):
        limit = use.link.limit_bytes_per_s
        times, values = smoothed(use.series, SMOOTH_S)
        axes.plot(
            times,
            [100 * value / limit if limit else value / 1e6 for value in values],
            _STYLES[use.link.kind],
            color=colours[use.link.node],
            linewidth=2.0 if use.link.kind is LinkKind.SNIC_IN else 1.2,
            label=use.link.name,
        )


def draw_utilisation(report: DemoReport, path: str) -> None:
    """Write the PNG. Raises Unavailable if matplotlib is not installed or `path` not writable."""
    try:
        from matplotlib import colormaps  # noqa: PLC0415 - an optional dependency
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(
            f"no picture: {error}; install it with `pip install 'dualpath[bench]'`"
        ) from error
    runs = report.runs
    nodes = list(dict.fromkeys(use.link.node for run in runs for use in run.links))
    palette = colormaps["tab10" if len(nodes) <= 10 else "tab20"]
    colours = {node: palette(index % palette.N) for index, node in enumerate(nodes)}
    figure = Figure(figsize=(11, 1.2 + 1.9 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(runs), 1, sharex=True, squeeze=False)
    rows: list[Axes] = [grid[index, 0] for index in range(len(runs))]
    limited = report.shaping != "none"
    for axes, run, policy in zip(rows, runs, report.policies.values(), strict=True):
        _draw(axes, run.links, colours)
        if limited:
            axes.axhline(100, color="0.6", linewidth=0.8)
            axes.set_ylim(0, 120)
        ratio = policy.ratio_to_direct
        title = f"{run.policy}: {run.bytes_per_s / 1e6:.0f} MB/s in {run.seconds:.1f} s"
        axes.set_title(title + (f", {ratio:.2f}x direct" if ratio else ""), loc="left", fontsize=10)
        axes.set_ylabel("% of limit" if limited else "MB/s")
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("seconds since the policy's start")
    _legend(figure, rows, nodes)
    figure.suptitle(
        f"Use of the links, {report.topology}, shaping: {report.shaping}"
        + (" (CPU BOUND: do not read as bound by bandwidth)" if report.cpu_bound else "")
    )
    try:
        figure.savefig(path, dpi=_PNG_DPI)
    except OSError as error:
        raise Unavailable(f"the picture {path} could not be written: {error}") from error


def _legend(figure: FigureType, rows: Sequence[Axes], nodes: Sequence[str]) -> None:
    if len(nodes) > NODES_WITH_A_LEGEND_MAX:
        return
    handles, labels = [], []
    for axes in rows:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
