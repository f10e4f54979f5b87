"""Prints a report for people: a table by policy, the links, and what bound each policy."""

from __future__ import annotations

import sys
from typing import TextIO

from dualpath.bench.demo.report import GIB, DemoReport, PolicyReport, percentile
from dualpath.bench.table import Row, print_table

POLICY_HEADINGS = (
    "policy",
    "GiB",
    "s",
    "GiB/s",
    "x direct",
    "p50 ms",
    "p99 ms",
    "load time x direct",
    "blocks verified",
    "corrupt",
    "failed",
    "cores",
)


def policy_rows(report: DemoReport) -> list[Row]:
    """One row a policy, in the order of POLICY_HEADINGS."""
    return [_policy_row(name, policy) for name, policy in report.policies.items()]


def _policy_row(name: str, policy: PolicyReport) -> Row:
    times = policy.load_ms
    return (
        name,
        f"{policy.run.nbytes / GIB:.2f}",
        f"{policy.run.seconds:.1f}",
        f"{policy.run.bytes_per_s / GIB:.3f}",
        _ratio(policy.ratio_to_direct),
        f"{percentile(times, 0.5):.0f}",
        f"{percentile(times, 0.99):.0f}",
        _ratio(policy.load_time_ratio_to_direct),
        str(policy.verified_blocks),
        str(policy.corrupt_blocks),
        str(sum(policy.failures.values())),
        f"{policy.run.cpu_cores:.1f}",
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def link_headings(report: DemoReport) -> Row:
    """The links' table has a column a policy."""
    return ("link", "limit MB/s", *report.policies)


def link_rows(report: DemoReport) -> list[Row]:
    """Bytes and utilisation of each link under each policy."""
    rows: list[Row] = []
    for index, first in enumerate(report.runs[0].links if report.runs else ()):
        cells = []
        for run in report.runs:
            use = run.links[index]
            share = "" if use.utilisation is None else f" ({100 * use.utilisation:.0f} %)"
            cells.append(f"{use.nbytes / (1 << 20):.0f} MiB{share}")
        limit = first.link.limit_bytes_per_s
        rows.append((first.link.name, f"{limit / 1e6:.0f}" if limit else "-", *cells))
    return rows


def path_lines(report: DemoReport) -> list[str]:
    """Bytes by path and what was made good on the way."""
    lines = []
    for name, policy in report.policies.items():
        total = sum(policy.bytes_by_path.values()) or 1
        parts = [
            f"{path} {nbytes / GIB:.2f} GiB ({100 * nbytes / total:.0f} %)"
            for path, nbytes in sorted(policy.bytes_by_path.items())
        ]
        line = f"{name}: " + ", ".join(parts)
        for title, counts in (("events", policy.events), ("failed", policy.failures)):
            if counts:
                line += f"; {title}: " + ", ".join(f"{key} {n}" for key, n in counts.items())
        lines.append(line)
    return lines


def summary(report: DemoReport) -> list[str]:
    """What ran, in two lines."""
    config, workload = report.config, report.workload
    reason = f" ({report.shaping_reason})" if report.shaping_reason else ""
    mean_mib = workload.load_bytes / max(1, workload.loads) / (1 << 20)
    limits = "no limits"
    if config.storage_bytes_per_s:
        limits = (
            f"storage links {config.storage_bytes_per_s / 1e6:.0f} MB/s, compute links "
            f"{config.compute_bytes_per_s / 1e6:.0f} MB/s, together they allow "
            f"{report.links_sum_bytes_per_s / 1e6:.0f} MB/s; unshaped "
            f"{report.unshaped_bytes_per_s / 1e6:.0f} MB/s"
        )
    return [
        f"{report.topology}, destination {config.destination.value}, shaping: "
        f"{report.shaping}{reason}; {limits}",
        f"{workload.loads} loads of {mean_mib:.1f} MiB on average in "
        f"{len(workload.sessions)} sessions, {config.concurrency} at a time; {workload.source}, "
        f"{workload.block_tokens} tokens a block of {workload.block_bytes >> 10} KiB",
    ]


def print_report(report: DemoReport, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print(*summary(report), sep="\n", file=out)
    print_table(POLICY_HEADINGS, policy_rows(report), out)
    print_table(link_headings(report), link_rows(report), out)
    print(*path_lines(report), sep="\n", file=out)
    print(*report.verdict, sep="\n", file=out)
    state = "all right" if report.ok else "FAILED"
    print(
        f"{state}: {report.verified_blocks} blocks verified byte by byte, "
        f"{report.corrupt_blocks} corrupt, {report.failed_loads} failed loads",
        file=out,
        flush=True,
    )
