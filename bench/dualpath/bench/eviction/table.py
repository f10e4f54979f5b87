"""Prints hit rates as a table, for a terminal or a document."""

from __future__ import annotations

from dualpath.bench.eviction.replay import OPTIMUM, EvictionReport

BOUND = (
    "optimum: Belady's MIN with bypass, which knows the future: exactly the most that a cache of "
    "so many blocks can hit. No policy hits more; none that does not know the future gets there."
)


def rows_of(report: EvictionReport) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row a capacity, hit rates of blocks and, in brackets, of tokens."""
    names = [name for name in next(iter(report.rates.values())) if name != OPTIMUM]
    head = ["capacity (blocks)", "of distinct", *names, OPTIMUM]
    rows = [
        [
            f"{blocks}",
            f"{100 * blocks / report.distinct_blocks:.1f} %",
            *(
                f"{100 * rates[name].blocks:.2f} % ({100 * rates[name].tokens:.2f})"
                for name in (*names, OPTIMUM)
            ),
        ]
        for blocks, rates in report.rates.items()
    ]
    return head, rows


def summary(report: EvictionReport) -> str:
    """What was replayed."""
    return (
        f"{report.trace}: {report.requests} requests ask for {report.asked_blocks} blocks of "
        f"{report.block_tokens} tokens, {report.distinct_blocks} of them distinct; tier "
        f"{report.tier.value}"
    )


def print_report(report: EvictionReport) -> None:
    """For a terminal."""
    head, rows = rows_of(report)
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    print(summary(report))
    print("hit rate of blocks (of input tokens):")
    for row in [head, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(BOUND)


def markdown(report: EvictionReport) -> str:
    """For a document."""
    head, rows = rows_of(report)
    lines = [summary(report) + ".", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
