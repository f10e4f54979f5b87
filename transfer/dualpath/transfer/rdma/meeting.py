"""How two ends that have met over a socket learn where each other's queue pairs are.

Runs after the invitation was checked (stream_handshake.py), so that only an invited peer gets
here; bounded in bytes and time. Both sides do the same: say where the own queue pairs are, hear
where the peer's are, join them, say so, and hear that the peer has. Nobody sends before that, so
nothing gets lost to a queue pair that is not ready.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.messages import MESSAGE_BYTES_MAX
from dualpath.transfer.rdma.verbs import QueuePairAddress
from dualpath.transfer.stream_frame import MalformedFrame

MEETING_S = 5.0
"""Longest that a meeting may take."""
PAIRS_MAX = 8
SLOTS_MAX = 1024
VERSION = 1

_HEAD = struct.Struct("<8sHHHH")
_MAGIC = b"dprdma\0\0"
_PAIR = struct.Struct("<IIH16sH")
_JOINED = b"joined\0\0"


def meet(
    sock: socket.socket,
    slots: int,
    own: Sequence[QueuePairAddress],
    join: Callable[[Sequence[QueuePairAddress]], None],
) -> int:
    """Exchange addresses and join the queue pairs; return how many slots the peer has.

    Raises Unavailable, OSError (TimeoutError included) or MalformedFrame.
    """
    deadline = time.monotonic() + MEETING_S
    said = _HEAD.pack(_MAGIC, VERSION, MESSAGE_BYTES_MAX, slots, len(own))
    said += b"".join(
        _PAIR.pack(each.number, each.packet_number, each.lid, each.gid, each.mtu) for each in own
    )
    _send(sock, said, deadline)
    magic, version, message_bytes, peer_slots, count = _HEAD.unpack(
        _receive(sock, _HEAD.size, deadline)
    )
    if magic != _MAGIC or not 1 <= count <= PAIRS_MAX or not 1 <= peer_slots <= SLOTS_MAX:
        raise MalformedFrame(f"not an RDMA meeting: {magic!r}, {count} pairs, {peer_slots} slots")
    if (version, message_bytes) != (VERSION, MESSAGE_BYTES_MAX):
        raise Unavailable(
            f"the peer speaks RDMA version {version}, this side {VERSION}; upgrade the older one",
            reason="version",
        )
    heard = _receive(sock, count * _PAIR.size, deadline)
    if count != len(own):
        raise Unavailable(
            f"the peer has {count} classes of lanes, this side {len(own)}; mark "
            "the lanes alike on both ends (`lane_dscp`, service levels)",
            reason="lanes",
        )
    join([QueuePairAddress(*_PAIR.unpack_from(heard, at * _PAIR.size)) for at in range(count)])
    _send(sock, _JOINED, deadline)
    if _receive(sock, len(_JOINED), deadline) != _JOINED:
        raise MalformedFrame("the peer did not say that it has joined")
    return int(peer_slots)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    sock.sendall(data)


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < nbytes:
        sock.settimeout(_left(deadline))
        got = sock.recv(nbytes - len(data))
        if not got:
            raise ConnectionResetError("the peer hung up while the queue pairs were joined")
        data += got
    return data


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("joining the queue pairs timed out")
    return left
