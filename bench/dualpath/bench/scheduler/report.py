"""What `dualpath bench scheduler` found: the machine, the figures, a table."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from dualpath.bench.machine import busy_line, describe_machine
from dualpath.bench.scheduler.measurement import Figures
from dualpath.bench.table import print_table

HEADINGS = (
    "policy",
    "GPUs",
    "nodes",
    "requests/s",
    "fetch p50 ms",
    "fetch p99 ms",
    "fetch max ms",
    "requests/fetch",
)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures, and what they were measured on."""

    figures: Sequence[Figures]
    machine: Mapping[str, object]
    date: str

    @classmethod
    def now(cls, figures: Sequence[Figures]) -> Report:
        """Of this machine, today."""
        return cls(figures, describe_machine(), datetime.datetime.now(datetime.UTC).isoformat())

    def to_json(self) -> dict[str, object]:
        """As plain values; times in seconds."""
        return {
            "date": self.date,
            "machine": dict(self.machine),
            "runs": [dataclasses.asdict(one) for one in self.figures],
        }


def print_report(report: Report, out: TextIO) -> None:
    """A table for people, and the machine."""
    rows = [
        (
            one.policy,
            f"{one.shape.engines:,}",
            f"{one.shape.prefill + one.shape.decode:,}",
            f"{one.requests_per_s:,.0f}",
            f"{one.fetch_s_p50 * 1e3:.2f}",
            f"{one.fetch_s_p99 * 1e3:.2f}",
            f"{one.fetch_s_max * 1e3:.2f}",
            f"{one.assignments_per_fetch:.1f}",
        )
        for one in report.figures
    ]
    print_table(HEADINGS, rows, out)
    machine = report.machine
    print(f"{machine['processor']}, one of {machine['cores']} cores; measured", file=out)
    busy = busy_line(machine)
    if busy:
        print(busy, file=out)
