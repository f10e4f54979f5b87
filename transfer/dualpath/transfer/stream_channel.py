"""What the halves of a stream need of its socket; the channel that carries their bytes in clear.

`send` and `receive` are those of stream_io.py without the descriptor. A channel has one sending
thread at a time and one receiving thread; both may be inside at once.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Protocol

from dualpath.transfer import stream_io

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class StreamSocket(Protocol):
    """What the handshake needs: the methods of a socket that have these names."""

    def settimeout(self, value: float | None, /) -> None:
        """Limit each of the next calls to so many seconds."""

    def setblocking(self, flag: bool, /) -> None:
        """With False: the handshake is over."""

    def sendall(self, data: bytes, /) -> None:
        """Raises OSError, TimeoutError, Unavailable."""

    def recv(self, nbytes: int, /) -> bytes:
        """At most `nbytes` bytes, none at the end. Raises as `sendall`."""

    def close(self) -> None:
        """Give the descriptor back."""


class StreamChannel(Protocol):
    """A stream after its handshake; see the module docstring."""

    def send(self, parts: Sequence[bytes | memoryview], interrupt: bytearray, wait_ms: int) -> int:
        """How many bytes were sent for good. The next call begins with those that were not."""

    def send_at_once(self, frame: bytes) -> int:
        """As `send`, of what goes without a wait."""

    def receive(
        self,
        parts: Sequence[memoryview],
        inside: int,
        nbytes: int,
        behind: memoryview,
        interrupt: bytearray,
        wait_ms: int,
        hashed: bool,
    ) -> tuple[int, int, bool, list[int]]:
        """See stream_io.receive."""

    def receive_into(self, targets: Sequence[memoryview]) -> int:
        """Bytes that are there, put into `targets`; 0 at the end. Raises BlockingIOError."""

    def wait_readable(self, timeout_ms: int) -> None:
        """Until `receive_into` may have something, or the time is over."""

    def hang_up(self) -> None:
        """Make every call on either end fail or return soon."""


class ClearChannel:
    """The bytes as they are."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()  # the receiving thread's
        self._poll.register(sock, select.POLLIN)

    def send(self, parts: Sequence[bytes | memoryview], interrupt: bytearray, wait_ms: int) -> int:
        """See StreamChannel.send."""
        return stream_io.send(self._socket.fileno(), parts, interrupt, wait_ms)

    def send_at_once(self, frame: bytes) -> int:
        """See StreamChannel.send_at_once."""
        try:
            return self._socket.send(frame, _FLAGS)
        except BlockingIOError:
            return 0

    def receive(
        self,
        parts: Sequence[memoryview],
        inside: int,
        nbytes: int,
        behind: memoryview,
        interrupt: bytearray,
        wait_ms: int,
        hashed: bool,
    ) -> tuple[int, int, bool, list[int]]:
        """See StreamChannel.receive."""
        return stream_io.receive(
            self._socket.fileno(), parts, inside, nbytes, behind, interrupt, wait_ms, hashed
        )

    def receive_into(self, targets: Sequence[memoryview]) -> int:
        """See StreamChannel.receive_into."""
        if len(targets) == 1:
            return self._socket.recv_into(targets[0], 0, socket.MSG_DONTWAIT)
        return self._socket.recvmsg_into(targets, 0, socket.MSG_DONTWAIT)[0]

    def wait_readable(self, timeout_ms: int) -> None:
        """See StreamChannel.wait_readable."""
        self._poll.poll(timeout_ms)

    def hang_up(self) -> None:
        """See StreamChannel.hang_up."""
        self._socket.shutdown(socket.SHUT_RDWR)
