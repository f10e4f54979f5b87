"""Makes the faults of a list at their times, on a cluster that runs.

Owns the translation of a fault into what is done to processes and links, and notes when it really
was. A restored process is started where its peers look for it; until it is ready, the next fault
waits. Whatever is still down at the end goes with the cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.bench.cluster.fault import SNIC_LINK, Fault, FaultAction, states_after
from dualpath.bench.testbed.cluster import Cluster
from dualpath.bench.testbed.namespaces import Namespaces
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import Unavailable


class Faultable(Protocol):
    """A running cluster; `rates` is None while its links have no limits."""

    @property
    def topology(self) -> Topology:
        """Its nodes."""

    @property
    def namespaces(self) -> Namespaces:
        """Its links."""

    @property
    def cluster(self) -> Cluster:
        """Its processes."""

    @property
    def rates(self) -> LinkRates | None:
        """What its links carry while nothing is done to them."""


async def _nothing(_fault: Fault) -> None:
    pass


@dataclass(frozen=True, slots=True)
class MadeFault:
    """A fault, and when it was made (monotonic seconds); a restored agent was ready then."""

    fault: Fault
    made_s: float


class FaultScript:
    """The faults of one run; `made` grows as they are made."""

    def __init__(
        self,
        faults: Sequence[Fault],
        cluster: Faultable,
        say: Callable[[str], None],
        on_made: Callable[[Fault], Awaitable[None]] = _nothing,
    ) -> None:
        """`on_made` is waited for after each."""
        self._faults = tuple(faults)
        self._cluster = cluster
        self._say = say
        self._on_made = on_made
        self.made: list[MadeFault] = []

    async def run(self) -> None:
        """Make them, counted from now. Raises Unavailable if one cannot be made."""
        started_s = time.monotonic()
        for index, fault in enumerate(self._faults):
            await asyncio.sleep(max(0.0, started_s + fault.at_s - time.monotonic()))
            self._say(f"fault: {fault}")
            begun_s = time.monotonic()
            await self._make(index)
            # What follows from a fault is never earlier than its beginning; what is restored is
            # there at the end.
            restored = fault.action is FaultAction.RESTORE
            self.made.append(MadeFault(fault, time.monotonic() if restored else begun_s))
            await self._on_made(fault)

    async def _make(self, index: int) -> None:
        fault, cluster = self._faults[index], self._cluster.cluster
        match fault.action:
            case FaultAction.KILL:
                await cluster.kill(fault.node)
            case FaultAction.STOP:
                cluster.freeze(fault.node)
            case FaultAction.CUT | FaultAction.SLOW:
                await self._set_links(index)
            case FaultAction.RESTORE:
                await self._set_links(index)
                if not fault.link:
                    cluster.thaw(fault.node)
                    await cluster.start_again(fault.node)

    async def _set_links(self, index: int) -> None:
        """Give each link that the fault touches the state that it has after it."""
        fault, rates = self._faults[index], self._cluster.rates
        if rates is None:
            raise Unavailable("links without limits cannot be slowed")
        topology, spaces = self._cluster.topology, self._cluster.namespaces
        shares = dict(states_after(self._faults[: index + 1], topology)[fault.node].shares)

        def change(link: str) -> None:
            share = shares[link]
            if link.startswith(SNIC_LINK):
                snic = int(link.removeprefix(SNIC_LINK) or 0)
                spaces.plug_storage(fault.node, snic, up=share > 0)
                if share > 0 and fault.node != topology.storage.name:  # its links have no limit
                    rate = share * rates.snic_bytes_per_s(snic)
                    spaces.limit_storage(fault.node, rate, snic)
                return
            rail = int(link.removeprefix("cnic") or 0)
            spaces.plug_compute(fault.node, rail, up=share > 0)
            if share > 0:
                spaces.limit_compute(fault.node, rail, share * rates.compute_bytes_per_s)

        for link in (fault.link,) if fault.link else shares:
            await asyncio.to_thread(change, link)
