"""Opening a stream connection: invitation, version and names, within a time limit.

Reads exactly the bytes of one frame, so that nothing of what follows is taken (on Unix sockets
a descriptor may be attached to it). Both functions leave the socket non-blocking.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.errors import DeadlineExceeded, PermissionDenied, Unavailable
from dualpath.transfer.stream_frame import MalformedFrame

HANDSHAKE_S = 5.0
"""Longest that an accepted connection may take to say who it is."""
HANDSHAKE_FRAME_BYTES_MAX = 1024


def introduce(
    sock: socket.socket, own_name: str, peer: str, invitation: bytes, deadline: float
) -> None:
    """The dialler's side. Raises PermissionDenied, Unavailable or DeadlineExceeded."""
    try:
        _send(sock, frames.hello(own_name, invitation), deadline)
        answer = _receive(sock, deadline)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{peer!r} did not answer the handshake in time") from error
    except (OSError, MalformedFrame) as error:
        raise Unavailable(f"handshake with {peer!r} failed: {error}") from error
    if isinstance(answer, frames.Deny):
        raise PermissionDenied(f"{peer!r} turned the connection down: {answer.reason}")
    if not isinstance(answer, frames.Welcome):
        raise Unavailable(f"{peer!r} answered the handshake with {type(answer).__name__}")
    if answer.version != frames.STREAM_VERSION:
        raise Unavailable(
            f"{peer!r} speaks stream version {answer.version}, this side "
            f"{frames.STREAM_VERSION}; upgrade the older one",
            reason="version",
        )
    sock.setblocking(False)


def receive_introduction(sock: socket.socket, redeem: Callable[[bytes], str]) -> str:
    """The acceptor's side up to the answer: the name that the peer was invited under.

    What the peer calls itself is only for messages: the invitation names it.

    Raises PermissionDenied (the peer was told), OSError or MalformedFrame.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    said = _receive(sock, deadline)
    if not isinstance(said, frames.Hello):
        raise MalformedFrame(f"{type(said).__name__} instead of a handshake")
    reason = peer = ""
    if said.version != frames.STREAM_VERSION:
        reason = f"stream version {said.version}, this side speaks {frames.STREAM_VERSION}"
    elif not (peer := redeem(said.invitation)):
        reason = f"no invitation of {said.name!r}: it is wrong, used or expired"
    if reason:
        _send(sock, frames.deny(reason), deadline)
        raise PermissionDenied(reason)
    return peer


def send_welcome(sock: socket.socket, own_name: str) -> None:
    """The acceptor's answer, once it is ready to receive."""
    _send(sock, frames.welcome(own_name), time.monotonic() + HANDSHAKE_S)
    sock.setblocking(False)


def _send(sock: socket.socket, frame: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    sock.sendall(frame)


def _receive(sock: socket.socket, deadline: float) -> frames.Frame:
    buffer = bytearray()
    while True:
        parsed = frames.parse(memoryview(buffer))
        if parsed is not None:
            return parsed[0]
        if len(buffer) < frames.PREFIX_BYTES:
            missing = frames.PREFIX_BYTES - len(buffer)
        else:
            missing = frames.head_bytes(buffer) - len(buffer)
        if len(buffer) + missing > HANDSHAKE_FRAME_BYTES_MAX:
            raise MalformedFrame("the handshake is too long")
        sock.settimeout(_left(deadline))
        got = sock.recv(missing)
        if not got:
            raise ConnectionResetError("the peer hung up during the handshake")
        buffer += got


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("handshake timed out")
    return left
