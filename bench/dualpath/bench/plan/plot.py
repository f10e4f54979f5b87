"""Draws turns a second over the ratio of prefill to decode nodes, a line a way of loading, with the
bottleneck-free range shaded. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.plan.capacity import Loading
from dualpath.bench.plan.planner import Plan

if TYPE_CHECKING:
    from dualpath.bench.plan.ratio_simulation import SimulatedRatio


def draw(plan: Plan, path: str, simulated: Sequence[SimulatedRatio] = ()) -> None:
    """Write the PNG; simulated ratios as crosses.

    Raises Unavailable if matplotlib is not installed or `path` not writable.
    """
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    ratios = [each.cluster.prefill / each.cluster.decode for each in plan.ratios]
    for loading, style in zip(Loading, ("s-", "o-", "^--"), strict=True):
        rates = [each.capacities[loading].turns_per_s for each in plan.ratios]
        (line,) = axes.plot(ratios, rates, style, label=loading.value)
        points = {each.ratio: each.turns_per_s for each in simulated if each.loading is loading}
        if points:
            at = [each for each in plan.ratios if each.name in points]
            places = [each.cluster.prefill / each.cluster.decode for each in at]
            heights = [points[each.name] for each in at]
            label = f"{loading.value}, simulated"
            axes.plot(places, heights, "x", color=line.get_color(), markersize=10, label=label)
    if not plan.range.empty:
        axes.axvspan(
            max(plan.range.low, min(ratios) / 2),
            min(plan.range.high, max(ratios) * 2),
            alpha=0.12,
            color="green",
            label="bottleneck-free",
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prefill nodes / decode nodes")
    axes.set_ylabel("turns a second (projected; crosses: simulated)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(
        f"{plan.geometry.name}, {plan.workload}, {plan.request.gpus} GPUs: "
        f"dual path {plan.speed_up(Loading.DUAL):.2f}x, split {plan.speed_up(Loading.SPLIT):.2f}x",
        fontsize=9,
    )
    write_png(figure, path)
