"""The `shm` transport: between processes of one machine, over a Unix socket.

Frames name bytes in the sender's memfd; the receiver copies them into its own region, once. So
nobody writes into another's memory, and fencing is the same as over tcp. Sources must be memfd
regions sealed against shrinking (`Region.memfd` makes them so); targets may be any region.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.region import F_SEAL_SHRINK, Region
from dualpath.transfer.shm_receiver import ShmReceiver
from dualpath.transfer.shm_sender import ShmSender
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_connection import Stream
from dualpath.transfer.stream_transport import StreamTransport, seconds_left
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.transport import OnPeerLost

LISTEN_BACKLOG = 128
PATH_BYTES_MAX = 107
"""The kernel's limit on the path of a Unix socket."""


@dataclass(frozen=True, slots=True)
class ShmConfig:
    """Settings of one ShmTransport.

    `queue_bytes_max` bounds the bytes without a completion of one peer, `inflight_bytes_max`
    those that the receiver was told of (more urgent writes wait behind them). `socket_mode` are
    the permissions of the socket's file.
    """

    queue_bytes_max: int = 256 << 20
    inflight_bytes_max: int = 16 << 20
    connections_max: int = 256
    socket_mode: int = 0o600

    def __post_init__(self) -> None:
        if min(self.queue_bytes_max, self.inflight_bytes_max, self.connections_max) <= 0:
            raise InvalidRequest("the limits of a ShmConfig are positive")


class ShmTransport(StreamTransport):
    """See the port's contract. Addresses are paths of Unix sockets."""

    def __init__(
        self,
        name_of_self: str,
        on_peer_lost: OnPeerLost,
        config: ShmConfig = ShmConfig(),
    ) -> None:
        super().__init__(
            name_of_self,
            on_peer_lost,
            queue_bytes_max=config.queue_bytes_max,
            connections_max=config.connections_max,
            send_pacer=Pacer(0),
            receive_pacer=Pacer(0),
        )
        self._config = config

    @property
    def name(self) -> str:
        """`shm`."""
        return "shm"

    def close(self) -> None:
        """See Transport.close; removes the socket's file."""
        super().close()
        if self._address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address)

    def _bind(self, address: str) -> tuple[socket.socket, str]:
        _check_path(address)
        _remove_stale(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(address)
            os.chmod(address, self._config.socket_mode)
            sock.listen(LISTEN_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock, address

    def _dial(self, address: str, deadline: float) -> socket.socket:
        _check_path(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds_left(deadline))
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _stream(
        self,
        index: int,
        sock: StreamSocket,
        outbox: Outbox,
        counters: PeerCounters,
        turns: StreamTurns,
        stop: threading.Event,
    ) -> Stream:
        assert isinstance(sock, socket.socket)
        sender = ShmSender(sock, outbox, counters, self._config.inflight_bytes_max, turns)
        receiver = ShmReceiver(sock, outbox.peer, self._windows, sender, counters, stop)
        return Stream(sock, sender, receiver)

    def _check_source(self, region: Region) -> None:
        if region.fd < 0:
            raise InvalidRequest(
                "the shm transport writes from memfd regions only; make it with Region.memfd"
            )
        if not fcntl.fcntl(region.fd, fcntl.F_GET_SEALS) & F_SEAL_SHRINK:
            raise InvalidRequest(
                "the source is not sealed against shrinking; make it with Region.memfd",
                reason="unsealed",
            )


def _check_path(address: str) -> None:
    if not 1 <= len(address.encode()) <= PATH_BYTES_MAX or "\0" in address:
        raise InvalidRequest(
            f"the path of a Unix socket has 1 to {PATH_BYTES_MAX} bytes: {address!r}"
        )


def _remove_stale(address: str) -> None:
    """Remove the socket of a process that is gone; leave one that answers, and other files."""
    try:
        if not stat.S_ISSOCK(os.stat(address).st_mode):
            raise FileExistsError(errno.EEXIST, "the path exists and is no socket", address)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
        except BlockingIOError:
            return  # somebody listens, with a full backlog: bind will say so
