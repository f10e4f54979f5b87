"""Draws a cluster report into a PNG: the policies against the limit, or faults over time.

Needs matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpath.bench.cluster.report import (
    ClusterReport,
    FaultRun,
    TopologyResult,
    hand_off_note,
)
from dualpath.transfer.errors import Unavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_SAMPLES = 5
"""Samples that a point of the rate over time is the mean of: half a second."""
_PNG_DPI = 120


def draw(report: ClusterReport, path: str) -> None:
    """Write the PNG. Raises Unavailable if matplotlib is not installed or `path` not writable."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(
            f"no picture: {error}; install it with `pip install 'dualpath[bench]'`"
        ) from error
    faults = next((each.faults for each in report.results if each.faults is not None), None)
    rows = 2 if faults is not None else 1
    figure = Figure(figsize=(10, 1.5 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False)
    if faults is not None:
        _draw_faults(grid[0, 0], grid[1, 0], faults)
    elif report.config.lone:
        _draw_lone(grid[0, 0], report)
    else:
        _draw_policies(grid[0, 0], report.results)
    labels = ", ".join(result.topology.label for result in report.results)
    bound = " (CPU BOUND)" if any(result.cpu_bound for result in report.results) else ""
    figure.suptitle(f"{labels}, {hand_off_note(report.config)}{bound}")
    try:
        figure.savefig(path, dpi=_PNG_DPI)
    except OSError as error:
        raise Unavailable(f"the picture {path} could not be written: {error}") from error


def _draw_policies(axes: Axes, results: tuple[TopologyResult, ...]) -> None:
    """Groups of bars: each policy as a multiple of direct, and the limit as a line."""
    names = list(dict.fromkeys(name for result in results for name in result.policies))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places, heights = [], []
        for group, result in enumerate(results):
            if name in result.policies:
                places.append(group + (index - (len(names) - 1) / 2) * width)
                heights.append(result.policies[name].bytes_per_s / 1e6)
        bars = axes.bar(places, heights, width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    for group, result in enumerate(results):
        limit = result.limit_bytes_per_s / 1e6
        label = "sum of the links" if group == 0 else None
        axes.plot([group - 0.45, group + 0.45], [limit, limit], "k--", lw=1, label=label)
    axes.set_xticks(range(len(results)), [result.topology.label for result in results])
    axes.set_ylabel("loaded MB/s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")


def _draw_lone(axes: Axes, report: ClusterReport) -> None:
    for policy in dict.fromkeys(lone.policy for each in report.results for lone in each.lone):
        found = [lone for each in report.results for lone in each.lone if lone.policy == policy]
        widths = [str(lone.width) for lone in found]
        axes.plot(widths, [lone.ratio for lone in found], "o-", label=policy)
    axes.axhline(1, color="k", lw=1, ls="--", label="limit")
    axes.set_ylim(0.9, None)
    axes.set_xlabel("width of the engine (compute links)")
    axes.set_ylabel("time of a load over the limit's")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_faults(above: Axes, below: Axes, faults: FaultRun) -> None:
    """Loaded rate over time with its limit above, the time of each load by its start below."""
    started_s = faults.run.links[0].started_s
    times = [at for at, _ in faults.rate]
    rates = [rate / 1e6 for _, rate in faults.rate]
    smooth = [
        sum(part) / len(part)
        for index in range(len(rates))
        if (part := rates[max(0, index - SMOOTH_SAMPLES + 1) : index + 1])
    ]
    above.plot(times, smooth, lw=1.2, label="loaded")
    steps = [(0.0, faults.full_bytes_per_s)]
    steps += [(effect.at_s, effect.limit_bytes_per_s) for effect in faults.effects]
    steps.append((times[-1] if times else 0.0, steps[-1][1]))
    above.step(
        [at for at, _ in steps],
        [limit / 1e6 for _, limit in steps],
        "k--",
        where="post",
        lw=1,
        label="sum of the links",
    )
    above.set_ylim(0, 1.25 * faults.full_bytes_per_s / 1e6)
    above.set_ylabel("MB/s")
    above.legend(fontsize=8, loc="lower left")
    outcomes = faults.run.outcomes
    starts = [each.ended_s - each.elapsed_s - started_s for each in outcomes]
    below.plot(starts, [1e3 * each.elapsed_s for each in outcomes], ".", ms=4)
    below.set_ylabel("time of a load, ms")
    below.set_xlabel("seconds since the first load (below: by the load's start)")
    for index, effect in enumerate(faults.effects):
        for axes in (above, below):
            axes.axvline(effect.at_s, color="tab:red", lw=1, ls=":")
            axes.grid(alpha=0.3)
        # In three rows, since faults may follow one another closely.
        height = (1.22 - 0.055 * (index % 3)) * faults.full_bytes_per_s / 1e6
        text = f" {effect.made.fault}"
        above.text(effect.at_s, height, text, fontsize=7, color="tab:red", va="top")
