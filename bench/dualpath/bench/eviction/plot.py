"""Draws hit rate over capacity, a line a policy. Needs matplotlib."""

from __future__ import annotations

from dualpath.bench.eviction.replay import OPTIMUM, EvictionReport
from dualpath.bench.eviction.table import summary
from dualpath.bench.picture import new_figure, write_png


def draw(report: EvictionReport, path: str) -> None:
    """Write the PNG. Raises Unavailable if matplotlib is not installed or `path` not writable."""
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    capacities = list(report.rates)
    for name in next(iter(report.rates.values())):
        bound = name == OPTIMUM
        axes.plot(
            capacities,
            [100 * report.rates[blocks][name].blocks for blocks in capacities],
            "--" if bound else "o-",
            color="0.5" if bound else None,
            label=f"{name} (bound)" if bound else name,
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, blocks")
    axes.set_ylabel("blocks found, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(summary(report), fontsize=8)
    write_png(figure, path)
