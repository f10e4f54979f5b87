"""One transport of the agent and the loop's view of its peers.

Owns the transport's life and the routing of lost peers, which transports report on their own
threads, to whoever watches that peer in the event loop. An agent has one network for storage
(two when shared memory is used) and one for compute, so that a limit of a transport is the limit
of a link.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from dualpath.agent.mailbox import Mailbox
from dualpath.transfer.affinity import near, node_of, node_towards
from dualpath.transfer.errors import DeadlineExceeded
from dualpath.transfer.transport import OnPeerLost, Transport

_SERIAL = re.compile(r"[#@]\d+$")
"""What tells the connections of one peer apart, at the end of the names they have here."""
DIALS_MAX = 64
"""At once. They have threads of their own: each peer that does not answer keeps one until the
deadline, and hashing for saves and hand-offs shall not wait for these."""
LATE_S_MAX = 0.5
"""How long after its deadline a dial may say by itself why it failed."""

MakeTransport = Callable[[str, OnPeerLost], Transport]
"""Called with the name of self and the callback for lost peers."""


class Network:
    """See the module docstring. All methods belong to the loop. `devices` are those that it is
    bound to, if it is: its threads run near them."""

    def __init__(
        self,
        name: str,
        make: MakeTransport,
        loop: asyncio.AbstractEventLoop,
        devices: frozenset[str] = frozenset(),
    ) -> None:
        self._devices = devices
        self._lost: Mailbox[tuple[str, str]] = Mailbox(loop, self._on_lost)
        self._watchers: dict[str, Callable[[str], None]] = {}
        self._loop = loop
        self.name = name
        self._dials = ThreadPoolExecutor(DIALS_MAX, thread_name_prefix=f"dualpath-dial-{name}")
        self.transport = make(name, lambda peer, reason: self._lost.put((peer, reason)))

    async def connect(
        self, peer: str, address: str, invitation: bytes, *, deadline_s: float
    ) -> None:
        """Dial without blocking the loop. Raises Unavailable, DeadlineExceeded, ..."""

        def dial() -> None:
            node = node_of(self._devices) if self._devices else node_towards(address)
            with near(node):
                self.transport.connect(peer, address, invitation, deadline_s=deadline_s)

        dialled = self._loop.run_in_executor(self._dials, dial)
        try:
            # A name that is looked up knows no deadline.
            async with asyncio.timeout(deadline_s + LATE_S_MAX):
                await asyncio.shield(dialled)
        except TimeoutError:
            dialled.add_done_callback(lambda late: self._drop_late(peer, late))
            raise DeadlineExceeded(f"{address} was not reached within {deadline_s:g} s") from None
        except asyncio.CancelledError:
            dialled.add_done_callback(lambda late: self._drop_late(peer, late))
            raise

    def _drop_late(self, peer: str, dialled: asyncio.Future[None]) -> None:
        """Nobody waits for this connection any more."""
        if not dialled.cancelled() and dialled.exception() is None:
            self.transport.disconnect(peer)

    def watch(self, peer: str, on_lost: Callable[[str], None]) -> None:
        """Call `on_lost(reason)` in the loop when the connection to `peer` ends."""
        self._watchers[peer] = on_lost

    def forget(self, peer: str) -> None:
        """Stop watching and drop the connection, if there still is one."""
        self._watchers.pop(peer, None)
        self.transport.disconnect(peer)

    def _on_lost(self, items: list[tuple[str, str]]) -> None:
        for peer, reason in items:
            watcher = self._watchers.pop(peer, None)
            if watcher is not None:
                watcher(reason)

    @property
    def received_bytes(self) -> int:
        """Payload received since start, all peers."""
        return sum(peer.received_bytes for peer in self.transport.traffic())

    @property
    def sent_bytes(self) -> int:
        """Payload sent since start, all peers."""
        return sum(peer.sent_bytes for peer in self.transport.traffic())

    @property
    def received_chunks(self) -> int:
        """Writes that landed since start, all peers."""
        return sum(peer.received_writes for peer in self.transport.traffic())

    def received_by_peer(self) -> Mapping[str, int]:
        """Payload received by peer, all of its connections together."""
        counts: Counter[str] = Counter()
        for peer in self.transport.traffic():
            counts[_SERIAL.sub("", peer.peer)] += peer.received_bytes
        return counts

    def sent_by_peer(self) -> Mapping[str, int]:
        """Payload sent by peer, all of its connections together."""
        counts: Counter[str] = Counter()
        for peer in self.transport.traffic():
            counts[_SERIAL.sub("", peer.peer)] += peer.sent_bytes
        return counts

    async def close(self) -> None:
        """Fence everything and join the transport's threads."""
        self._watchers.clear()
        self._dials.shutdown(wait=False, cancel_futures=True)
        await self._loop.run_in_executor(None, self.transport.close)
