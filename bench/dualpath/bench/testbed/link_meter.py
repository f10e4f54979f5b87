"""Samples what each link carried, about every 100 ms, and makes series of utilisation of it.

Owns the list of links and the sampling. Counters come from the kernel (the devices inside of each
node's namespace, read through /proc/<pid>/net/dev of the agent that runs there) or from the
agents' own statistics. Kernel counters include headers (below 1 % at this MTU) and control.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from dualpath.bench.testbed.shaping import CNIC, CNIC_IN, SNIC, LinkRates, rail_name
from dualpath.bench.testbed.topology import NodeKind, Topology
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, Unavailable

SAMPLE_S = 0.1
SAMPLES_MAX = 100_000
_COUNTERS_BYTES_MAX = 64 << 10


class LinkKind(enum.Enum):
    """A direction of one of a node's two links."""

    SNIC_IN = "SNIC in"
    CNIC_IN = "CNIC in"
    CNIC_OUT = "CNIC out"


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link. `node` is the agent at a compute link (`prefill-0.1` is that of the
    second rail). `limit_bytes_per_s` is 0 when nothing limits it."""

    node: str
    kind: LinkKind
    limit_bytes_per_s: float

    @property
    def name(self) -> str:
        """For tables: `prefill-0 SNIC in`."""
        return f"{self.node} {self.kind.value}"


def links_of(topology: Topology, rates: LinkRates | None) -> tuple[Link, ...]:
    """Every link direction that a load may use, prefill nodes first. All SNICs of a node count as
    one link; the one NIC of a converged node is its SNIC inwards and its CNIC outwards."""
    storage = rates.node_storage_bytes_per_s if rates else 0.0
    compute = rates.compute_bytes_per_s if rates else 0.0
    links = []
    for node in topology.nodes:
        if node.kind is NodeKind.STORAGE:
            continue
        links.append(Link(node.name, LinkKind.SNIC_IN, storage))
        if topology.converged:
            links.append(Link(node.name, LinkKind.CNIC_OUT, storage))
            continue
        for agent in node.agents:
            links += [Link(agent, LinkKind.CNIC_IN, compute)]
            links += [Link(agent, LinkKind.CNIC_OUT, compute)]
    return tuple(links)


class LinkCounters(Protocol):
    """Where the bytes of links are counted. Values only ever grow."""

    async def read(self) -> Mapping[tuple[str, LinkKind], int]:
        """Bytes since start for each (node, kind). Raises Unavailable."""


def parse_devices(text: str) -> dict[str, tuple[int, int]]:
    """(received, sent) bytes of each device of a /proc/net/dev."""
    devices = {}
    for line in text.splitlines()[2:]:
        name, _, fields = line.partition(":")
        values = fields.split()
        if len(values) >= 9:
            devices[name.strip()] = (int(values[0]), int(values[8]))
    return devices


class KernelCounters:
    """Counters of the devices in the nodes' namespaces; `pids` has one process an agent.

    The files stay open, and with them the namespaces: the counters outlive the processes.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._files: dict[str, int] = {}
        for agent, pid in pids.items():
            try:
                self._files[agent] = os.open(f"/proc/{pid}/net/dev", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.close()
                raise Unavailable(f"the counters of {agent} are gone: {error}") from error

    async def read(self) -> Mapping[tuple[str, LinkKind], int]:
        """See LinkCounters. Reading these files takes microseconds, so it is done in place."""
        values: dict[tuple[str, LinkKind], int] = {}
        for agent, file in self._files.items():
            try:
                text = os.pread(file, _COUNTERS_BYTES_MAX, 0).decode("ascii")
            except OSError as error:
                raise Unavailable(f"the counters of {agent} are gone: {error}") from error
            devices = parse_devices(text)
            rail = int(agent.partition(".")[2] or 0)
            out = rail_name(CNIC, rail)
            values[agent, LinkKind.SNIC_IN] = sum(
                counts[0] for name, counts in devices.items() if name.startswith(SNIC)
            )
            # What goes to the node's own memory over `lo` passes this device, too.
            values[agent, LinkKind.CNIC_IN] = devices.get(rail_name(CNIC_IN, rail), (0, 0))[1]
            values[agent, LinkKind.CNIC_OUT] = devices.get(out, devices.get(SNIC, (0, 0)))[1]
        return values

    def close(self) -> None:
        """Let the namespaces go."""
        while self._files:
            os.close(self._files.popitem()[1])


class StatsSource(Protocol):
    """The part of a client of an agent that is needed here."""

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        """Counters and gauges of the agent."""


_AGENT_LINKS = {
    "storage": LinkKind.SNIC_IN,
    "compute_in": LinkKind.CNIC_IN,
    "compute_out": LinkKind.CNIC_OUT,
}


class AgentCounters:
    """What the agents themselves report."""

    def __init__(self, agents: Mapping[str, StatsSource]) -> None:
        self._agents = dict(agents)

    async def read(self) -> Mapping[tuple[str, LinkKind], int]:
        """See LinkCounters."""
        answers = await asyncio.gather(*(agent.stats() for agent in self._agents.values()))
        return {
            (node, _AGENT_LINKS[link.link]): link.bytes
            for node, answer in zip(self._agents, answers, strict=True)
            for link in answer.link
            if link.link in _AGENT_LINKS
        }


@dataclass(frozen=True, slots=True)
class LinkSample:
    """All counters at one moment; `at_s` is monotonic."""

    at_s: float
    counters: Mapping[tuple[str, LinkKind], int]


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one link did during a run. `series` are (seconds from its start, bytes a second), each
    a mean since the one before; `started_s` (monotonic) is the run's start."""

    link: Link
    nbytes: int
    seconds: float
    series: tuple[tuple[float, float], ...]
    started_s: float = 0.0

    @property
    def utilisation(self) -> float | None:
        """Share of the limit that was used, None where there is no limit."""
        if self.link.limit_bytes_per_s == 0 or self.seconds == 0:
            return None
        return self.nbytes / self.seconds / self.link.limit_bytes_per_s


def link_uses(links: Sequence[Link], samples: Sequence[LinkSample]) -> tuple[LinkUse, ...]:
    """Totals and series between the first and the last sample."""
    uses = []
    for link in links:
        key = (link.node, link.kind)
        values = [(sample.at_s, sample.counters.get(key, 0)) for sample in samples]
        series = tuple(
            (at - values[0][0], (count - before) / (at - earlier))
            for (earlier, before), (at, count) in pairwise(values)
            if at > earlier
        )
        seconds = values[-1][0] - values[0][0] if values else 0.0
        nbytes = values[-1][1] - values[0][1] if values else 0
        uses.append(LinkUse(link, nbytes, seconds, series, values[0][0] if values else 0.0))
    return tuple(uses)


class LinkMeter:
    """Samples while it is open: `async with LinkMeter(...) as meter`, then `meter.uses`."""

    def __init__(self, links: Sequence[Link], counters: LinkCounters) -> None:
        self._links = tuple(links)
        self._counters = counters
        self._samples: list[LinkSample] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def uses(self) -> tuple[LinkUse, ...]:
        """What was sampled so far."""
        return link_uses(self._links, self._samples)

    async def _sample(self) -> None:
        counters = await self._counters.read()
        self._samples.append(LinkSample(time.monotonic(), counters))

    async def _run(self) -> None:
        while len(self._samples) < SAMPLES_MAX:
            await asyncio.sleep(SAMPLE_S)
            await self._sample()

    async def __aenter__(self) -> LinkMeter:
        await self._sample()
        self._task = asyncio.create_task(self._run(), name="link meter")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DualPathError):
            await self._task
        with contextlib.suppress(DualPathError):
            await self._sample()
