"""A stream over TLS 1.3: the records of OpenSSL between a socket and the halves of a stream.

Owns the TLS state and the bytes of records on their way. Guarantees that nothing but records gets
on the socket, that bytes count as sent once their records are with the kernel, and that sources
are read only while `send` runs. Handshake and streaming have the contracts of stream_channel.py.
The peers end connections by the socket's end, without a farewell of TLS: where a stream may end is
the frames' business.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import cast

from dualpath.transfer.errors import PeerLost
from dualpath.transfer.stream_io_twin import hash_part
from dualpath.transfer.tls_errors import tls_failure

READ_BYTES = 256 << 10
"""Most bytes of records taken from the socket at once."""
SEND_BYTES = 128 << 10
"""Most bytes encrypted before they are sent: few enough that they stay in the caches."""
JOINED_BYTES = 4 << 10
"""Shorter buffers share a record with their neighbours."""
NEVER = bytearray(1)

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class TlsSocket:
    """See the module docstring. `peer` is for messages; `name` is what the certificate of who
    was dialled must hold, "" where we were dialled."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, peer: str, name: str = ""
    ) -> None:
        self.raw = sock
        self._peer = peer
        self._until = 0.0  # of the handshake's calls
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=not name, server_hostname=name or None
        )
        # OpenSSL wants its calls on one connection one after another.
        self._lock = threading.Lock()
        self._room = memoryview(bytearray(READ_BYTES))
        self._dry = False  # no record is there: only the socket can tell of more
        self._readable, self._writable = select.poll(), select.poll()  # one for each thread
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)
        # The sending thread's:
        self._records = memoryview(b"")  # encrypted and not with the kernel yet
        self._owed = 0  # bytes in them that were not reported as sent

    # The handshake.

    def shake_hands(self, deadline: float) -> None:
        """Agree on keys. Raises Unavailable (`tls`), TimeoutError or OSError."""
        self._until = deadline
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._take():
                    raise ConnectionResetError("the peer hung up") from None
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    self._flush()  # the alert
                raise tls_failure(self._peer, error) from error
            else:
                self._flush()
                return

    def settimeout(self, value: float | None, /) -> None:
        """See StreamSocket.settimeout."""
        self._until = math.inf if value is None else time.monotonic() + value

    def setblocking(self, flag: bool, /) -> None:
        """See StreamSocket.setblocking."""
        self.raw.setblocking(flag)

    def sendall(self, data: bytes, /) -> None:
        """See StreamSocket.sendall."""
        self._tls.write(data)
        try:
            self._flush()
        except (ConnectionResetError, BrokenPipeError):
            self._look_for_alert()
            raise

    def recv(self, nbytes: int, /) -> bytes:
        """See StreamSocket.recv."""
        while True:
            try:
                return self._tls.read(nbytes)
            except ssl.SSLWantReadError:
                if not self._take():
                    return b""
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                # Certificates are verified by who is dialled after the dialler has finished.
                raise tls_failure(self._peer, error) from error

    def _look_for_alert(self) -> None:
        """Raise what the peer said before it hung up, if it did."""
        with contextlib.suppress(OSError):
            self.recv(1)

    def _flush(self) -> None:
        if records := self._outgoing.read():
            self.raw.settimeout(self._left())
            self.raw.sendall(records)

    def _take(self) -> int:
        # Anew for each: a peer may send a record byte by byte.
        self.raw.settimeout(self._left())
        got = self.raw.recv_into(self._room)
        self._incoming.write(self._room[:got])
        return got

    def _left(self) -> float | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the handshake is over")
        return None if left == math.inf else left

    # Sending.

    def send(self, parts: Sequence[bytes | memoryview], interrupt: bytearray, wait_ms: int) -> int:
        """See StreamChannel.send."""
        sent, at = 0, (0, self._owed)
        while True:
            if not self._records:
                sent += self._owed
                self._owed, at = self._encrypt(parts, at)
                if not self._owed:
                    return sent
            if interrupt[0] or not self._push(wait_ms):
                return sent

    def send_at_once(self, frame: bytes) -> int:
        """See StreamChannel.send_at_once."""
        return self.send((frame,), NEVER, 0)

    def _encrypt(
        self, parts: Sequence[bytes | memoryview], at: tuple[int, int]
    ) -> tuple[int, tuple[int, int]]:
        """Make records of what follows `at` (part, byte): how many bytes, and where they end."""
        index, skip = at
        taken, joined = 0, bytearray()
        with self._lock:
            while index < len(parts) and taken < SEND_BYTES:
                size = len(parts[index]) - skip
                if size <= 0:
                    index, skip = index + 1, -size
                    continue
                piece = memoryview(parts[index])[skip : skip + SEND_BYTES - taken]
                if len(piece) < JOINED_BYTES:
                    joined += piece
                else:
                    if joined:
                        self._tls.write(joined)
                        joined = bytearray()
                    self._tls.write(piece)
                skip += len(piece)
                taken += len(piece)
            if joined:
                self._tls.write(joined)
            self._records = memoryview(self._outgoing.read())
        return taken, (index, skip)

    def _push(self, wait_ms: int) -> bool:
        """Give the kernel records; False if it takes none within the time."""
        try:
            sent = self.raw.send(self._records, _FLAGS)
        except BlockingIOError:
            return bool(wait_ms and self._writable.poll(wait_ms))
        self._records = self._records[sent:]
        return True

    # Receiving.

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
        received, part = 0, 0
        digests: list[int] = []
        while received < nbytes and not interrupt[0]:
            target = parts[part][inside : inside + nbytes - received]
            try:
                got = self._read(target)
            except BlockingIOError:
                if wait_ms and self._readable.poll(wait_ms):
                    continue
                break
            if not got:
                return received, 0, True, digests
            received, inside = received + got, inside + got
            if inside == len(parts[part]):
                if hashed:
                    digests.append(hash_part(parts[part]))
                part, inside = part + 1, 0
        got_behind = 0
        if received == nbytes and len(behind) and self._tls.pending():
            got_behind = self._read(behind)
        return received, got_behind, False, digests

    def receive_into(self, targets: Sequence[memoryview]) -> int:
        """See StreamChannel.receive_into."""
        received = 0
        for target in targets:
            inside = 0
            while inside < len(target):
                try:
                    got = self._read(target[inside:])
                except BlockingIOError:
                    if not received:
                        raise
                    return received
                if not got:
                    return received
                received, inside = received + got, inside + got
        return received

    def wait_readable(self, timeout_ms: int) -> None:
        """See StreamChannel.wait_readable."""
        if self._dry:
            self._readable.poll(timeout_ms)

    def _read(self, target: memoryview) -> int:
        """Bytes of one record, 0 at the end. Raises BlockingIOError, PeerLost."""
        self._dry = False
        while True:
            with self._lock:
                try:
                    return cast(int, self._tls.read(len(target), target))
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return 0
                except ssl.SSLError as error:
                    raise PeerLost(f"TLS with {self._peer} broke: {error}") from error
            try:
                got = self.raw.recv_into(self._room, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._dry = True
                raise
            if not got:
                return 0
            with self._lock:
                self._incoming.write(self._room[:got])

    def hang_up(self) -> None:
        """See StreamChannel.hang_up."""
        self.raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See StreamSocket.close."""
        self.raw.close()
