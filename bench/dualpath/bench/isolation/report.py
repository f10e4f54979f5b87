"""An isolation run for people: a table, the same for a document, a picture."""

from __future__ import annotations

import sys
from typing import TextIO

from dualpath.bench.isolation.figures import PERCENTILES, TARGETS, Figures
from dualpath.bench.isolation.protected import SIZES
from dualpath.bench.isolation.scene import Case
from dualpath.bench.machine import busy_line
from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.table import Row, markdown_table, print_table

HEADINGS = (
    "case",
    *(
        text
        for name in ("1 MiB", "4 KiB")
        for percent in PERCENTILES
        for text in (f"{name} p{percent} ms", "x control")
    ),
    "KV MB/s",
)
_COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#b0b0b0")


def rows(figures: Figures) -> list[Row]:
    """A row a case, in the order of HEADINGS."""
    found: list[Row] = []
    for case in Case:
        cells = [case.value]
        for size in SIZES:
            for percent in PERCENTILES:
                value = figures.at_ms(case, size, percent)
                ratio = value / figures.at_ms(Case.CONTROL, size, percent)
                cells += [f"{value:.2f}", f"{ratio:.2f}"]
        found.append((*cells, f"{figures.kv_mb_per_s(case):.1f}"))
    return found


def lines(figures: Figures) -> list[str]:
    """What it was measured on, and how it stands to the targets."""
    machine = figures.machine
    counts = [len(figures.times_ms(Case.CONTROL, size)) for size in SIZES]
    said = [
        f"links of {figures.link_bytes_per_s / 1e6:g} MB/s, {figures.rounds} rounds, "
        f"{counts[0]} operations and {counts[1]} messages of the control; "
        f"{machine['cores']} cores of {machine['processor']}, {machine['system']} "
        f"{machine['kernel']}; {figures.date}"
    ]
    said += [text for text in (busy_line(machine),) if text]
    ratios = figures.ratios()
    for target in TARGETS:
        verdict = "missed" if target.missed(ratios) else "holds"
        said.append(f"{target}: {ratios[target.figure]:.2f}, {verdict}")
    return said


def print_report(figures: Figures, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print_table(HEADINGS, rows(figures), out)
    print(*lines(figures), sep="\n", file=out, flush=True)


def markdown(figures: Figures) -> str:
    """The same for a document."""
    listed = "\n".join(f"- {line}" for line in lines(figures))
    return f"{markdown_table(HEADINGS, rows(figures))}\n\n{listed}\n"


def draw(figures: Figures, path: str) -> None:
    """Distributions of both sizes as PNG. Raises Unavailable without matplotlib or if `path`
    cannot be written."""
    figure = new_figure(9, 4)
    for axes, (size, title) in zip(
        figure.subplots(1, 2),
        (("1m", "operations of 1 MiB"), ("4k", "messages of 4 KiB")),
        strict=True,
    ):
        for case, colour in zip(Case, _COLOURS, strict=True):
            times = sorted(figures.times_ms(case, size))
            shares = [(index + 1) / len(times) for index in range(len(times))]
            axes.plot(times, shares, label=case.value, color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("ms")
        axes.set_ylabel("share of them that took no longer")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    write_png(figure, path)
