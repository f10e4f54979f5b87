"""Bytes in and out of stream sockets in Python: what `_native` does where it could be built.

Both functions have the same arguments, answers and limits as those of transfer/native/stream.c;
what they mean is said in stream_io.py. Every step gives the interpreter's lock up and takes it
again, which is what the native ones save.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

import xxhash

PARTS_MAX = 1024
HASHED_BYTES_MIN = 241
_VECTORS_MAX = 64
_STEP_BYTES = 256 << 10

Buffer = bytes | bytearray | memoryview


def receive(
    fd: int,
    parts: Sequence[memoryview],
    inside: int,
    nbytes: int,
    behind: memoryview,
    interrupt: Buffer,
    wait_ms: int,
    hashed: bool,
    /,
) -> tuple[int, int, bool, list[int]]:
    """See stream_io.receive."""
    _check(parts, interrupt, wait_ms)
    whole = sum(map(len, parts))
    if inside < 0 or nbytes < 1 or inside >= len(parts[0]) or inside + nbytes > whole:
        raise ValueError(
            f"{nbytes} bytes from byte {inside} on do not fit into parts of {whole} bytes"
        )
    received, ended, part = 0, False, 0
    digests: list[int] = []
    while received < nbytes and not interrupt[0]:
        targets, room = _targets(parts, part, inside, nbytes - received)
        if room == nbytes - received and len(behind):
            targets.append(behind)
        got = _tried(fd, targets, select.POLLIN, wait_ms)
        if got is None:
            break
        if got == 0:
            ended = True
            break
        payload = min(got, nbytes - received)
        received += payload
        while payload:
            lacks = len(parts[part]) - inside
            if payload < lacks:
                inside += payload
                break
            payload -= lacks
            if hashed:
                digests.append(hash_part(parts[part]))
            part, inside = part + 1, 0
        if received == nbytes:
            return received, max(0, got - room), False, digests
    return received, 0, ended, digests


def send(fd: int, parts: Sequence[Buffer], interrupt: Buffer, wait_ms: int, /) -> int:
    """See stream_io.send."""
    _check(parts, interrupt, wait_ms)
    sent = 0
    left = [memoryview(part).cast("B") for part in parts]
    while left and not interrupt[0]:
        got = _tried(fd, left[:_VECTORS_MAX], select.POLLOUT, wait_ms)
        if got is None:
            break
        sent += got
        while left and got >= len(left[0]):
            got -= len(left.pop(0))
        if got:
            left[0] = left[0][got:]
    return sent


def _check(parts: Sequence[Buffer], interrupt: Buffer, wait_ms: int) -> None:
    if not 1 <= len(parts) <= PARTS_MAX:
        raise ValueError(f"1 to {PARTS_MAX} buffers at once, not {len(parts)}")
    if not len(interrupt) or wait_ms < 0:
        raise ValueError("no interrupt, or a negative time to wait")


def _targets(
    parts: Sequence[memoryview], part: int, inside: int, nbytes: int
) -> tuple[list[memoryview], int]:
    """Where the next bytes go, at most `nbytes`; and how many fit there."""
    targets: list[memoryview] = []
    room = min(nbytes, _STEP_BYTES)
    found = 0
    while found < room and len(targets) < _VECTORS_MAX - 1:
        target = parts[part][inside : inside + room - found]
        targets.append(target)
        found += len(target)
        part, inside = part + 1, 0
    return targets, found


def _tried(fd: int, buffers: Sequence[memoryview], event: int, wait_ms: int) -> int | None:
    """Read or write once; None if the socket was not ready within the time."""
    while True:
        try:
            return os.readv(fd, buffers) if event == select.POLLIN else os.writev(fd, buffers)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, event)
            if not wait_ms or not poll.poll(wait_ms):
                return None


def hash_part(part: memoryview) -> int:
    """The xxh3-64 of a part that is complete, 0 of a short one."""
    return xxhash.xxh3_64_intdigest(part) if len(part) >= HASHED_BYTES_MIN else 0
