"""Whole messages of the local protocol over a blocking Unix socket, each within a deadline.

Owns one connection's buffer and the kernel's timeouts on its socket. A message that has begun must
end in time, and so must one that is sent: who stalls loses the connection and costs nobody else
anything. One thread at a time may use it; `shut` may be called from any.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

from dualpath.kvstore.local_protocol import HEADER, MalformedMessage, Parts
from dualpath.transfer.errors import DeadlineExceeded, PeerLost
from dualpath.transfer.memfd_channel import close_fds, receive_with_fds, send_with_fds

_BUFFER_BYTES = 64 << 10
_TIMEVAL = struct.Struct("@ll")
_SOCKET_BUFFER_BYTES = 256 << 10
SPINS_LEFT_OUT = 16
"""So many messages are waited for asleep after one that did not come while spinning."""


class LocalFrames:
    """See the module docstring. `message_s` bounds each message, either way, in seconds."""

    def __init__(self, sock: socket.socket, *, message_s: float) -> None:
        sock.setblocking(True)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self.socket = sock
        self._message_s = message_s
        self._set_timeout(socket.SO_SNDTIMEO, message_s)
        self._receive_s = 0.0
        self._buffer = bytearray(_BUFFER_BYTES)
        self._have = 0
        self._spins_left_out = 0
        self.fds: list[int] = []
        """Descriptors that came and nobody took yet; closed with the connection."""

    def receive(
        self,
        nbytes_max: int,
        *,
        idle_s: float = 0.0,
        with_fds: bool = False,
        spin_s: float = 0.0,
    ) -> tuple[int, int, memoryview] | None:
        """(kind, request, body) of the next message; None if the peer has closed in between.

        The body is a view of the buffer: valid until the next call. `idle_s` bounds the wait for
        its begin, 0: for ever; for the first `spin_s` of it the thread asks again and again rather
        than sleep: waking up takes long, too. Raises DeadlineExceeded, PeerLost, MalformedMessage
        (over `nbytes_max`).
        """
        if spin_s:
            self.spin(spin_s)
        if self._have < HEADER.size and not self._fill(HEADER.size, idle_s, with_fds):
            return None
        nbytes, kind, zero, request = HEADER.unpack_from(self._buffer)
        if zero or nbytes > nbytes_max:
            raise MalformedMessage(f"a message of {nbytes} bytes; at most {nbytes_max} here")
        end = HEADER.size + nbytes
        if self._have < end:
            self._fill(end, self._message_s, with_fds)
        body = memoryview(self._buffer)[HEADER.size : end]
        return kind, request, body

    def spin(self, seconds: float) -> None:
        """Take what comes so soon, if anything does; whatever else happens is found later. After
        a time in vain the next ones are left out: who is slow once stays so for a while. Loses
        descriptors: not where a message may bring them."""
        if self._have >= HEADER.size:
            return
        if self._spins_left_out:
            self._spins_left_out -= 1
            return
        until = time.monotonic() + seconds
        with memoryview(self._buffer) as whole, whole[self._have :] as free:
            while True:
                try:
                    self._have += self.socket.recv_into(free, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    if time.monotonic() < until:
                        continue
                    self._spins_left_out = SPINS_LEFT_OUT
                except OSError:
                    return
                return

    def consume(self, body: memoryview) -> None:
        """The body of the last message is not looked at any more."""
        end = HEADER.size + body.nbytes
        body.release()
        left = self._have - end
        if left:
            self._buffer[:left] = self._buffer[end : self._have]
        self._have = left

    def send(self, kind: int, request: int, parts: Parts, fds: tuple[int, ...] = ()) -> None:
        """Send a message. Raises DeadlineExceeded, PeerLost; the connection is then of no use."""
        nbytes = sum(map(len, parts))
        whole: Parts = [HEADER.pack(nbytes, kind, 0, request), *parts]
        left = HEADER.size + nbytes
        deadline = 0.0
        while True:
            try:
                sent = send_with_fds(self.socket, whole, fds, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                raise DeadlineExceeded(f"not taken within {self._message_s} s") from None
            except OSError as error:
                raise PeerLost(f"the connection broke: {error.strerror}") from error
            left -= sent
            if not left:
                return
            # The kernel bounds each part; a message that goes in one needs no clock.
            now = time.monotonic()
            deadline = deadline or now + self._message_s
            if now > deadline:
                raise DeadlineExceeded(f"not taken within {self._message_s} s")
            fds = ()
            whole = _after(whole, sent)

    def shut(self) -> None:
        """Let a thread that waits here find the connection closed."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, with what nobody took."""
        self.socket.close()
        fds, self.fds = self.fds, []
        close_fds(fds)

    def _fill(self, wanted: int, begin_s: float, with_fds: bool) -> bool:
        """Receive until `wanted` bytes are there. False if the peer closed before the first."""
        if len(self._buffer) < wanted:
            self._buffer.extend(bytes(wanted - len(self._buffer)))
        deadline = 0.0
        limit_s = begin_s
        with memoryview(self._buffer) as whole:
            while self._have < wanted:
                if self._have and not deadline:
                    deadline = time.monotonic() + self._message_s
                if deadline:
                    limit_s = deadline - time.monotonic()
                got = -1
                if limit_s > 0 or not deadline:
                    self._set_receive_timeout(limit_s)
                    got = self._receive_into(whole[self._have :], with_fds)
                if got < 0:
                    what = "no whole message" if deadline else "no message"
                    seconds = self._message_s if deadline else begin_s
                    raise DeadlineExceeded(f"{what} came within {seconds:g} s")
                if not got:
                    if self._have:
                        raise PeerLost("closed within a message")
                    return False
                self._have += got
        return True

    def _receive_into(self, target: memoryview, with_fds: bool) -> int:
        """Bytes got; 0 if the peer has closed, -1 if the time is over."""
        try:
            if not with_fds:
                return self.socket.recv_into(target)
            got, fds = receive_with_fds(self.socket, target)
        except BlockingIOError:
            return -1
        except OSError as error:
            raise PeerLost(f"the connection broke: {error.strerror}") from error
        self.fds += fds
        return got

    def _set_receive_timeout(self, seconds: float) -> None:
        # Most messages come whole and at a time when none is due: then nothing changes.
        if seconds != self._receive_s:
            self._set_timeout(socket.SO_RCVTIMEO, seconds)
            self._receive_s = seconds

    def _set_timeout(self, option: int, seconds: float) -> None:
        whole = int(seconds)
        # Zero would mean for ever.
        micros = max(int((seconds - whole) * 1e6), 1 if 0 < seconds < 1e-6 else 0)
        self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, micros))


def _after(parts: Parts, sent: int) -> Parts:
    """What is left of the parts after so many bytes."""
    left: Parts = []
    for part in parts:
        if sent >= len(part):
            sent -= len(part)
        else:
            left.append(memoryview(part)[sent:])
            sent = 0
    return left
