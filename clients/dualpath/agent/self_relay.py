"""This agent as its own relay, for memory that only the compute network reaches.

A GPU's memory stands behind its compute NIC: a daemon cannot write into it, so the direct path
goes daemon -> own staging (storage link) -> own compute connection -> memory. Owns the connection
of the compute network to itself and the requester that stands for this agent at its own relay.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.network import Network
from dualpath.agent.open_grants import OnProgress
from dualpath.agent.relay import Relay
from dualpath.agent.relay_job import Requester, Source
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import PathDown


class SelfRelay:
    """See the module docstring. `on_lost(reason)` follows the loss of the connection; the next
    `ensure` makes it again. Belongs to the loop."""

    def __init__(
        self,
        relay: Relay,
        compute: Network,
        data_listen: str,
        on_lost: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self._relay = relay
        self._compute = compute
        self._data_listen = data_listen
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._reader = ""
        self._requesters: dict[int, Requester] = {}  # by storage link
        self._lock = asyncio.Lock()
        self._serial = itertools.count(1)
        self._grant_ids = itertools.count(1)

    @property
    def up(self) -> bool:
        """Whether grants can be submitted."""
        return bool(self._reader)

    @property
    def peer(self) -> str:
        """The name by which this agent writes to itself, "" while it is not connected."""
        return self._reader

    async def ensure(self) -> None:
        """Connect to ourselves, if we are not. Raises Unavailable, DeadlineExceeded, ..."""
        async with self._lock:
            if self._reader:
                return
            transport = self._compute.transport
            address = transport.address or transport.listen(self._data_listen)
            number = next(self._serial)
            reader, writer = f"self:reader#{number}", f"self:writer#{number}"
            invitation = transport.invite(reader)
            self._compute.watch(writer, self._lost)
            await self._compute.connect(writer, address, invitation, deadline_s=self._timeout_s)
            self._requesters = {0: self._relay.open("self", reader)}
            self._reader = reader

    def submit(
        self,
        daemon: DaemonLink,
        lease_id: int,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        *,
        ticket: bytes = b"",
    ) -> int:
        """Relay chunks of our own lease to ourselves, of one that was delegated to the link that
        `daemon` is reached by if there is a `ticket`; returns the grant's id. Raises PathDown,
        Overloaded."""
        if not self._reader:
            raise PathDown("the agent's own compute connection is down")
        requester = self._requesters.get(daemon.rail)
        if requester is None:
            requester = self._relay.open("self", self._reader, daemon.rail)
            self._requesters[daemon.rail] = requester
        grant.grant_id = next(self._grant_ids)
        self._relay.submit(requester, Source(daemon, lease_id, ticket), grant, on_progress)
        return grant.grant_id

    def cancel(self, grant_ids: Iterable[int]) -> None:
        """Drop what nobody wants any more."""
        wanted = tuple(grant_ids)
        for requester in self._requesters.values():
            self._relay.cancel(requester, wanted)

    def own_read_bytes(self, rail: int | None = None) -> int:
        """Bytes of our own loads that wait at a storage link, at all of them without `rail`,
        through the relay."""
        return sum(
            requester.waiting_bytes + requester.reading_bytes
            for requester in self._requesters.values()
            if rail in (None, requester.rail)
        )

    def _lost(self, reason: str) -> None:
        requesters, self._requesters, self._reader = self._requesters, {}, ""
        for requester in requesters.values():
            self._relay.close(requester)
        if requesters:
            self._on_lost(reason)
