"""What faults did to the loads: failures, waits past deadlines, and how soon the rate was back.

Pure. The rate over time is what crossed the compute links into the prefill nodes, which every
loaded byte does once (chunks that came twice count twice, as they do on the link).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.cluster.backlog import into_prefill
from dualpath.bench.cluster.fault_script import MadeFault
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.link_meter import LinkUse

BACK_SHARE = 0.95
BACK_WINDOW_S = 1.0
BACK_S_MAX = 2.0
DETECTION_S_MAX = 1.0
BOUND_FACTOR = 1.1

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class FaultEffect:
    """What followed one fault. Seconds count from the fault.

    `back_s`: the first second whose mean reached 0.95 of `limit_bytes_per_s`, what the links carry
    after it, began so long after; None if none did until the next fault or the end. `last_s`: when
    the last of the loads that were in flight had ended; `bound_s`: DETECTION_S_MAX + what was
    missing of them / limit x BOUND_FACTOR, infinite if nothing was left to carry it.
    """

    made: MadeFault
    at_s: float
    limit_bytes_per_s: float
    back_s: float | None
    in_flight: int
    last_s: float
    bound_s: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "fault": str(self.made.fault),
            "at_s": self.at_s,
            "limit_bytes_per_s": self.limit_bytes_per_s,
            "back_s": self.back_s,
            "loads_in_flight": self.in_flight,
            "last_of_them_s": self.last_s,
            "bound_s": self.bound_s if math.isfinite(self.bound_s) else None,
        }


def loaded_rate(uses: Sequence[LinkUse]) -> Points:
    """(seconds from the run's start, bytes a second) into the prefill nodes, sample by sample."""
    into = [use.series for use in into_prefill(uses)]
    return tuple(
        (samples[0][0], sum(rate for _, rate in samples)) for samples in zip(*into, strict=True)
    )


def mean_rate(points: Points, start: float, end: float) -> float:
    """Mean of a sampled rate between two times, seconds from the run's start."""
    total, before = 0.0, 0.0
    for at, rate in points:
        total += rate * max(0.0, min(at, end) - max(before, start))
        before = at
    return total / (end - start) if end > start else 0.0


def back_after(points: Points, at_s: float, until_s: float, wanted: float) -> float | None:
    """Seconds from `at_s` to the start of the first window with a mean of `wanted`, or None."""
    starts = [at_s, *(at for at, _ in points if at_s < at)]
    for start in starts:
        if start + BACK_WINDOW_S > until_s:
            return None
        if mean_rate(points, start, start + BACK_WINDOW_S) >= wanted:
            return start - at_s
    return None


def _in_flight(outcomes: Sequence[LoadOutcome], made_s: float) -> list[LoadOutcome]:
    return [o for o in outcomes if o.ended_s - o.elapsed_s <= made_s < o.ended_s]


def _remaining_bytes(
    made_s: float, at_s: float, outcomes: Sequence[LoadOutcome], points: Points
) -> float:
    """What was missing of the loads in flight: their bytes without those that had come and were not
    of loads that had ended. Headers and chunks that came twice are taken out evenly."""
    crossed = mean_rate(points, 0.0, points[-1][0]) * points[-1][0] if points else 0.0
    payload = sum(o.nbytes for o in outcomes) / crossed if crossed else 0.0
    came = mean_rate(points, 0.0, at_s) * at_s * payload
    ended = sum(o.nbytes for o in outcomes if o.ended_s <= made_s)
    wanted = sum(o.nbytes for o in _in_flight(outcomes, made_s))
    return min(float(wanted), max(0.0, wanted - (came - ended)))


def effects_of(
    made: Sequence[MadeFault],
    limits: Sequence[float],
    outcomes: Sequence[LoadOutcome],
    points: Points,
    *,
    started_s: float,
    backlog_until_s: float,
) -> tuple[FaultEffect, ...]:
    """One effect a fault; `limits` are what the links carry after each. `started_s` is monotonic,
    `backlog_until_s` counts from it: later the rate falls for want of loads."""
    effects = []
    for index, each in enumerate(made):
        at_s = each.made_s - started_s
        later = made[index + 1].made_s - started_s if index + 1 < len(made) else math.inf
        caught = _in_flight(outcomes, each.made_s)
        last_s = max((o.ended_s for o in caught), default=each.made_s) - each.made_s
        limit, left = limits[index], _remaining_bytes(each.made_s, at_s, outcomes, points)
        bound = DETECTION_S_MAX + BOUND_FACTOR * left / limit if limit else math.inf
        until_s = min(later, backlog_until_s)
        back = back_after(points, at_s, until_s, BACK_SHARE * limit) if limit else None
        effects.append(FaultEffect(each, at_s, limit, back, len(caught), last_s, bound))
    return tuple(effects)
