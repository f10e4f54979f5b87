"""Making a stream of TLS out of a connected socket: the dialler's side, the acceptor's side.

Guarantees an end within the deadline, and that who speaks in clear to a side with TLS is told so
and gets nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import NoReturn

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.errors import DeadlineExceeded, Unavailable
from dualpath.transfer.stream_handshake import HANDSHAKE_FRAME_BYTES_MAX, TLS_FIRST_BYTE
from dualpath.transfer.tls_errors import BOTH_SIDES
from dualpath.transfer.tls_files import TlsContexts
from dualpath.transfer.tls_socket import TlsSocket


def dial_tls(
    sock: socket.socket, contexts: TlsContexts, peer: str, host: str, deadline: float
) -> TlsSocket:
    """Be known to `peer` at `host`, and know it. Raises Unavailable (`tls`), DeadlineExceeded."""
    named = f"{peer!r} at {host}"
    secured = TlsSocket(sock, contexts.dialling(), named, contexts.name_of(host))
    try:
        secured.shake_hands(deadline)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{named} did not answer the handshake of TLS in time; {BOTH_SIDES}"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"{named} hung up during the handshake of TLS ({error}); {BOTH_SIDES}", reason="tls"
        ) from error
    return secured


def accept_tls(
    sock: socket.socket, contexts: TlsContexts, address: str, deadline: float
) -> TlsSocket:
    """Know who calls from `address`. Raises Unavailable (`tls`), TimeoutError or OSError."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    first = sock.recv(1, socket.MSG_PEEK)
    if not first:
        raise ConnectionResetError("the caller hung up before the handshake of TLS")
    if first[0] != TLS_FIRST_BYTE:
        _refuse_clear(sock, address)
    secured = TlsSocket(sock, contexts.accepting(), f"the caller from {address}")
    secured.shake_hands(deadline)
    return secured


def _refuse_clear(sock: socket.socket, address: str) -> NoReturn:
    with contextlib.suppress(OSError):
        # Taken first, or hanging up on unread bytes would take our answer with it.
        sock.recv(HANDSHAKE_FRAME_BYTES_MAX, socket.MSG_DONTWAIT)
        sock.sendall(frames.deny(f"this side takes data connections over TLS only; {BOTH_SIDES}"))
    raise Unavailable(f"the caller from {address} does not speak TLS; {BOTH_SIDES}", reason="tls")
