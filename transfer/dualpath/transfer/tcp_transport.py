"""The `tcp` transport: needs nothing but sockets.

Owns socket options and addresses; frames, fencing and threads are those of the stream transport.
Bytes go from the source region to the socket and from the socket into the target's slices
without a copy of our own, or through OpenSSL where the configuration has TLS files.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks, priority_of
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.stream_channel import ClearChannel, StreamChannel, StreamSocket
from dualpath.transfer.stream_connection import Stream
from dualpath.transfer.stream_frame import FRAGMENT_BYTES_MAX
from dualpath.transfer.stream_receiver import StreamReceiver
from dualpath.transfer.stream_sender import StreamSender
from dualpath.transfer.stream_transport import StreamTransport, seconds_left
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.tls_files import TlsContexts, TlsFiles
from dualpath.transfer.tls_handshake import accept_tls, dial_tls
from dualpath.transfer.tls_socket import TlsSocket
from dualpath.transfer.transport import OnPeerLost

LISTEN_BACKLOG = 128
PACED_RECEIVE_BUFFER_BYTES = 512 << 10
"""A paced receiver keeps the socket's buffer small, so that the sender feels the limit."""

_CONGESTION = re.compile(r"[a-z][a-z0-9_]{0,14}")


def check_congestion(name: str) -> None:
    """Raise InvalidRequest unless `name` could be a congestion control of the kernel."""
    if not _CONGESTION.fullmatch(name):
        raise InvalidRequest(
            f"tcp_congestion {name!r} is no congestion control; "
            "/proc/sys/net/ipv4/tcp_available_congestion_control lists those of this kernel"
        )


@dataclass(frozen=True, slots=True)
class TcpConfig:
    """Settings of one TcpTransport, which stands for one link.

    `receive_bytes_per_s` and `send_bytes_per_s` limit payload over all of its connections in
    user space (0: no limit). `socket_buffer_bytes` sets both buffers of each socket (0: the
    kernel's tuning). `congestion` is used where the kernel has it. `vanished_s` is after how
    long a peer that answers nothing is given up. `fragment_bytes` is what one write sends at
    least before a more urgent one may overtake it: more where that takes hardly any time.
    `queue_bytes_max` bounds the bytes without a completion of one peer. `marks` are the DSCP of
    the lanes; a peer gets a stream for each different one. `unsent_bytes_max` bounds what waits in
    the kernel unsent (0: as much as fits), and with it what an urgent write waits for; few bytes
    stay in the caches. What is dialled leaves from the address `local_host` of this machine ("":
    what the kernel chooses) and by its device `local_device` ("": what routes say). With
    `tls` nothing goes in clear: both ends must have it.
    """

    receive_bytes_per_s: float = 0
    send_bytes_per_s: float = 0
    socket_buffer_bytes: int = 0
    congestion: str = "cubic"
    vanished_s: float = 5.0
    fragment_bytes: int = 512 << 10
    queue_bytes_max: int = 256 << 20
    connections_max: int = 256
    marks: LaneMarks = field(default_factory=LaneMarks)
    unsent_bytes_max: int = 256 << 10
    local_host: str = ""
    local_device: str = ""
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.fragment_bytes <= FRAGMENT_BYTES_MAX:
            raise InvalidRequest(
                f"fragment_bytes is 1 to {FRAGMENT_BYTES_MAX}, not {self.fragment_bytes}"
            )
        if self.vanished_s < 1:
            raise InvalidRequest(f"vanished_s is at least 1, not {self.vanished_s}")
        check_congestion(self.congestion)
        limits = self.socket_buffer_bytes, self.queue_bytes_max, self.connections_max
        if min(*limits, self.unsent_bytes_max) < 0:
            raise InvalidRequest("sizes and limits of a TcpConfig are not negative")


class TcpTransport(StreamTransport):
    """See the port's contract. Addresses are `host:port`, IPv6 hosts in brackets."""

    def __init__(
        self,
        name_of_self: str,
        on_peer_lost: OnPeerLost,
        config: TcpConfig = TcpConfig(),
    ) -> None:
        super().__init__(
            name_of_self,
            on_peer_lost,
            queue_bytes_max=config.queue_bytes_max,
            connections_max=config.connections_max,
            send_pacer=Pacer(config.send_bytes_per_s),
            receive_pacer=Pacer(config.receive_bytes_per_s),
        )
        self._config = config
        self._tls = None if config.tls is None else TlsContexts(config.tls)

    @property
    def name(self) -> str:
        """`tcp`."""
        return "tcp"

    def _bind(self, address: str) -> tuple[socket.socket, str]:
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._size_buffers(sock)
            sock.bind((host, port))
            sock.listen(LISTEN_BACKLOG)
        except BaseException:
            sock.close()
            raise
        bound_host, bound_port = sock.getsockname()[:2]
        return sock, format_address(bound_host, bound_port)

    def _dial(self, address: str, deadline: float) -> socket.socket:
        host, port = parse_address(address)
        if port == 0:
            raise InvalidRequest(f"cannot dial port 0: {address!r}")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._size_buffers(sock)
            bind_locally(sock, self._config.local_host, self._config.local_device)
            sock.settimeout(seconds_left(deadline))
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _secure_dialled(
        self, sock: socket.socket, peer: str, address: str, deadline: float
    ) -> StreamSocket:
        if self._tls is None:
            return sock
        return dial_tls(sock, self._tls, peer, parse_address(address)[0], deadline)

    def _secure_accepted(self, sock: socket.socket, address: str, deadline: float) -> StreamSocket:
        return sock if self._tls is None else accept_tls(sock, self._tls, address, deadline)

    @property
    def _streams(self) -> int:
        return len(self._config.marks.classes)

    def _stream_of(self, lane: Lane) -> int:
        return self._config.marks.stream_of(lane)

    def _stream(
        self,
        index: int,
        sock: StreamSocket,
        outbox: Outbox,
        counters: PeerCounters,
        turns: StreamTurns,
        stop: threading.Event,
    ) -> Stream:
        raw, channel = _raw_and_channel(sock)
        self._tune(raw)
        mark_socket(raw, self._config.marks.of_stream(index))
        sender = StreamSender(
            channel, outbox, self._send_pacer, counters, self._config.fragment_bytes, turns
        )
        receiver = StreamReceiver(
            channel, outbox.peer, self._windows, self._receive_pacer, sender, counters, stop
        )
        return Stream(sock, sender, receiver)

    def _size_buffers(self, sock: socket.socket) -> None:
        # Before connect and listen, or the window's scale is fixed already.
        nbytes = self._config.socket_buffer_bytes
        if nbytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)
        if not nbytes and self._receive_pacer.limited:
            nbytes = PACED_RECEIVE_BUFFER_BYTES
        if nbytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, nbytes)

    def _tune(self, sock: socket.socket) -> None:
        seconds = int(self._config.vanished_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 2))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, seconds // 2))
        sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._config.vanished_s * 1000)
        )
        if self._config.unsent_bytes_max:
            sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._config.unsent_bytes_max
            )
        with contextlib.suppress(OSError):  # the kernel lacks it: its default serves
            sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._config.congestion.encode()
            )


def bind_locally(sock: socket.socket, host: str, device: str) -> None:
    """Have the connection leave from this address, by this device. Raises OSError."""
    if device:
        with contextlib.suppress(PermissionError):  # kernels before 5.7 ask for a privilege
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    if host:
        sock.bind((host, 0))


def _raw_and_channel(sock: StreamSocket) -> tuple[socket.socket, StreamChannel]:
    if isinstance(sock, TlsSocket):
        return sock.raw, sock
    assert isinstance(sock, socket.socket)
    return sock, ClearChannel(sock)


def mark_socket(sock: socket.socket, dscp: int) -> None:
    """Have the socket's packets carry `dscp`, and go out with the priority that belongs to it."""
    if not dscp:
        return
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)
        with contextlib.suppress(OSError):  # it matters only where it carries IPv4
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority_of(dscp))


def parse_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`. Raises InvalidRequest."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"address {address!r} is not host:port (IPv6: [host]:port)")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
