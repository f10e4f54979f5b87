"""What `dualpath bench transfer` found: values, a table, the same for a document, a picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from dualpath.bench.machine import busy_line
from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.rounds import Series
from dualpath.bench.store.section import JUDGED_ROUNDS_MIN
from dualpath.bench.table import Row, markdown_table, print_table
from dualpath.bench.transfer.contestant import (
    BARE_SOCKET,
    CIPHER,
    HASHING_SOCKET,
    MEMCPY,
    MEMCPY_FINE,
    TLS_SOCKET,
)
from dualpath.bench.transfer.grain import GRAINS

LIMITS = (MEMCPY, MEMCPY_FINE, BARE_SOCKET, HASHING_SOCKET, TLS_SOCKET, CIPHER)
WHOLE = "1M"
"""The grain that the finer ones are compared with."""
JUDGED = ("1M-of-40K-slices", "40K-scattered")
JUDGED_KINDS = ("tcp", "shm")
LEAST_RATIO = 0.7
HEADINGS = (
    "transport",
    "grain",
    "GiB/s",
    "x 1M",
    "x tcp",
    "x memcpy",
    "x hashing socket",
    "CPU-s/GiB",
)


@dataclass(frozen=True, slots=True)
class Report:
    """`series` of the limits by name, and of transports by (kind, grain)."""

    limits: Mapping[str, Series]
    flows: Mapping[tuple[str, str], Series]
    total_bytes: int
    rounds: int
    machine: Mapping[str, object]
    date: str

    def of_whole(self, kind: str, grain: str) -> float:
        """The rate as ratio to that of 1 MiB extents."""
        return self.flows[kind, grain].ratio_to(self.flows[kind, WHOLE])

    def of_tcp(self, kind: str, grain: str) -> float | None:
        """What encryption leaves of the rate of `tcp`; None of others, or without `tcp`."""
        clear = self.flows.get(("tcp", grain))
        if kind != "tcp+tls" or clear is None:
            return None
        return self.flows[kind, grain].ratio_to(clear)

    def misses(self) -> list[str]:
        """Which fine grains are slower than LEAST_RATIO of 1 MiB, with what copies as fine allow;
        none if there were not rounds enough to tell."""
        found: list[str] = []
        if self.rounds < JUDGED_ROUNDS_MIN:
            return found
        for kind, grain in self.flows:
            if kind in JUDGED_KINDS and grain in JUDGED:
                ratio = self.of_whole(kind, grain)
                of_copies = self.flows[kind, grain].ratio_to(self.limits[MEMCPY_FINE])
                if ratio < LEAST_RATIO:
                    found.append(
                        f"{kind} {grain}: {ratio:.2f} of 1M, must be {LEAST_RATIO:g} "
                        f"({of_copies:.2f} of {MEMCPY_FINE})"
                    )
        return found

    def to_json(self) -> dict[str, object]:
        """By transport and grain, and the limits."""
        kinds = dict.fromkeys(kind for kind, _ in self.flows)
        return {
            "limits": {
                name: {"gibs": each.gibs, "cpu_s_per_gib": each.cpu_s_per_gib}
                for name, each in self.limits.items()
            },
            **{
                kind: {grain: self._flow(of, grain) for of, grain in self.flows if of == kind}
                for kind in kinds
            },
            "misses": self.misses(),
            "rounds": self.rounds,
            "mib": self.total_bytes >> 20,
            "date": self.date,
            "machine": dict(self.machine),
        }

    def _flow(self, kind: str, grain: str) -> dict[str, float]:
        series, of_tcp = self.flows[kind, grain], self.of_tcp(kind, grain)
        return {
            **({} if of_tcp is None else {"ratio_to_tcp": of_tcp}),
            "gibs": series.gibs,
            "cpu_s_per_gib": series.cpu_s_per_gib,
            "spread": series.spread,
            "ratio_to_1m": self.of_whole(kind, grain),
            **{
                f"ratio_to_{name.replace('-', '_')}": series.ratio_to(limit)
                for name, limit in self.limits.items()
            },
        }


def rows(report: Report) -> list[Row]:
    """The limits, then a row a transport and grain, in the order of HEADINGS."""
    hashing, copying = report.limits[HASHING_SOCKET], report.limits[MEMCPY]
    found: list[Row] = []
    for name, series in report.limits.items():
        found.append(
            (
                name,
                "",
                f"{series.gibs:.2f}",
                "",
                "",
                f"{series.ratio_to(copying):.2f}",
                f"{series.ratio_to(hashing):.2f}",
                f"{series.cpu_s_per_gib:.2f}",
            )
        )
    for (kind, grain), series in report.flows.items():
        of_tcp = report.of_tcp(kind, grain)
        found.append(
            (
                kind,
                grain,
                f"{series.gibs:.2f}",
                f"{report.of_whole(kind, grain):.2f}",
                "" if of_tcp is None else f"{of_tcp:.2f}",
                f"{series.ratio_to(copying):.2f}",
                f"{series.ratio_to(hashing):.2f}",
                f"{series.cpu_s_per_gib:.2f}",
            )
        )
    return found


def lines(report: Report) -> list[str]:
    """What it was measured on, and the targets."""
    machine = report.machine
    said = [
        f"{report.rounds} interleaved rounds of {report.total_bytes >> 20} MiB each, medians; "
        f"{machine['cores']} cores of {machine['processor']}, {machine['system']} "
        f"{machine['kernel']}; {report.date}"
    ]
    said += [text for text in (busy_line(machine),) if text]
    said += [f"missed: {miss}" for miss in report.misses()]
    if report.rounds < JUDGED_ROUNDS_MIN:
        said.append(f"targets were not judged: that takes {JUDGED_ROUNDS_MIN} rounds")
    return said


def print_report(report: Report, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print_table(HEADINGS, rows(report), out)
    print(*lines(report), sep="\n", file=out, flush=True)


def markdown(report: Report) -> str:
    """The same for a document."""
    listed = "\n".join(f"- {line}" for line in lines(report))
    return f"{markdown_table(HEADINGS, rows(report))}\n\n{listed}\n"


def draw(report: Report, path: str) -> None:
    """Rates by grain as PNG. Raises Unavailable without matplotlib, or if it cannot be written."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    names = [grain.name for grain in GRAINS]
    kinds = list(dict.fromkeys(kind for kind, _ in report.flows))
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        places = [at + (index - len(kinds) / 2 + 0.5) * width for at in range(len(names))]
        rates = [report.flows[kind, name].gibs for name in names]
        axes.bar(places, rates, width=width, label=kind)
    for name, style in ((BARE_SOCKET, ":"), (HASHING_SOCKET, "--")):
        axes.axhline(report.limits[name].gibs, color="black", linestyle=style, label=name)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("GiB/s, verified")
    axes.legend(fontsize=8)
    write_png(figure, path)
