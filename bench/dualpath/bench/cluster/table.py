"""Prints a cluster report for people, and writes the same tables for a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from dualpath.bench.cluster.report import (
    ClusterReport,
    PolicyResult,
    TopologyResult,
    hand_off_note,
)
from dualpath.bench.cluster.targets import judge, ties_of
from dualpath.bench.machine import busy_line
from dualpath.bench.table import Row, markdown_table, print_table

Table = tuple[Row, list[Row]]

PAPER_BALANCE = "the paper's own figures: round robin 1.53, its rule 1.18"
_POLICY_HEADINGS = (
    "topology, policy",
    "MB/s",
    "x direct",
    "of limit",
    "SNIC balance",
    "whole run x direct",
    "load p50 ms",
    "failed",
    "cores",
)
_FAULT_HEADINGS = (
    "fault",
    "links then, MB/s",
    "back after s",
    "loads in flight",
    "last of them after s",
    "bound s",
)


def tables(report: ClusterReport, *, links: bool = True) -> list[Table]:
    """All that have rows; with `links` also those of the links' use."""
    found: list[Table] = [
        (_POLICY_HEADINGS, _policy_rows(report)),
        *(_link_table(result) for result in report.results if result.policies and links),
        (("lone load", "MiB", "s", "limit s", "over limit"), _lone_rows(report)),
        (_FAULT_HEADINGS, _fault_rows(report)),
        (("equal storage bandwidth", "MB/s", "MB/s", "ratio"), _tie_rows(report)),
        (
            ("target", "found", "wanted", ""),
            [(each.what, each.found, each.wanted, each.word) for each in judge(report)],
        ),
    ]
    return [(headings, rows) for headings, rows in found if rows]


def _policy_rows(report: ClusterReport) -> list[Row]:
    return [
        _policy_row(result.topology.label, policy)
        for result in report.results
        for policy in result.policies.values()
    ]


def _policy_row(label: str, policy: PolicyResult) -> Row:
    times = sorted(1e3 * each.elapsed_s for each in policy.outcomes)
    cores = sorted(run.cpu_cores for run in policy.runs)
    return (
        f"{label} {policy.policy}",
        f"{policy.bytes_per_s / 1e6:.1f}",
        _number(policy.ratio_to_direct, 3),
        f"{policy.of_limit:.3f}",
        _number(policy.snic_balance, 3),
        _number(policy.whole_ratio_to_direct, 3),
        f"{times[len(times) // 2]:.0f}" if times else "-",
        str(sum(1 for each in policy.outcomes if each.failure)),
        f"{cores[len(cores) // 2]:.2f}",
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _link_table(result: TopologyResult) -> Table:
    """Shares of the links' rates while there was a backlog."""
    shares = {name: policy.utilisation() for name, policy in result.policies.items()}
    names = [use.link.name for use in result.runs[0].links]
    rows: list[Row] = [
        (name, *(_percent(found.get(name)) for found in shares.values()))
        for name in names
        if any(found.get(name, 0.0) >= 0.005 for found in shares.values())
    ]
    return (f"{result.topology.label} link, share of its rate", *shares), rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _lone_rows(report: ClusterReport) -> list[Row]:
    return [
        (
            f"{result.topology.label} {lone.policy}, width {lone.width}",
            f"{lone.loads[0].nbytes / (1 << 20):.0f}",
            f"{lone.ratio * lone.loads[0].limit_s:.2f}",
            f"{lone.loads[0].limit_s:.2f}",
            f"{lone.ratio:.3f}",
        )
        for result in report.results
        for lone in result.lone
    ]


def _fault_rows(report: ClusterReport) -> list[Row]:
    return [
        (
            f"{result.topology.label} {effect.made.fault}",
            f"{effect.limit_bytes_per_s / 1e6:.1f}",
            _number(effect.back_s, 2),
            str(effect.in_flight),
            f"{effect.last_s:.2f}",
            f"{effect.bound_s:.2f}",
        )
        for result in report.results
        if result.faults is not None
        for effect in result.faults.effects
    ]


def _tie_rows(report: ClusterReport) -> list[Row]:
    return [
        (
            f"{tie.first} = {tie.second}",
            f"{tie.first_bytes_per_s / 1e6:.1f}",
            f"{tie.second_bytes_per_s / 1e6:.1f}",
            f"{tie.ratio:.3f}",
        )
        for tie in ties_of(report)
    ]


def summary(report: ClusterReport) -> list[str]:
    """What ran, and how far to believe it."""
    config = report.config
    lines = []
    for result in report.results:
        rates = result.config.rates
        nic = "converged NICs" if config.converged else f"{config.gpus} compute link(s) a node"
        lines.append(
            f"{result.topology.label}, {nic}, {hand_off_note(report.config)}: storage links "
            f"{rates.storage_bytes_per_s / 1e6:.1f} MB/s, compute links "
            f"{rates.compute_bytes_per_s / 1e6:.1f} MB/s, together they allow "
            f"{result.limit_bytes_per_s / 1e6:.1f} MB/s; unshaped "
            f"{result.unshaped_bytes_per_s / 1e6:.0f} MB/s"
        )
        if result.cpu_bound:
            lines.append(
                f"{result.topology.label} is CPU BOUND: the links allow more than 40 % of what "
                "this machine moves without limits; take a lower --snic"
            )
    loads = sum(len(result.outcomes) for result in report.results)
    if config.faults:
        return [*lines, f"{loads} loads under split, as the faults were made"]
    lines.append(f"{loads} loads in {config.rounds} interleaved rounds, medians")
    if not config.lone:
        lines[-1] += "; rates are of the seconds in which every engine had a backlog"
        lines.append(f"balance: {PAPER_BALANCE}")
    if config.schedulers:
        lines.append(
            "scheduler:NAME: requests queue at `dualpath scheduler` under that policy; it names "
            "their engines and who reads, and their loads follow it; loads as they are timed begin "
            "with the assignment"
        )
    return lines


def events(report: ClusterReport) -> list[str]:
    """What went wrong and was made good, and what failed, by reason."""
    lines = []
    for result in report.results:
        parts: Sequence[tuple[str, dict[str, object]]] = [
            (name, policy.to_json()) for name, policy in result.policies.items()
        ]
        if result.faults is not None:
            parts = [("faults", result.faults.to_json())]
        parts = [*parts, *((f"{o.policy}, width {o.width}", o.to_json()) for o in result.lone)]
        for name, values in parts:
            for title in ("events", "failures"):
                counts = values[title]
                if isinstance(counts, dict) and counts:
                    text = ", ".join(f"{key} {n}" for key, n in counts.items())
                    lines.append(f"{result.topology.label} {name}: {title}: {text}")
        lines += [
            f"{result.topology.label} {name}: {policy.queued_ms:.0f} ms from submission to "
            "assignment, median"
            for name, policy in result.policies.items()
            if policy.queued_ms is not None
        ]
        lines += _hand_offs(result)
    return lines


def _hand_offs(result: TopologyResult) -> list[str]:
    """What went on to the decode engines, policy by policy."""
    lines = []
    named = [(name, policy.outcomes) for name, policy in result.policies.items()]
    if result.faults is not None:
        named = [("faults", list(result.faults.run.outcomes))]
    for name, outcomes in named:
        received = [each.handed_off for each in outcomes if each.handed_off is not None]
        if not received:
            continue
        failed = Counter(each.failure for each in received if each.failure)
        shares = Counter[str]()
        for each in received:
            shares.update(each.shares)
        words = [
            f"{len(received) - failed.total()} prompts handed off whole",
            f"{shares['retained'] >> 20} MiB held there already",
            f"{shares['handed_off'] >> 20} MiB sent",
            *(f"{count} {reason}" for reason, count in failed.items()),
        ]
        lines.append(f"{result.topology.label} {name}: {', '.join(words)}")
    return lines


def print_report(report: ClusterReport, out: TextIO) -> None:
    """Write everything."""
    print(*summary(report), sep="\n", file=out)
    for headings, rows in tables(report):
        print_table(headings, rows, out)
    print(*events(report), sep="\n", file=out)
    loads = [outcome for result in report.results for outcome in result.outcomes]
    print(
        f"{'all right' if report.ok else 'FAILED'}: "
        f"{sum(each.verified_blocks for each in loads)} blocks verified byte by byte, "
        f"{sum(1 for each in loads if each.failure)} of {len(loads)} loads failed",
        file=out,
        flush=True,
    )


def markdown(report: ClusterReport) -> str:
    """The same for a document, with the machine; the links' use of a single topology only."""
    machine, versions = report.machine, report.versions
    one = len(report.results) == 1
    about = (
        f"{machine.get('cores')} cores of {machine.get('processor')}, {machine.get('system')} "
        f"{machine.get('kernel')}, Python {versions.get('python')}, dualpath "
        f"{versions.get('dualpath')}, grpcio {versions.get('grpcio')}."
    )
    busy = busy_line(machine)
    return "\n\n".join(
        [
            about + (f" {busy[0].upper()}{busy[1:]}." if busy else ""),
            "\n".join(f"- {line}" for line in [*summary(report), *events(report)]),
            *(markdown_table(headings, rows) for headings, rows in tables(report, links=one)),
        ]
    )
