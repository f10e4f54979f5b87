"""A published number beside a simulated one, and the report that such comparisons make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Comparison:
    """`tolerance`: the share by which it may deviate, 0 where it is reported only. `ceiling`: less
    than published is no miss."""

    name: str
    published: float
    simulated: float
    tolerance: float = 0.0
    note: str = ""
    ceiling: bool = False

    @property
    def deviation(self) -> float:
        """Simulated over published, less 1."""
        return self.simulated / self.published - 1

    @property
    def verdict(self) -> str:
        """met, missed, or reported."""
        if not self.tolerance:
            return "reported"
        deviation = self.deviation if self.ceiling else abs(self.deviation)
        return "met" if deviation <= self.tolerance else "missed"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings, with what they show."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class PaperReport:
    """Comparisons, tables, curves (a name to points of x and y), every run's figures by its name,
    and the processor seconds of each."""

    comparisons: list[Comparison] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    runs: dict[str, Mapping[str, object]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """A name of a result: published, simulated, deviation, verdict; then all runs."""
        found: dict[str, object] = {
            one.name: {
                "published": one.published,
                "simulated": round(one.simulated, 4),
                "deviation": round(one.deviation, 4),
                "tolerance": one.tolerance,
                "verdict": one.verdict,
                "note": one.note,
            }
            for one in self.comparisons
        }
        return found | {"curves": self.curves, "runs": self.runs, "processor_s": self.seconds}
