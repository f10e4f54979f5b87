"""The scheduler's service: how many requests pass it over gRPC, from submission to end.

A `dualpath scheduler` of its own; this process is a front end and the leader of each group, whose
engines finish at once what they get. Counted is what comes back to the front end by the clock, and
the scheduler's processor time: this process needs as much again, so on few cores the clock says
less of the scheduler than of both.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.scheduler.shape import Shape
from dualpath.bench.scheduler.virtual_cluster import VirtualCluster
from dualpath.bench.testbed.cpu_meter import CpuMeter
from dualpath.bench.testbed.process import ChildProcess
from dualpath.client.front_end import FrontEnd, Submission
from dualpath.client.group_leader import GroupLeader
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, Role
from dualpath.scheduler.group_report import EngineReport, NodeReport
from dualpath.transfer.errors import DeadlineExceeded

READY_S_MAX = 30.0
END_S_MAX = 5.0
IDLE_S_MAX = 20.0
"""Longest time without any end before the measurement is given up."""
IN_FLIGHT = 4_096
"""Requests at the scheduler at once."""
WARM_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class EdgeFigures:
    """Requests that were submitted, assigned and finished through the service. `cores`: of the
    scheduler's process."""

    policy: str
    shape: Shape
    groups: int
    requests: int
    seconds: float
    cores: float

    @property
    def requests_per_s(self) -> float:
        """By the clock."""
        return self.requests / self.seconds

    @property
    def requests_per_processor_s(self) -> float:
        """Of the scheduler's process; 0 if it took none that could be seen."""
        return self.requests / (self.seconds * self.cores) if self.cores else 0.0


@dataclass(frozen=True, slots=True)
class _Group:
    """Engines that have done what they get by the next report."""

    leader: GroupLeader
    engines: tuple[EngineSpec, ...]
    done: list[str]

    def step(self) -> None:
        """Say what is done, then report idle engines, and fetch."""
        if self.done and self.engines[0].role is Role.DECODE:
            self.leader.prefilled(*self.done)
            self.leader.finished(*self.done)
        self.done.clear()
        nodes = dict.fromkeys(engine.node for engine in self.engines)
        self.leader.report(
            [EngineReport(engine.name, 0, 0) for engine in self.engines],
            [NodeReport(node, 0) for node in nodes],
        )


async def measure_edge(
    shape: Shape, policy: str, requests: int, said: Callable[[str], None]
) -> EdgeFigures:
    """Pass so many requests through the service. Raises Unavailable if it does not start,
    DeadlineExceeded if it stands still."""
    with tempfile.TemporaryDirectory(prefix="dualpath-edge-") as folder:
        child = await ChildProcess.start("scheduler", _words(shape, policy), Path(folder) / "log")
        try:
            await child.wait_ready(READY_S_MAX)
            return await _through(child, shape, policy, requests, said)
        finally:
            child.terminate()
            await child.close(END_S_MAX)


def _words(shape: Shape, policy: str) -> list[str]:
    return [
        *(sys.executable, "-m", "dualpath.cli.main", "scheduler", "--listen", "127.0.0.1:0"),
        *("--policy", policy, "--log-level", "warning"),
        *("--alpha-tokens", str(shape.alpha_tokens), "--beta-tokens", str(shape.beta_tokens)),
    ]


def _group(scheduler: str, engines: tuple[EngineSpec, ...]) -> _Group:
    done: list[str] = []

    def assigned(assignment: Assignment) -> None:
        done.append(assignment.request.id)

    leader = GroupLeader(scheduler, engines, assigned=assigned, withdrawn=lambda _: None)
    return _Group(leader, engines, done)


async def _through(
    child: ChildProcess, shape: Shape, policy: str, requests: int, said: Callable[[str], None]
) -> EdgeFigures:
    cluster, address = VirtualCluster(shape), child.address("listen")
    groups = [
        _group(address, tuple(engine for engine in cluster.engines if engine.group == name))
        for name in cluster.groups
    ]
    front = FrontEnd(address)
    try:
        await front.ready()
        for group in groups:
            await group.leader.ready()
        said(f"{policy}: {len(groups)} leaders and a front end, over gRPC")
        warm = round(WARM_SHARE * requests)
        await _pass(front, groups, cluster, warm, shape.interval_s)
        cpu, began_s = CpuMeter((child.pid,), own=False), time.monotonic()
        await _pass(front, groups, cluster, requests, shape.interval_s)
        seconds, cores = time.monotonic() - began_s, cpu.cores()
    finally:
        await front.close()
        for group in groups:
            await group.leader.close()
    return EdgeFigures(policy, shape, len(groups), requests, seconds, cores)


async def _pass(
    front: FrontEnd, groups: list[_Group], cluster: VirtualCluster, requests: int, interval_s: float
) -> None:
    """Submit, IN_FLIGHT at once, until all have ended; a round of fetches each `interval_s`."""
    waiting: deque[Submission] = deque()
    left, moved_s = requests, time.monotonic()
    while left or waiting:
        began_s = time.monotonic()
        new = min(left, IN_FLIGHT - len(waiting))
        waiting += [front.submit(request) for request in cluster.arrivals(new)]
        left -= new
        for group in groups:
            group.step()
        await asyncio.sleep(max(0.0, began_s + interval_s - time.monotonic()))
        count = len(waiting)
        waiting = deque(each for each in waiting if not each.over)
        if len(waiting) < count:
            moved_s = time.monotonic()
        if time.monotonic() - moved_s > IDLE_S_MAX:
            raise DeadlineExceeded(
                f"{len(waiting)} requests have not ended, none of them for {IDLE_S_MAX:g} s"
            )
