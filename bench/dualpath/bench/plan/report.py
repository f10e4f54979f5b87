"""A plan as text for people, and as values for JSON. Everything in it is projected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualpath.bench.plan.bottleneck_range import as_ratio
from dualpath.bench.plan.capacity import Capacity, Loading
from dualpath.bench.plan.planner import LITTLE_GAIN, Plan
from dualpath.bench.table import plain_table

if TYPE_CHECKING:
    from dualpath.bench.plan.ratio_simulation import SimulatedRatio

_ROWS_MAX = 16


def as_json(plan: Plan, simulated: Sequence[SimulatedRatio] = ()) -> dict[str, object]:
    """Units are in the names; infinite values are None. `simulated` has what was, if anything."""
    demand, rates = plan.demand, plan.request.rates
    return {
        "kind": "projected",
        "pays": plan.pays,
        "model": plan.geometry.name,
        "workload": plan.workload,
        "gpus": plan.request.gpus,
        "gpus_per_node": rates.gpus,
        "snic_bytes_per_s": rates.snic_bytes_per_s,
        "cnic_bytes_per_s": rates.cnic_bytes_per_s,
        "dram_bytes_per_s": rates.dram_bytes_per_s,
        "slo": plan.request.slo.to_json(),
        "bottleneck_free_range": {
            "empty": plan.range.empty,
            "low": _finite(plan.range.low),
            "high": _finite(plan.range.high),
            "bounds": {each.device: _finite(each.ratio) for each in plan.range.bounds},
        },
        "turn": {
            "cached_tokens": demand.cached_tokens,
            "new_tokens": demand.new_tokens,
            "generated_tokens": demand.generated_tokens,
            "hit_share": demand.hit_share,
            "load_bytes": demand.load_bytes,
            "written_bytes": demand.written_bytes,
            "pflop": demand.pflop,
            "load_gb_per_pflop": demand.load_bytes / 1e9 / demand.pflop,
            "prefill_engine_s": demand.prefill_engine_s,
            "turns_per_agent": demand.turns_per_agent,
        },
        "best": {each.value: _best(plan, each) for each in Loading},
        "ratios": [
            {
                "ratio": ratio.name,
                "bottleneck_free": plan.range.holds(ratio.cluster.prefill, ratio.cluster.decode),
                "turns_per_s": {each.value: ratio.capacities[each].turns_per_s for each in Loading},
                "binds": {each.value: ratio.capacities[each].binds for each in Loading},
            }
            for ratio in plan.ratios
        ],
        "simulated": [each.to_json() for each in simulated],
        "left_out": list(plan.left_out),
        "warnings": list(plan.warnings),
    }


def as_text(plan: Plan, simulated: Sequence[SimulatedRatio] = ()) -> str:
    """A short report; it says of each figure whether it is closed form or simulated."""
    demand, request = plan.demand, plan.request
    lines = [
        f"{plan.geometry.name}, {plan.workload}: {request.nodes} nodes of {request.rates.gpus} GPUs"
        " (projected, closed form)",
        "",
        f"a turn      {demand.cached_tokens:,.0f} tokens cached ({demand.hit_share:.1%}), "
        f"{demand.new_tokens:,.0f} new, {demand.generated_tokens:,.0f} generated",
        f"            {demand.load_bytes / 1e9:.3f} GB to load, {demand.pflop:.4f} PFLOP to "
        f"compute: {demand.load_bytes / 1e9 / demand.pflop:.1f} GB a PFLOP",
        f"range       {_range_text(plan)}",
        "",
        _table(plan),
        "",
        *(_best_text(plan, each) for each in Loading),
    ]
    dual = plan.best(Loading.DUAL)
    capacity = dual.capacities[Loading.DUAL]
    lines += [
        "",
        f"speed-up    {plan.speed_up(Loading.DUAL):.2f}x by dual path, "
        f"{plan.speed_up(Loading.SPLIT):.2f}x by split, each at its best ratio; at {dual.name} "
        f"{plan.speed_up_at(Loading.DUAL):.2f}x",
        f"binds       {capacity.binds} at {dual.name}; next {_next(capacity)}",
        f"verdict     {_verdict(plan)}",
    ]
    if simulated:
        lines += ["", *_simulated(simulated), ""]
    lines += [f"left out    {text}" for text in plan.left_out]
    lines += [f"warning     {text}" for text in plan.warnings]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    """Whether it pays, by the closed form."""
    if plan.pays:
        return f"a second path pays: {plan.speed_up(Loading.DUAL):.2f}x (closed form)"
    basic = plan.best(Loading.BASIC).capacities[Loading.BASIC]
    return (
        f"a second path does NOT pay here: {basic.binds} binds already without it, and that is not "
        "what it relieves (closed form)"
    )


def _simulated(simulated: Sequence[SimulatedRatio]) -> list[str]:
    rows = [
        [
            f"{each.ratio} {each.loading.value}",
            f"{each.closed_turns_per_s:.1f}",
            f"{each.turns_per_s:.1f}",
            f"{100 * each.deviation:+.0f} %",
            f"1/{each.scale}" if each.scale > 1 else "whole",
        ]
        for each in simulated
    ]
    heads = ["simulated", "closed form, turns/s", "simulated, turns/s", "deviation", "cluster"]
    lines = [plain_table(heads, rows)]
    best = {
        loading: max(
            (each for each in simulated if each.loading is loading),
            key=lambda each: each.turns_per_s,
        )
        for loading in Loading
    }
    dual, basic = best[Loading.DUAL], best[Loading.BASIC]
    if basic.turns_per_s:
        gain = dual.turns_per_s / basic.turns_per_s
        word = "pays" if gain >= LITTLE_GAIN else "does NOT pay here"
        lines.append(
            f"simulated   {gain:.2f}x by dual path at {dual.ratio} over basic at {basic.ratio}, "
            f"each at its best of these: a second path {word}"
        )
    lines += [
        f"differs     {each.ratio} {each.loading.value}: {each.why}"
        for each in simulated
        if each.why
    ]
    return lines


def _next(capacity: Capacity) -> str:
    following = capacity.binds_next
    if following is None:
        return "nothing else"
    return f"{following.name}, {following.turns_per_s / capacity.turns_per_s - 1:.0%} above"


def _range_text(plan: Plan) -> str:
    found = plan.range
    bounds = ", ".join(
        f"{each.device} {'>=' if each.least else '<='} {as_ratio(each.ratio)}"
        for each in found.bounds
    )
    if found.empty:
        return f"no P/D is free of other bottlenecks than storage ({bounds})"
    return (
        f"{as_ratio(found.low)} <= P/D <= {as_ratio(found.high)} is free of other bottlenecks than "
        f"storage\n            ({bounds})"
    )


def _table(plan: Plan) -> str:
    best = {plan.best(each).name for each in Loading}
    shown = list(plan.ratios)
    if len(shown) > _ROWS_MAX:
        step = len(shown) / _ROWS_MAX
        kept = {round(index * step) for index in range(_ROWS_MAX)}
        shown = [each for at, each in enumerate(shown) if at in kept or each.name in best]
    rows = []
    for ratio in shown:
        held = plan.range.holds(ratio.cluster.prefill, ratio.cluster.decode)
        cells = [f"{ratio.capacities[each].turns_per_s:.1f}" for each in Loading]
        rows.append(
            [ratio.name, "yes" if held else "no", *cells, ratio.capacities[Loading.DUAL].binds]
        )
    heads = ["ratio", "in range", *(f"{each.value}, turns/s" for each in Loading)]
    return plain_table([*heads, "dual path binds"], rows)


def _best_text(plan: Plan, loading: Loading) -> str:
    best = plan.best(loading)
    capacity = best.capacities[loading]
    agents = capacity.turns_per_s / plan.demand.turns_per_agent
    return (
        f"{loading.value:<10}  best {best.name}: {capacity.turns_per_s:.1f} turns/s "
        f"({agents:.3f} agents/s), {capacity.direct:.0%} read by prefill; {capacity.binds} binds"
    )


def _best(plan: Plan, loading: Loading) -> dict[str, object]:
    best = plan.best(loading)
    capacity = best.capacities[loading]
    return {
        "ratio": best.name,
        "prefill_nodes": best.cluster.prefill,
        "decode_nodes": best.cluster.decode,
        "turns_per_s": capacity.turns_per_s,
        "agents_per_s": capacity.turns_per_s / plan.demand.turns_per_agent,
        "direct_share": capacity.direct,
        "binds": capacity.binds,
        "binds_next": capacity.binds_next.name if capacity.binds_next else None,
        "devices_turns_per_s": {each.name: _finite(each.turns_per_s) for each in capacity.devices},
        "speed_up": plan.speed_up(loading),
        "speed_up_at_same_ratio": plan.speed_up_at(loading),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
