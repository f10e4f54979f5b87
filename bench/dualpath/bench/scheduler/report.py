"""What `dualpath bench scheduler` found: the machine, the figures, a table."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from dualpath.bench.machine import busy_line
from dualpath.bench.scheduler.edge import EdgeFigures
from dualpath.bench.scheduler.measurement import Figures
from dualpath.bench.table import Row, markdown_table, print_table

HEADINGS = (
    "policy",
    "GPUs",
    "nodes",
    "requests/s",
    "per processor s",
    "fetch p50 ms",
    "fetch p99 ms",
    "p99, processor ms",
    "fetch max ms",
    "requests/fetch",
)
EDGE_HEADINGS = (
    "over gRPC, policy",
    "GPUs",
    "leaders",
    "requests",
    "requests/s",
    "per processor s",
    "scheduler's cores",
)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures, and what they were measured on."""

    figures: Sequence[Figures]
    edges: Sequence[EdgeFigures]
    machine: Mapping[str, object]
    date: str

    @classmethod
    def now(
        cls,
        figures: Sequence[Figures],
        edges: Sequence[EdgeFigures],
        machine: Mapping[str, object],
    ) -> Report:
        """Of this machine, as it was when it began; today."""
        return cls(figures, edges, machine, datetime.datetime.now(datetime.UTC).isoformat())

    def to_json(self) -> dict[str, object]:
        """As plain values; times in seconds."""
        return {
            "date": self.date,
            "machine": dict(self.machine),
            "runs": [dataclasses.asdict(one) for one in self.figures],
            "grpc": [
                {
                    **dataclasses.asdict(one),
                    "requests_per_s": one.requests_per_s,
                    "requests_per_processor_s": one.requests_per_processor_s,
                }
                for one in self.edges
            ],
        }


def tables(report: Report) -> list[tuple[Row, list[Row]]]:
    """Those that have rows: the decisions, and the service."""
    rows: list[Row] = [
        (
            one.policy,
            f"{one.shape.engines:,}",
            f"{one.shape.prefill + one.shape.decode:,}",
            f"{one.requests_per_s:,.0f}",
            f"{one.requests_per_processor_s:,.0f}",
            f"{one.fetch_s_p50 * 1e3:.2f}",
            f"{one.fetch_s_p99 * 1e3:.2f}",
            f"{one.fetch_processor_s_p99 * 1e3:.2f}",
            f"{one.fetch_s_max * 1e3:.2f}",
            f"{one.assignments_per_fetch:.1f}",
        )
        for one in report.figures
    ]
    edges: list[Row] = [
        (
            one.policy,
            f"{one.shape.engines:,}",
            f"{one.groups}",
            f"{one.requests:,}",
            f"{one.requests_per_s:,.0f}",
            f"{one.requests_per_processor_s:,.0f}",
            f"{one.cores:.2f}",
        )
        for one in report.edges
    ]
    found: list[tuple[Row, list[Row]]] = [(HEADINGS, rows), (EDGE_HEADINGS, edges)]
    return [(headings, rows) for headings, rows in found if rows]


def print_report(report: Report, out: TextIO) -> None:
    """Tables for people, and the machine."""
    for headings, rows in tables(report):
        print_table(headings, rows, out)
    print(*_notes(report), sep="\n", file=out)


def markdown(report: Report) -> str:
    """The same for a document."""
    parts = [markdown_table(headings, rows) for headings, rows in tables(report)]
    return "\n\n".join([" ".join(_notes(report)), *parts])


def _notes(report: Report) -> list[str]:
    machine = report.machine
    notes = [f"{machine['processor']}, one of {machine['cores']} cores; measured."]
    busy = busy_line(machine)
    return [*notes, f"{busy[0].upper()}{busy[1:]}."] if busy else notes
