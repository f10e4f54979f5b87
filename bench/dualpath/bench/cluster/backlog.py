"""Windows of a run in which every link could have been busy, and how evenly they were.

A link that idles for want of work says nothing about the choice of paths. So only windows of
WINDOW_S count throughout which each prefill engine had at least as many loads in flight as there
are storage links for each engine. Balance is the storage links' maximum over their mean in a
window (as the paper counts it), utilisation a link's share of its rate. Pure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.link_meter import LinkKind, LinkUse
from dualpath.bench.testbed.topology import NodeKind

WINDOW_S = 1.0
GAP_S = 0.05
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a run did while there was a backlog; `windows` are (from, to), monotonic seconds."""

    windows: tuple[Span, ...]
    balances: tuple[float, ...]
    """Of each window: most over mean of the bytes into the storage links; 1 is even."""
    utilisation: dict[str, float]
    """By the name of the link: share of its rate; empty without windows."""
    bytes_per_s: float
    """Verified bytes a second: all that were loaded, times the share of what crossed the links into
    the prefill nodes that did so in the windows; 0 without windows."""

    @property
    def seconds(self) -> float:
        """All windows together."""
        return sum(end - start for start, end in self.windows)


def busy_spans(outcomes: Iterable[LoadOutcome], at_least: int) -> list[Span]:
    """When at least so many of these loads were in flight. Where a load follows another within
    GAP_S there is no gap."""
    changes = sorted(
        change
        for each in outcomes
        for change in ((each.ended_s - each.elapsed_s, 0, 1), (each.ended_s + GAP_S, 1, -1))
    )
    spans: list[Span] = []
    running, since = 0, 0.0
    for at_s, _, step in changes:
        running += step
        if step == 1 and running == at_least:
            since = at_s
        elif step == -1 and running == at_least - 1 and at_s > since:
            spans.append((since, at_s))
    return spans


def common_spans(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """Where both are."""
    return [(max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) < min(b, d)]


def windows_of(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Whole windows of WINDOW_S inside of the spans."""
    return tuple(
        (start + index * WINDOW_S, start + (index + 1) * WINDOW_S)
        for start, end in spans
        for index in range(int((end - start) / WINDOW_S + 1e-9))
    )


def bytes_between(use: LinkUse, span: Span) -> float:
    """What a link carried in a span, from its sampled rates."""
    total, before = 0.0, 0.0
    start, end = span[0] - use.started_s, span[1] - use.started_s
    for at_s, rate in use.series:
        total += rate * max(0.0, min(at_s, end) - max(before, start))
        before = at_s
    return total


def backlog_of(
    outcomes: Sequence[LoadOutcome], uses: Sequence[LinkUse], *, engines: int, in_flight: int
) -> Backlog:
    """`in_flight` loads at each engine are a backlog."""
    spans: list[Span] | None = None
    for engine in range(engines):
        mine = busy_spans((o for o in outcomes if _engine(o, engines) == engine), in_flight)
        spans = mine if spans is None else common_spans(spans, mine)
    windows = windows_of(spans or [])
    storage = [use for use in uses if use.link.kind is LinkKind.SNIC_IN]
    balances = []
    for window in windows:
        carried = [bytes_between(use, window) for use in storage]
        if sum(carried):
            balances.append(max(carried) * len(carried) / sum(carried))
    seconds = len(windows) * WINDOW_S
    utilisation = {
        use.link.name: sum(bytes_between(use, window) for window in windows)
        / (seconds * use.link.limit_bytes_per_s)
        for use in uses
        if seconds and use.link.limit_bytes_per_s
    }
    into = into_prefill(uses)
    crossed = sum(use.nbytes for use in into)
    share = sum(bytes_between(use, each) for use in into for each in windows) / max(1, crossed)
    loaded = share * sum(outcome.nbytes for outcome in outcomes)
    return Backlog(windows, tuple(balances), utilisation, loaded / seconds if seconds else 0.0)


def _engine(outcome: LoadOutcome, engines: int) -> int:
    """Which engine a load was at."""
    return outcome.engine if outcome.engine >= 0 else outcome.session % engines


def into_prefill(uses: Sequence[LinkUse]) -> list[LinkUse]:
    """The links that every loaded byte crosses once: into the prefill nodes' engines, or into the
    one NIC of a converged prefill node."""
    mine = [use for use in uses if use.link.node.startswith(NodeKind.PREFILL.value)]
    compute = [use for use in mine if use.link.kind is LinkKind.CNIC_IN]
    return compute or [use for use in mine if use.link.kind is LinkKind.SNIC_IN]


def mean_balance(backlogs: Iterable[Backlog]) -> float | None:
    """Mean over all windows of several runs, None without any."""
    balances = [value for backlog in backlogs for value in backlog.balances]
    return statistics.fmean(balances) if balances else None
