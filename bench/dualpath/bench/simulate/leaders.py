"""Leaders of engine groups: they report load and fetch work, at intervals, under a virtual clock.

They drive `dualpath.scheduler.Scheduler` as the service's leaders do. All look in turn, spread
over the interval, and only while requests wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.bench.simulate.read_queue import ReadQueue
from dualpath.bench.simulate.virtual_clock import VirtualClock
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.scheduler.scheduler import Scheduler


class Loaded(Protocol):
    """What a leader sees of an engine: unfinished requests and their tokens, and whether either has
    changed since its last report."""

    requests: int
    """seq_e."""
    tokens: int
    """tok_e."""
    changed: bool


@dataclass(frozen=True, slots=True)
class Group:
    """One leader's engines and read queues, by name."""

    name: str
    engines: Sequence[tuple[str, Loaded]]
    nodes: Sequence[tuple[str, ReadQueue]]

    def report(self) -> GroupReport:
        """As it stands. Engines that nothing was given to or done by since the last report are left
        out: the scheduler knows them."""
        engines = []
        for name, engine in self.engines:
            if engine.changed:
                engine.changed = False
                engines.append(EngineReport(name, engine.requests, engine.tokens))
        return GroupReport(
            self.name,
            tuple(engines),
            tuple([NodeReport(name, queue.tokens) for name, queue in self.nodes]),
        )


class Leaders:
    """`wake` after each submitted request; `assigned` is told of each assignment."""

    def __init__(
        self,
        clock: VirtualClock,
        scheduler: Scheduler,
        groups: Sequence[Group],
        interval_s: float,
        fetch_max: int,
        assigned: Callable[[Assignment], None],
    ) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._groups = groups
        self._interval_s = interval_s
        self._fetch_max = fetch_max
        self._assigned = assigned
        self._asleep = list(range(len(groups)))
        self.fetches = 0

    def wake(self) -> None:
        """A request waits."""
        if self._asleep:
            asleep, self._asleep = self._asleep, []
            for index in asleep:
                self._plan(index)

    def _plan(self, index: int) -> None:
        """At the group's next turn."""
        phase = self._interval_s * index / len(self._groups)
        turns = math.floor((self._clock.now - phase) / self._interval_s + 1e-6) + 1
        self._clock.at(phase + max(0, turns) * self._interval_s, self._turn, index)

    def _turn(self, index: int) -> None:
        scheduler, group = self._scheduler, self._groups[index]
        scheduler.report(group.report())
        self.fetches += 1
        while True:
            assignments = scheduler.fetch(group.name, self._clock.now)
            for assignment in assignments:
                self._assigned(assignment)
            if len(assignments) < self._fetch_max:
                break
        if scheduler.counts().waiting:
            self._plan(index)
        else:
            self._asleep.append(index)
