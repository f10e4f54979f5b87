"""What an isolation run found, as values: percentiles by case and size, ratios, targets. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.bench.isolation.protected import SIZES
from dualpath.bench.isolation.scene import Case, Window
from dualpath.bench.store.section import Target

TARGETS = (
    Target("lanes_1m_p50_ratio", most=1.05),
    Target("lanes_1m_p99_ratio", most=1.3),
    Target("no_lanes_1m_p50_ratio", least=2.0),
    Target("no_lanes_4k_p50_ratio", least=10.0),
)
"""Ratios to `control` in the same run."""
PERCENTILES = (50, 99)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, rank - 1)]


@dataclass(slots=True)
class Figures:
    """Windows by case, in order of the rounds, and what they were measured on."""

    link_bytes_per_s: float
    machine: Mapping[str, object]
    date: str
    windows: dict[Case, list[Window]] = field(default_factory=lambda: {case: [] for case in Case})

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(self.windows[Case.CONTROL])

    def times_ms(self, case: Case, size: str) -> list[float]:
        """Of all rounds."""
        return [time for window in self.windows[case] for time in window.times_ms[size]]

    def at_ms(self, case: Case, size: str, percent: int) -> float:
        """A percentile of a case, in milliseconds."""
        return percentile(self.times_ms(case, size), percent)

    def kv_mb_per_s(self, case: Case) -> float:
        """Median over the rounds of the KV's rate, 10^6 bytes a second."""
        return statistics.median(each.kv_bytes_per_s for each in self.windows[case]) / 1e6

    def ratios(self) -> dict[str, object]:
        """Of each case's percentiles to those of the control, by name."""
        return {
            f"{case.value}_{size}_p{percent}_ratio": self.at_ms(case, size, percent)
            / self.at_ms(Case.CONTROL, size, percent)
            for case in Case
            if case is not Case.CONTROL
            for size in SIZES
            for percent in PERCENTILES
        }

    def misses(self) -> list[str]:
        """The targets that do not hold."""
        ratios = self.ratios()
        return [text for target in TARGETS if (text := target.missed(ratios))]

    def to_json(self) -> dict[str, object]:
        """By case: percentiles of operations, of messages under `4k`, the KV's rate."""
        return {
            **{case.value: self._case(case) for case in Case},
            "ratios": self.ratios(),
            "misses": self.misses(),
            "rounds": self.rounds,
            "link_mb_per_s": self.link_bytes_per_s / 1e6,
            "date": self.date,
            "machine": dict(self.machine),
        }

    def _case(self, case: Case) -> dict[str, object]:
        def of(size: str) -> dict[str, object]:
            found: dict[str, object] = {
                f"p{percent}_ms": self.at_ms(case, size, percent) for percent in PERCENTILES
            }
            return {**found, "count": len(self.times_ms(case, size))}

        return {**of("1m"), "4k": of("4k"), "kv_mb_per_s": self.kv_mb_per_s(case)}
