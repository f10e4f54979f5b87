"""One queue pair of a connection: its message buffers, and what waits to be posted on it.

Owns the send queue's accounting: it never runs over, and a post has up to POST_MAX requests.
Messages go before writes that wait; a part of the queue is kept for them. Receives are posted
again before a message is handled, so with the slots agreed on they cannot run out. One thread's,
but for `halt`.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dualpath.transfer.rdma import messages
from dualpath.transfer.rdma.messages import MESSAGE_BYTES_MAX, Message
from dualpath.transfer.rdma.port_choice import ChosenPort
from dualpath.transfer.rdma.registration_cache import address_of
from dualpath.transfer.rdma.verbs import (
    POST_MAX,
    CompletionQueue,
    Device,
    Opcode,
    PathSettings,
    Piece,
    QueueLimits,
    QueuePairAddress,
    WorkRequest,
)
from dualpath.transfer.rdma.work_rows import signal
from dualpath.transfer.rdma.write_requests import WriteRequests
from dualpath.transfer.region import Region

SENDS_MAX = 1024
MESSAGE_SENDS = 96
"""Of the send queue, kept for messages (with a BIND each) and INVALIDATEs."""
RECEIVES_SPARE = 8
PIECES_MAX = 16
_RECEIVE = 1 << 63
_PACKET_NUMBERS = 1 << 24

assert MESSAGE_SENDS > POST_MAX


class WriteStream(Protocol):
    """Writes that follow one another; the channel takes as many as fit."""

    def requests(self) -> WriteRequests:
        """The writes that are left; the last of each post is signaled."""

    def posted(self, count: int, exhausted: bool) -> None:
        """So many were posted; `exhausted`: there are no more."""

    def completed(self, count: int) -> None:
        """So many posted ones have completed: their source is not read any more."""


@dataclass(slots=True)
class _Waiting:
    """Requests that are posted together, and what to do once they have completed."""

    requests: list[WorkRequest]
    message: bytes
    completed: Callable[[], None] | None


class Channel:
    """See the module."""

    def __init__(
        self, device: Device, queue: CompletionQueue, chosen: ChosenPort, slots: int
    ) -> None:
        info = device.info
        self.pieces_max = min(PIECES_MAX, info.pieces_max)
        self._free = min(SENDS_MAX, info.requests_max)
        receives = receives_of(slots)
        limits = QueueLimits(self._free, receives, self.pieces_max)
        self._pair = device.queue_pair(queue, limits, chosen.port.number)
        self.own = QueuePairAddress(
            self._pair.number,
            secrets.randbelow(_PACKET_NUMBERS),
            chosen.port.lid,
            chosen.gid.gid,
            chosen.port.mtu,
        )
        self._buffers = Region.anonymous((receives + MESSAGE_SENDS // 2) * MESSAGE_BYTES_MAX)
        self._address = address_of(self._buffers)
        self._memory = device.register(self._address, self._buffers.nbytes, writable=True)
        self._idle_buffers = list(range(receives, receives + MESSAGE_SENDS // 2))
        self._messages: deque[_Waiting] = deque()
        self._writes: deque[tuple[WriteStream, WriteRequests]] = deque()
        self._posted: dict[int, tuple[int, Callable[[], None]]] = {}
        self._next_ident = 1
        self._progress_at = 0.0  # when something completed last, or was posted after a pause
        for index in range(receives):
            self._post_receive(index)

    @property
    def number(self) -> int:
        """The queue pair's."""
        return self._pair.number

    def join(self, peer: QueuePairAddress, path: PathSettings) -> None:
        """Join the peer's queue pair."""
        self._pair.join(self.own, peer, path)

    # What is to be posted.

    def say(self, message: Message, before: Sequence[WorkRequest] = ()) -> None:
        """Send a message, with requests (a BIND) that take effect before it."""
        self._messages.append(_Waiting([*before], messages.pack(message), None))

    def invalidate(self, rkey: int, completed: Callable[[], None]) -> None:
        """Withdraw a memory window's key, and say when that has happened."""
        request = WorkRequest(0, Opcode.INVALIDATE, True, rkey=rkey)
        self._messages.append(_Waiting([request], b"", completed))

    def write(self, stream: WriteStream) -> None:
        """Post writes as there is room."""
        self._writes.append((stream, stream.requests()))

    def drop(self, stream: WriteStream) -> None:
        """Post no more of `stream`."""
        self._writes = deque(each for each in self._writes if each[0] is not stream)

    def flush(self) -> bool:
        """Post what there is room for; whether anything was."""
        posted = False
        while self._messages and self._post_messages():
            posted = True
        while self._writes and self._post_writes():
            posted = True
        return posted

    def _post_messages(self) -> bool:
        requests: list[WorkRequest] = []
        while self._messages:
            waiting = self._messages[0]
            count = len(waiting.requests) + bool(waiting.message)
            if len(requests) + count > min(POST_MAX, self._free):
                break
            if waiting.message and not self._idle_buffers:
                break
            self._messages.popleft()
            requests += self._prepared(waiting, count)
        if not requests:
            return False
        self._free -= len(requests)
        self._pair.post_send(requests)
        return True

    def _prepared(self, waiting: _Waiting, count: int) -> list[WorkRequest]:
        completed = waiting.completed
        requests = waiting.requests
        if waiting.message:
            index = self._idle_buffers.pop()
            at = index * MESSAGE_BYTES_MAX
            self._buffers.view[at : at + len(waiting.message)] = waiting.message
            piece = Piece(self._address + at, len(waiting.message), self._memory.lkey)
            requests.append(WorkRequest(0, Opcode.SEND, True, (piece,)))

            def completed() -> None:
                self._idle_buffers.append(index)

        assert completed is not None
        requests[-1] = replace(requests[-1], ident=self._remember(count, completed))
        return requests

    def _post_writes(self) -> bool:
        room = min(POST_MAX, self._free - MESSAGE_SENDS)
        if room < 1:
            return False
        stream, left = self._writes[0]
        rows, count, last_at = left.take(room)
        exhausted = left.exhausted
        if exhausted:
            self._writes.popleft()
        if count:
            signal(rows, last_at, self._remember(count, lambda: stream.completed(count)))
            self._free -= count
        stream.posted(count, exhausted)
        if count:
            self._pair.post_rows(rows)
        return bool(count) or exhausted

    def _remember(self, count: int, completed: Callable[[], None]) -> int:
        ident = self._next_ident
        self._next_ident += 1
        if not self._posted:
            self._progress_at = time.monotonic()
        self._posted[ident] = (count, completed)
        return ident

    @property
    def waiting_since(self) -> float | None:
        """Since when the device has completed nothing of what was posted; None: nothing is."""
        return self._progress_at if self._posted else None

    # What has come to an end.

    def completed(self, ident: int) -> None:
        """A request of ours that was signaled has completed."""
        count, told = self._posted.pop(ident)
        self._progress_at = time.monotonic()
        self._free += count
        told()

    def received(self, ident: int, nbytes: int) -> Message:
        """The message in a receive; the receive is posted again."""
        index = ident & ~_RECEIVE
        at = index * MESSAGE_BYTES_MAX
        data = bytes(self._buffers.view[at : at + nbytes])
        self._post_receive(index)
        return messages.parse(data)

    def received_immediate(self, ident: int) -> None:
        """An immediate took a receive; post it again."""
        self._post_receive(ident & ~_RECEIVE)

    def _post_receive(self, index: int) -> None:
        piece = Piece(
            self._address + index * MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX, self._memory.lkey
        )
        self._pair.post_receive(index | _RECEIVE, piece)

    # The end.

    def halt(self) -> None:
        """No byte is read or written by way of this queue pair once it has returned."""
        self._pair.halt()

    def close(self) -> None:
        """Free what the channel holds, after `halt`."""
        self._pair.close()
        self._memory.close()
        self._buffers.close()


def receives_of(slots: int) -> int:
    """Receives for all that can be under way: in each slot of the peer an Ask or Cancel, then a
    Release or an immediate; in each of ours a Grant, then a Done. Both have as many slots."""
    return 4 * slots + RECEIVES_SPARE
