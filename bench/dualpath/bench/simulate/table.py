"""Tables of simulated figures: for people, and for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from dualpath.bench.simulate.comparison import PaperReport, Table
from dualpath.bench.table import markdown_table, print_table

_HEADINGS = (
    "system",
    "JCT s",
    "TTFT s",
    "p90",
    "TPOT ms",
    "p90",
    "SNIC max/mean",
    "attention max/mean",
    "prefill busy",
    "decode busy",
)


def print_results(results: Sequence[Mapping[str, object]], out: TextIO) -> None:
    """A row a run."""
    print_table(_HEADINGS, [_row(result) for result in results], out)
    print("simulated; nothing here was measured", file=out)


def _row(result: Mapping[str, object]) -> tuple[str, ...]:
    aps = result.get("aps")
    name = f"{result['system']}" + (f", {aps:g} agents/s" if isinstance(aps, float) else "")
    return (
        name,
        f"{_number(result, 'jct_s'):.0f}",
        f"{_number(result, 'ttft_s', 'mean'):.2f}",
        f"{_number(result, 'ttft_s', 'p90'):.2f}",
        f"{1e3 * _number(result, 'tpot_s', 'mean'):.1f}",
        f"{1e3 * _number(result, 'tpot_s', 'p90'):.1f}",
        f"{_number(result, 'snic_max_over_mean'):.2f}",
        f"{_number(result, 'attention_max_over_mean'):.2f}",
        f"{_number(result, 'prefill_busy'):.2f}",
        f"{_number(result, 'decode_busy'):.2f}",
    )


def _number(result: Mapping[str, object], *path: str) -> float:
    """A figure, or nan where a run has none (no turn with two tokens)."""
    found: object = result
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else float("nan")


def comparison_rows(report: PaperReport) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Published and simulated side by side."""
    headings = ("result", "published", "simulated", "deviation", "within", "verdict", "note")
    rows: list[Sequence[str]] = [
        (
            one.name,
            f"{one.published:g}",
            f"{one.simulated:.3f}" if one.simulated < 100 else f"{one.simulated:.0f}",
            f"{100 * one.deviation:+.1f} %",
            f"{100 * one.tolerance:g} %" if one.tolerance else "",
            one.verdict,
            one.note,
        )
        for one in report.comparisons
    ]
    return headings, rows


def markdown_document(report: PaperReport) -> str:
    """The comparison, the tables, then every offline run."""
    headings = ("run", *_HEADINGS)
    runs = []
    for name, result in report.runs.items():
        if "steady" not in result:
            _, *row = _row(result)
            runs.append((name, str(result["system"]), *row))
    return "\n\n".join(
        (
            markdown_table(*comparison_rows(report)),
            *(markdown_section(table) for table in report.tables),
            markdown_table(headings, runs),
        )
    )


def markdown_section(table: Table) -> str:
    """One table under its title."""
    return f"**{table.title}**\n\n{markdown_table(table.headings, table.rows)}"
