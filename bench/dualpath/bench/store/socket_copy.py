"""The network's limit: one TCP stream between two processes, bare or hashing at both ends.

`python -m dualpath.bench.store.socket_copy HOST PORT BYTES CHUNK_BYTES [CERT KEY CA]` is the
sending end; with files it speaks TLS, as the other end does, by one plain socket of ssl. For
each byte that it reads it sends its whole memory once: after `h` it hashes every chunk before it
goes and sends the digests at the end, after `b` it does not. The receiving end compares them. Both
ends use memory on huge pages, receive in place and do nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from dualpath.bench.rounds import Sample
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.pages import PageKind, memory_of
from dualpath.transfer.errors import Corrupt, Unavailable
from dualpath.transfer.tls_files import TlsContexts, TlsFiles

CONNECT_S_MAX = 30.0
COPY_S_MAX = 120.0
_DIGEST_BYTES = 8


def _chunks(memory: memoryview, chunk_bytes: int) -> Iterator[memoryview]:
    for start in range(0, len(memory), chunk_bytes):
        yield memory[start : start + chunk_bytes]


class SocketCopy:
    """The receiving end; starts the sending one and ends it. A context manager."""

    def __init__(self, total_bytes: int, chunk_bytes: int, tls: TlsFiles | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self._memory = memory_of(PageKind.TRANSPARENT_HUGE, total_bytes)
        self._view = memoryview(self._memory)[:total_bytes]
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(CONNECT_S_MAX)
            host, port = server.getsockname()
            self._sender = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    host,
                    str(port),
                    str(total_bytes),
                    str(chunk_bytes),
                    *((tls.cert, tls.key, tls.ca) if tls is not None else ()),
                ]
            )
            try:
                self._link, _ = server.accept()
                if tls is not None:
                    self._link.settimeout(CONNECT_S_MAX)
                    accepting = TlsContexts(tls).accepting()
                    self._link = accepting.wrap_socket(self._link, server_side=True)
            except BaseException as error:
                self._sender.kill()
                self._sender.wait()
                if not isinstance(error, TimeoutError):
                    raise
                raise Unavailable(
                    f"the sending end of the socket copy did not start in {CONNECT_S_MAX:g} s"
                ) from error
        self._link.settimeout(COPY_S_MAX)

    def copy(self, *, hashing: bool) -> Sample:
        """One copy of everything. Raises Corrupt if a digest differs."""
        digests: list[bytes] = []
        with Stopwatch([self._sender.pid]) as watch:
            self._link.sendall(b"h" if hashing else b"b")
            for chunk in _chunks(self._view, self._chunk_bytes):
                self._receive(chunk)
                if hashing:
                    digests.append(xxhash.xxh3_64_digest(chunk))
            if hashing:
                theirs = bytearray(_DIGEST_BYTES * len(digests))
                self._receive(memoryview(theirs))
        if hashing and b"".join(digests) != bytes(theirs):
            raise Corrupt("the socket copy received other bytes than were sent")
        return watch.sample(len(self._view))

    def _receive(self, into: memoryview) -> None:
        while into:
            count = self._link.recv_into(into)
            if not count:
                raise Unavailable("the sending end of the socket copy has gone")
            into = into[count:]

    def close(self) -> None:
        """End both ends."""
        self._link.close()
        try:
            self._sender.wait(CONNECT_S_MAX)
        except subprocess.TimeoutExpired:
            self._sender.kill()
            self._sender.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def send(
    host: str, port: int, total_bytes: int, chunk_bytes: int, tls: TlsFiles | None = None
) -> None:
    """The sending end, until the receiver closes."""
    memory = memoryview(memory_of(PageKind.TRANSPARENT_HUGE, total_bytes))[:total_bytes]
    words = np.frombuffer(memory[: total_bytes // 8 * 8], dtype=np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    plain = socket.create_connection((host, port), timeout=CONNECT_S_MAX)
    with _secured(plain, host, tls) as link:
        link.settimeout(None)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A receiver that goes away in the middle ends this process as well.
        with contextlib.suppress(ConnectionError):
            while word := link.recv(1):
                digests = []
                for chunk in _chunks(memory, chunk_bytes):
                    if word == b"h":
                        digests.append(xxhash.xxh3_64_digest(chunk))
                    link.sendall(chunk)
                link.sendall(b"".join(digests))


def _secured(link: socket.socket, host: str, tls: TlsFiles | None) -> socket.socket:
    if tls is None:
        return link
    return TlsContexts(tls).dialling().wrap_socket(link, server_hostname=host)


if __name__ == "__main__":
    files = None
    if len(sys.argv) > 5:
        own_cert, own_key, authority = sys.argv[5:8]
        files = TlsFiles(own_cert, own_key, authority, authority)
    send(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), files)
