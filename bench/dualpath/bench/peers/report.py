"""What `dualpath bench peers` found: JSON, tables for people and for documents, verdicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from dualpath.bench.machine import busy_line
from dualpath.bench.peers.catalogue import Reach
from dualpath.bench.peers.comparison import Comparison, Row
from dualpath.bench.table import Row as Cells
from dualpath.bench.table import markdown_table, print_table

CPU_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PeersReport:
    """A finished comparison and what it ran on."""

    comparison: Comparison
    rounds: int
    sizes: Sequence[int]
    total_bytes: int
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    date: str

    @property
    def failures(self) -> list[str]:
        """Of entries that began and did not end well."""
        return [
            f"{row.entry.name}: {failure}"
            for row in self.comparison.rows
            for failure in row.failures
        ]

    @property
    def ok(self) -> bool:
        """Whether ours ran; a peer that fails is told, and is its own affair."""
        return not any(row.failures for row in self.comparison.rows if row.entry.ours)

    def to_json(self) -> dict[str, object]:
        """Every figure, by entry and size of block."""
        return {
            "entries": {row.entry.name: self._row_json(row) for row in self.comparison.rows},
            "rounds": self.rounds,
            "mib": self.total_bytes >> 20,
            "piece_mib": self.comparison.piece_bytes >> 20,
            "date": self.date,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }

    def _row_json(self, row: Row) -> dict[str, object]:
        sizes: dict[str, object] = {}
        for size in self.sizes:
            figures: dict[str, object] = {}
            for way in ("put", "get"):
                figures[f"{way}_gibs"] = row.gibs(way, size, self.total_bytes)
                figures[f"{way}_cpu_s_per_gib"] = row.cpu_s_per_gib(way, size, self.total_bytes)
            sizes[size_name(size)] = figures
        return {
            "title": row.entry.title,
            "reach": row.entry.reach.value,
            "version": row.version,
            "skipped": row.skipped,
            "failures": row.failures,
            "blocks": sizes,
        }


def size_name(size: int) -> str:
    """`64K`, `1M`."""
    return f"{size >> 20}M" if size >> 20 else f"{size >> 10}K"


def headings(report: PeersReport) -> Cells:
    """Rates by size as put / get, then the processor time of a get, client + servers."""
    sizes = [f"{size_name(size)} put / get" for size in report.sizes]
    return ("GiB/s", *sizes, f"CPU-s/GiB, get of {size_name(_cpu_size(report))}", "version")


def _cpu_size(report: PeersReport) -> int:
    return CPU_BLOCK_BYTES if CPU_BLOCK_BYTES in report.sizes else report.sizes[-1]


def rows(report: PeersReport, reach: Reach) -> Iterator[Cells]:
    """One row an entry of the kind."""
    for row in report.comparison.rows:
        if row.entry.reach is not reach:
            continue
        state = "skipped" if row.skipped else row.version or "failed"
        if row.failures and row.runs:
            state += f" ({len(row.failures)} of its rounds failed)"
        cells = [_rates(report, row, size) for size in report.sizes]
        cpu = row.cpu_s_per_gib("get", _cpu_size(report), report.total_bytes)
        told = "-" if cpu is None else f"{cpu[0]:.2f} + {cpu[1]:.2f}"
        yield (row.entry.title, *cells, told, state)


def _rates(report: PeersReport, row: Row, size: int) -> str:
    put, get = (row.gibs(way, size, report.total_bytes) for way in ("put", "get"))
    return "-" if put is None or get is None else f"{put:.2f} / {get:.2f}"


def summary(report: PeersReport) -> list[str]:
    """The machine, the work, and how to read it."""
    machine = report.machine
    return [
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"{machine['system']} {machine['kernel']}; disk {machine['disk']}, "
        f"{machine['file_system']}; load average {machine['load_average']:.2f}; {report.date}",
        f"{report.total_bytes >> 20} MiB of blocks, {report.comparison.piece_bytes >> 20} MiB a "
        f"put or get, medians of {report.rounds} interleaved rounds; "
        "GiB/s of put / get into the caller's memory, each product with the checks that it makes "
        "by itself; every byte of every get compared outside of the time",
    ]


def verdict(report: PeersReport) -> Iterator[str]:
    """Ours beside the fastest peer, by size; and what failed."""
    comparison = report.comparison
    yield from (text for text in (busy_line(report.machine),) if text)
    for row in comparison.rows:
        if not row.entry.ours or not row.runs:
            continue
        parts = []
        for size in report.sizes:
            peer = comparison.fastest_peer(row.entry.reach, "get", size, report.total_bytes)
            mine = row.gibs("get", size, report.total_bytes)
            theirs = None if peer is None else peer.gibs("get", size, report.total_bytes)
            if peer is not None and mine and theirs:
                parts.append(f"{size_name(size)} x{mine / theirs:.2f} ({peer.entry.name})")
        yield f"get of {row.entry.name} beside the fastest peer: " + ", ".join(parts)
    for row in comparison.rows:
        if row.skipped:
            yield f"skipped: {row.entry.name}: {row.skipped.splitlines()[0]}"
    for failure in report.failures:
        yield f"failed: {failure}"


def print_report(report: PeersReport, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print(*summary(report), sep="\n", file=out)
    for reach in Reach:
        found = list(rows(report, reach))
        if found:
            print(reach.value, file=out)
            print_table(headings(report), found, out)
    print(*verdict(report), sep="\n", file=out, flush=True)


def markdown(report: PeersReport) -> str:
    """The same for a document."""
    parts = ["\n".join(f"- {line}" for line in summary(report))]
    for reach in Reach:
        found = list(rows(report, reach))
        if found:
            parts.append(f"**{reach.value[0].upper()}{reach.value[1:]}**")
            parts.append(markdown_table(headings(report), found))
    parts.append("\n".join(f"- {line}" for line in verdict(report)))
    return "\n\n".join(parts) + "\n"
