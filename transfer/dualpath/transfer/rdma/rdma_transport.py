"""The `rdma` transport: reliable connections over InfiniBand or RoCE, by the verbs port.

Bytes go from the source region into the target's slices by RDMA WRITE, past both processors; no
buffer is in between. Connections are set up over a TCP socket at `address`, with an invitation as
every other; the socket stays open, so that a peer's end is noticed at once. A write is carried
out in fragments, each of which is asked for, granted, written and answered (messages.py); many
are under way at once, so the extra round trip costs no throughput.

Fences: leave to write is given for one fragment and one memory window of type 2B over just its
span. A fence waits, for a bounded time, until the writer has ended what it was granted; then it
withdraws the window, and if that does not complete either, or there are no windows, it halts the
queue pair before anything can be used again. A writer that comes later gets an access error, and
with it the connection ends. Without memory windows peers hold the key of the whole region as long
as it stays registered.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from dualpath.transfer.errors import DeadlineExceeded, InvalidRequest, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.engine import RdmaEngine
from dualpath.transfer.rdma.lander import RdmaLander
from dualpath.transfer.rdma.port_choice import choose_port
from dualpath.transfer.rdma.registration_cache import RegistrationCache
from dualpath.transfer.rdma.verbs import Verbs
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_connection import Stream
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import OnArrival, OnHashed, OnPeerLost

_log = logging.getLogger(__name__)


class RdmaTransport(TcpTransport):
    """See the port's contract. Addresses are `host:port` of the socket for setting up."""

    def __init__(
        self,
        name_of_self: str,
        on_peer_lost: OnPeerLost,
        verbs: Verbs,
        config: RdmaConfig | None = None,
    ) -> None:
        config = config or RdmaConfig()
        if config.set_up.tls is not None:
            raise InvalidRequest("the rdma transport does not encrypt; use tcp, or no TLS files")
        self._rdma = config
        self._device = verbs.open(
            config.device or _only(verbs), memory_windows=config.memory_windows
        )
        try:
            self._chosen = choose_port(self._device.info, config.port, config.gid_index)
            self._registrations = RegistrationCache(self._device, config.registrations_max)
            super().__init__(name_of_self, on_peer_lost, config.set_up)
            self._windows.device_memory = True
        except BaseException:
            self._device.close()
            raise

    @property
    def name(self) -> str:
        """`rdma`."""
        return "rdma"

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        """See Transport.connect; returns once the queue pairs are joined."""
        deadline = time.monotonic() + deadline_s
        super().connect(peer, address, invitation, deadline_s=deadline_s)
        sender = self._connected(peer).first.sender
        assert isinstance(sender, RdmaEngine)
        if not sender.wait_ready(deadline):
            self.disconnect(peer)
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"{peer!r} did not join its queue pairs in time")
            raise Unavailable(f"the queue pairs to {peer!r} at {address} could not be joined")

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """See Transport.expose; registers the region, which may take its time once."""
        window = super().expose(region, offset, nbytes, on_arrival, on_hashed=on_hashed)
        try:
            self._registrations.let_go(self._registrations.hold(region))
        except BaseException:
            self.revoke(window)
            raise
        return window

    def close(self) -> None:
        """See Transport.close."""
        super().close()
        try:
            self._registrations.close()
            self._device.close()
        except Unavailable:  # a callback that does not return keeps a connection half alive
            _log.exception("the device %s cannot be closed", self._device.info.name)

    def _check_source(self, region: Region) -> None:
        self._registrations.let_go(self._registrations.hold(region))

    @property
    def _streams(self) -> int:
        return 1

    def _stream_of(self, lane: Lane) -> int:
        return 0

    def _stream(
        self,
        index: int,
        sock: StreamSocket,
        outbox: Outbox,
        counters: PeerCounters,
        turns: StreamTurns,
        stop: threading.Event,
    ) -> Stream:
        if index:
            raise Unavailable("an RDMA connection is set up over one socket, not several")
        assert isinstance(sock, socket.socket)  # TLS is refused above: it would not cover RDMA
        self._tune(sock)
        lander = RdmaLander(
            outbox.peer, self._windows, self._registrations, self._device, counters, stop
        )
        engine = RdmaEngine(
            sock,
            outbox,
            self._device,
            self._chosen,
            self._registrations,
            counters,
            lander,
            self._rdma,
        )
        return Stream(sock, engine, lander)


def _only(verbs: Verbs) -> str:
    names = verbs.devices()
    if len(names) != 1:
        raise InvalidRequest(f"name one of the RDMA devices: {', '.join(names)}")
    return names[0]
