"""Opening a stream connection: invitation, version and names, within a time limit.

Reads exactly the bytes of one frame, so that nothing of what follows is taken (on Unix sockets
a descriptor may be attached to it). At the end of the handshake the socket does not block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.errors import DeadlineExceeded, PermissionDenied, Unavailable
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.tls_errors import BOTH_SIDES

HANDSHAKE_S = 5.0
"""Longest that an accepted connection may take to say who it is."""
HANDSHAKE_FRAME_BYTES_MAX = 1024
TLS_FIRST_BYTE = 0x16
"""With which a handshake of TLS begins, and no frame."""


def introduce(
    sock: StreamSocket,
    own_name: str,
    peer: str,
    invitation: bytes,
    deadline: float,
    streams: int = 1,
) -> tuple[bytes, ...]:
    """The dialler's side. Returns invitations to further streams; if there are any, the acceptor's
    welcome comes (`await_welcome`) once these have been opened.

    Raises PermissionDenied, Unavailable or DeadlineExceeded.
    """
    hello = frames.hello(own_name, invitation, streams=streams)
    answer = _answer(sock, peer, deadline, hello)
    if isinstance(answer, frames.Streams):
        return answer.invitations
    _check_welcome(answer, peer)
    sock.setblocking(False)
    return ()


def await_welcome(sock: StreamSocket, peer: str, deadline: float) -> None:
    """What is left of the dialler's side after further streams. Raises as `introduce`."""
    _check_welcome(_answer(sock, peer, deadline), peer)
    sock.setblocking(False)


def receive_hello(sock: StreamSocket) -> frames.Hello:
    """The acceptor's side up to what the dialler says.

    What the peer calls itself is only for messages: the invitation names it. Raises
    PermissionDenied (another version; the peer was told), Unavailable (it speaks TLS), OSError or
    MalformedFrame.
    """
    try:
        said = _receive(sock, time.monotonic() + HANDSHAKE_S)
    except Unavailable:  # whatever it reads of this, it sees that this is no TLS
        _send(sock, frames.deny(BOTH_SIDES), time.monotonic() + HANDSHAKE_S)
        raise
    if not isinstance(said, frames.Hello):
        raise MalformedFrame(f"{type(said).__name__} instead of a handshake")
    if said.version != frames.STREAM_VERSION:
        turn_down(sock, f"stream version {said.version}, this side speaks {frames.STREAM_VERSION}")
    return said


def turn_down(sock: StreamSocket, reason: str) -> NoReturn:
    """Tell the dialler why not, and raise PermissionDenied."""
    _send(sock, frames.deny(reason), time.monotonic() + HANDSHAKE_S)
    raise PermissionDenied(reason)


def send_streams(sock: StreamSocket, invitations: Sequence[bytes]) -> None:
    """Ask the dialler to open further streams before it is welcomed."""
    _send(sock, frames.streams(invitations), time.monotonic() + HANDSHAKE_S)


def send_welcome(sock: StreamSocket, own_name: str) -> None:
    """The acceptor's answer, once it is ready to receive."""
    _send(sock, frames.welcome(own_name), time.monotonic() + HANDSHAKE_S)
    sock.setblocking(False)


def _answer(sock: StreamSocket, peer: str, deadline: float, question: bytes = b"") -> frames.Frame:
    try:
        if question:
            _send(sock, question, deadline)
        return _receive(sock, deadline)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{peer!r} did not answer the handshake in time") from error
    except (OSError, MalformedFrame) as error:
        raise Unavailable(f"handshake with {peer!r} failed: {error}") from error


def _check_welcome(answer: frames.Frame, peer: str) -> None:
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


def _send(sock: StreamSocket, frame: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    sock.sendall(frame)


def _receive(sock: StreamSocket, deadline: float) -> frames.Frame:
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
        if buffer[0] == TLS_FIRST_BYTE:
            raise Unavailable(
                f"the caller speaks TLS, this side does not; {BOTH_SIDES}", reason="tls"
            )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("handshake timed out")
    return left
