"""The runs of one request: each system at each rate, left out where it is far past its SLO."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from dualpath.bench.progress import Progress
from dualpath.bench.simulate.request import SimulationRequest
from dualpath.bench.simulate.result import SimulationResult
from dualpath.bench.simulate.simulation import simulate
from dualpath.bench.simulate.slo_capacity import (
    FAR,
    FAR_RATES,
    RatePoint,
    is_far_past,
    slo_capacity,
)


@dataclass(slots=True)
class Sweep:
    """`results` in the order of the runs; `left_out`: of each system the rates that were not run.
    `points`: of each system."""

    results: list[dict[str, object]] = field(default_factory=list)
    left_out: dict[str, list[float]] = field(default_factory=dict)
    points: dict[str, list[RatePoint]] = field(default_factory=lambda: defaultdict(list))

    def notes(self) -> tuple[str, ...]:
        """What was left out and why, for people."""
        return tuple(
            f"{name}: {', '.join(f'{rate:g}' for rate in rates)} agents/s not run: more than "
            f"{FAR:g} times past the SLO at {FAR_RATES} rates"
            for name, rates in self.left_out.items()
        )


def run_sweep(request: SimulationRequest, progress: Progress) -> Sweep:
    """Simulate it all. Raises InvalidRequest."""
    sweep = Sweep()
    for name, aps, setup in request.setups():
        if aps and is_far_past(sweep.points[name], request.slo):
            sweep.left_out.setdefault(name, []).append(aps)
            continue
        progress.stage(f"{name} at {aps:g} agents/s" if aps else name)
        result = simulate(setup, progress.move)
        progress.done(f"{result.jct_s:.0f} s simulated, {result.events} events")
        found = result.to_json()
        if aps:
            found["aps"] = aps
            sweep.points[name].append(point_of(aps, result))
        sweep.results.append(found)
    return sweep


def point_of(aps: float, result: SimulationResult) -> RatePoint:
    """Means over all turns."""
    tpot = result.records.tpot_s()
    return RatePoint(
        aps,
        float(result.records.ttft_s().mean()),
        float(tpot.mean()) if tpot.size else float("nan"),
    )


def capacities(sweep: Sweep, request: SimulationRequest) -> dict[str, dict[str, object]]:
    """By system: agents a second at the SLO; empty when offline."""
    found: dict[str, dict[str, object]] = {}
    for name, points in sweep.points.items():
        capacity = slo_capacity(points, request.slo)
        found[name] = {"agents_per_s": capacity.agents_per_s, "at_least": capacity.at_least}
    return found
