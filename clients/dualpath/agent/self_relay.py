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
        self._requester: Requester | None = None
        self._lock = asyncio.Lock()
        self._serial = itertools.count(1)
        self._grant_ids = itertools.count(1)

    @property
    def up(self) -> bool:
        """Whether grants can be submitted."""
        return self._requester is not None

    @property
    def peer(self) -> str:
        """The name by which this agent writes to itself, "" while it is not connected."""
        return "" if self._requester is None else self._requester.peer

    async def ensure(self) -> None:
        """Connect to ourselves, if we are not. Raises Unavailable, DeadlineExceeded, ..."""
        async with self._lock:
            if self._requester is not None:
                return
            transport = self._compute.transport
            address = transport.address or transport.listen(self._data_listen)
            number = next(self._serial)
            reader, writer = f"self:reader#{number}", f"self:writer#{number}"
            invitation = transport.invite(reader)
            self._compute.watch(writer, self._lost)
            await self._compute.connect(writer, address, invitation, deadline_s=self._timeout_s)
            self._requester = self._relay.open("self", reader)

    def submit(
        self,
        daemon: DaemonLink,
        lease_id: int,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
    ) -> int:
        """Relay chunks of our own lease to ourselves; returns the grant's id. Raises PathDown."""
        if self._requester is None:
            raise PathDown("the agent's own compute connection is down")
        grant.grant_id = next(self._grant_ids)
        self._relay.submit(self._requester, Source(daemon, lease_id), grant, on_progress)
        return grant.grant_id

    def cancel(self, grant_ids: Iterable[int]) -> None:
        """Drop what nobody wants any more."""
        if self._requester is not None:
            self._relay.cancel(self._requester, grant_ids)

    def own_read_bytes(self) -> int:
        """Bytes of our own loads that wait at the storage link, through the relay."""
        if self._requester is None:
            return 0
        return self._requester.waiting_bytes + self._requester.reading_bytes

    def _lost(self, reason: str) -> None:
        requester, self._requester = self._requester, None
        if requester is not None:
            self._relay.close(requester)
            self._on_lost(reason)
