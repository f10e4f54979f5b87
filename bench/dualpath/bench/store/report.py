"""What `dualpath bench store` found: JSON, a table for people, tables for the documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from dualpath.bench.machine import busy_line
from dualpath.bench.store.section import JUDGED_ROUNDS_MIN, SECTIONS, Figures, Section
from dualpath.bench.table import Row, markdown_table, print_table

HEADINGS = ("section", "figure", "value", "target", "")


@dataclass(slots=True)
class StoreReport:
    """`figures` by section. `misses` are targets that do not hold, `failures` sections that did
    not run to their end."""

    rounds: int
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    date: str
    figures: dict[str, Figures] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether there were rounds enough to judge ratios."""
        return self.rounds >= JUDGED_ROUNDS_MIN

    @property
    def ok(self) -> bool:
        """Whether everything ran, and every target holds if the run is judged."""
        return not self.misses and not self.failures

    @property
    def sections(self) -> list[Section]:
        """Those that were asked for, in order."""
        return [section for section in SECTIONS if section.name in self.figures]

    def to_json(self) -> dict[str, object]:
        """The figures by section, then what they were measured on and how they were judged."""
        return {
            **self.figures,
            "rounds": self.rounds,
            "judged": self.judged,
            "ok": self.ok,
            "misses": self.misses,
            "failures": self.failures,
            "date": self.date,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }


def rows(report: StoreReport) -> Iterator[Row]:
    """A row a figure, in the order of HEADINGS."""
    for section in report.sections:
        figures = report.figures[section.name]
        title = section.name
        for figure, value in flat(figures):
            target = next((each for each in section.targets if each.figure == figure), None)
            judgement = ""
            if target is not None and report.judged:
                judgement = "missed" if target.missed(figures) else "holds"
            bound = "" if target is None else str(target).removeprefix(figure).strip()
            yield (title, figure, _shown(value), bound, judgement)
            title = ""


def flat(figures: Figures) -> Iterator[tuple[str, object]]:
    """Figures of figures by their whole names."""
    for name, value in figures.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def summary(report: StoreReport) -> list[str]:
    """The machine and the versions, in a few lines."""
    machine, versions = report.machine, report.versions
    return [
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"{machine['system']} {machine['kernel']}; load average {machine['load_average']:.2f}",
        f"disk {machine['disk']}, {machine['file_system']}; huge pages: transparent "
        f"{machine['transparent_huge_pages']}, shared {machine['shared_huge_pages']}, "
        f"{machine['reserved_huge_pages']} reserved",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {report.rounds} interleaved rounds, medians; {report.date}",
    ]


def verdict(report: StoreReport) -> list[str]:
    """What to say at the end."""
    lines = [f"failed: {failure}" for failure in report.failures]
    lines += [text for text in (busy_line(report.machine),) if text]
    lines += [f"missed: {miss}" for miss in report.misses]
    lines += [f"note: {note}" for note in report.notes]
    if not report.judged:
        lines.append(f"targets were not judged: that takes {JUDGED_ROUNDS_MIN} rounds")
    elif report.ok:
        lines.append("every target holds")
    return lines


def print_report(report: StoreReport, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print(*summary(report), sep="\n", file=out)
    print_table(HEADINGS, list(rows(report)), out)
    print(*verdict(report), sep="\n", file=out, flush=True)


def markdown(report: StoreReport) -> str:
    """The same for a document, a table a section."""
    parts = ["\n".join(f"- {line}" for line in summary(report))]
    for section in report.sections:
        mine: Sequence[Row] = [
            row[1:]
            for row in rows(
                StoreReport(
                    report.rounds,
                    report.machine,
                    report.versions,
                    report.date,
                    {section.name: report.figures[section.name]},
                )
            )
        ]
        parts.append(f"**`{section.name}`**: {section.title}")
        parts.append(markdown_table(HEADINGS[1:], mine))
    parts.append("\n".join(f"- {line}" for line in verdict(report)))
    return "\n\n".join(parts) + "\n"
