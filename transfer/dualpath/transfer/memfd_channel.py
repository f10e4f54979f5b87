"""Passing memfds between processes over a Unix socket (SCM_RIGHTS).

Owns the ancillary data of single sends and receives; both sides may mix messages with and
without descriptors. Received descriptors belong to the caller, are close-on-exec, and are not
checked here: `Region.received` does that.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence

from dualpath.transfer.errors import InvalidRequest

FDS_MAX = 8
"""Most descriptors of one message."""

_INT = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * _INT)


def send_with_fds(
    sock: socket.socket, parts: Sequence[bytes | memoryview], fds: Sequence[int], flags: int = 0
) -> int:
    """Send as `sendmsg` does, with `fds` attached to the first byte; return the bytes sent.

    If it returns at least 1, the descriptors have gone. Raises as `sendmsg` does.
    """
    if len(fds) > FDS_MAX:
        raise InvalidRequest(f"{len(fds)} descriptors in one message; at most {FDS_MAX}")
    if not fds:
        return sock.sendmsg(parts, (), flags)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg(parts, ancillary, flags)


def receive_with_fds(
    sock: socket.socket, target: memoryview | bytearray, flags: int = 0
) -> tuple[int, list[int]]:
    """Receive into `target`; return the bytes got and the descriptors that came with them.

    Raises InvalidRequest if the peer sent more descriptors than FDS_MAX (none is kept).
    """
    got, ancillary, answer_flags, _ = sock.recvmsg_into(
        [target], _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT])
    if answer_flags & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
        close_fds(fds)
        raise InvalidRequest(f"more than {FDS_MAX} descriptors in one message")
    return got, list(fds)


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
