"""The rate of agents at which a system still keeps an SLO, from a sweep of rates. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.slo import Slo

FAR = 2.0
"""Times what is promised: a system that is so far past it will not keep it at a higher rate."""
FAR_RATES = 2
"""After so many such rates in a row, higher ones are left out."""


@dataclass(frozen=True, slots=True)
class RatePoint:
    """Means over the turns of a run, seconds; nan where there is none."""

    agents_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class SloCapacity:
    """`agents_per_s`: the most, interpolated; 0 where not even the lowest rate keeps the SLO.
    `at_least`: the highest rate kept it too."""

    agents_per_s: float
    at_least: bool


def is_far_past(points: Sequence[RatePoint], slo: Slo) -> bool:
    """Whether the last `FAR_RATES` of these, by rising rate, are all past `FAR` times the SLO."""
    last = points[-FAR_RATES:]
    return len(last) == FAR_RATES and all(
        slo.excess(each.ttft_s, each.tpot_s) > FAR for each in last
    )


def slo_capacity(points: Sequence[RatePoint], slo: Slo) -> SloCapacity:
    """Between the last rate that keeps it, of those from the lowest on, and the first that does
    not, in proportion to how far each is from the SLO. `points` in any order, at least one."""
    rising = sorted(points, key=lambda each: each.agents_per_s)
    kept = 0.0
    for index, point in enumerate(rising):
        excess = slo.excess(point.ttft_s, point.tpot_s)
        if excess > 1:
            if not index:
                return SloCapacity(0.0, False)
            before = rising[index - 1]
            low = slo.excess(before.ttft_s, before.tpot_s)
            part = (1 - low) / (excess - low)
            rate = before.agents_per_s + part * (point.agents_per_s - before.agents_per_s)
            return SloCapacity(rate, False)
        kept = point.agents_per_s
    return SloCapacity(kept, True)
