"""The receiving half of a stream connection.

Owns the socket's read side and the parser's buffer: takes frames apart, receives payloads
straight into their destination, and answers. Guarantees the fence: bytes are received into a
region only under the landing's lock, while it is open, by a call that lets go soon after it was
asked to; everything else goes to a scratch buffer.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.landing import OPEN, Landing, LandingLock
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.slice_copy import buffers
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.stream_channel import StreamChannel
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_sender import StreamSender
from dualpath.transfer.window import WindowTable

OPEN_WRITES_MAX = 16
"""Writes of one peer that are half way in; a sender has at most one a lane."""
LOOKAHEAD_BYTES = 256
"""Bytes read at once where a head is expected; few, since payload among them is copied."""
DATA_HEAD_BYTES = len(frames.data(0, 1))
"""As many while a write is open, whose next frame has just this head."""
BUFFERS_MAX = 64
SCRATCH_BYTES = 256 << 10
ACKS_DELAYED_MAX = 16
ACKED_BYTES_DELAYED_MAX = 1 << 20
POLL_MS = 1000
WAIT_MS = 2
"""How long a receive of many bytes waits for more of them, while it holds the landings' lock."""

_CODES = {reason: code for code, reason in enumerate(frames.REFUSALS)}


class PeerClosed(Exception):
    """The peer ended the connection between two frames."""


class OpenWrite:
    """A write, or a batch of them, whose bytes are arriving.

    The bytes of part i are thrown away where `landing` is None or has refused it; `codes[i]` then
    says why. Parts [0, settled) have come to their end. `digests[i]` is that of part i, 0 if not
    known. `lock` is that of all parts.
    """

    __slots__ = (
        "_ends",
        "codes",
        "digests",
        "hashed",
        "ident",
        "landing",
        "lock",
        "received",
        "settled",
        "table",
    )

    def __init__(self, ident: int, table: SliceTable, landing: Landing | None) -> None:
        self.ident = ident
        self.table = table
        self.landing = landing
        self._ends: list[int] = []
        self.received = 0
        self.settled = 0
        self.digests = [0] * len(table)
        if landing is None:
            self.codes = bytearray((_CODES["no_window"],)) * len(table)
            self.lock, self.hashed = LandingLock(), False
        else:
            self.codes = bytearray(len(table))
            for part, reason in landing.refused.items():
                self.codes[part] = _CODES[reason]
            self.lock, self.hashed = landing.lock, landing.hashed

    @property
    def ends(self) -> list[int]:
        """How many bytes parts [0, i] have, for each i."""
        if not self._ends:
            self._ends = self.table.ends()
        return self._ends

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.table.nbytes


class StreamReceiver:
    """Run by one thread."""

    def __init__(
        self,
        channel: StreamChannel,
        peer: str,
        windows: WindowTable,
        pacer: Pacer,
        sender: StreamSender,
        counters: PeerCounters,
        stop: threading.Event,
    ) -> None:
        self._channel = channel
        self._peer = peer
        self._windows = windows
        self._pacer = pacer
        self._sender = sender
        self._counters = counters
        self._stop = stop
        self._buffer = memoryview(bytearray(frames.HEAD_BYTES_MAX + LOOKAHEAD_BYTES))
        self._lookahead_bytes = LOOKAHEAD_BYTES
        self._acked_bytes_delayed_max = ACKED_BYTES_DELAYED_MAX
        self._start = 0
        self._end = 0
        self._open: dict[int, OpenWrite] = {}
        self._delayed_acks = 0
        self._delayed_bytes = 0
        self._scratch = memoryview(b"")
        self._nowhere = memoryview(bytearray())

    def run(self) -> None:
        """Receive until the connection ends: PeerClosed, MalformedFrame, OSError, PeerLost.

        Returns once `stop` is set.
        """
        try:
            while not self._stop.is_set():
                frame = self._next_frame()
                if frame is not None:
                    self._handle(frame)
        finally:
            for write in self._open.values():
                self._abandon(write)
            self._open.clear()

    # Frames.

    def _handle(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.DataFrame):
            opened = self._open.get(frame.ident)
            if opened is None:
                raise MalformedFrame(f"data of write {frame.ident}, which is not open")
            if opened.received + frame.payload > opened.nbytes:
                raise MalformedFrame(f"more data than write {frame.ident} has")
            self._payload(opened, frame.payload)
        elif isinstance(frame, frames.BatchFrame):
            write = self._begin(
                frame.ident, frame.key, frame.generation, frame.first_tag, frame.table
            )
            self._payload(write, frame.payload)
        elif isinstance(frame, frames.WriteFrame):
            self._payload(self._begin_single(frame), frame.payload)
        elif isinstance(frame, frames.AckFrame):
            for ident, code in frame.acks:
                self._sender.settle(ident, bytes((code,)))
        elif isinstance(frame, frames.ResultsFrame):
            self._sender.settle(frame.ident, frame.codes)
        elif isinstance(frame, frames.CancelFrame):
            self._cancel(frame.ident)
        else:
            raise MalformedFrame(f"unexpected {type(frame).__name__}")

    def _begin_single(self, frame: frames.WriteFrame) -> OpenWrite:
        table = SliceTable.of(frame.slices)
        return self._begin(frame.ident, frame.key, frame.generation, frame.tag, table)

    def _begin(
        self, ident: int, key: int, generation: int, first_tag: int, table: SliceTable
    ) -> OpenWrite:
        if ident in self._open or len(self._open) >= OPEN_WRITES_MAX:
            raise MalformedFrame(f"write {ident} opened twice or too many open")
        landing = self._windows.begin_table(self._peer, key, generation, first_tag, table)
        write = self._open[ident] = OpenWrite(ident, table, landing)
        return write

    def _cancel(self, ident: int) -> None:
        # The writer has given up; it may have done so after our answer had crossed its frame.
        write = self._open.pop(ident, None)
        if write is not None:
            self._abandon(write)

    def _abandon(self, write: OpenWrite) -> None:
        if write.landing is not None:
            self._windows.abandon(write.landing, write.settled)

    def _settle(self, write: OpenWrite, last: int) -> None:
        """Bring the parts before `last`, which have all of their bytes, to their end, and with the
        last of them the write."""
        first, write.settled = write.settled, last
        if write.landing is not None and last > first:
            digests = write.digests[first:last] if write.hashed else ()
            refused = self._windows.land_parts(write.landing, first, last, digests)
            for part, reason in refused.items():
                write.codes[part] = _CODES[reason]
        if write.codes.count(0, first, last) == last - first:
            self._counters.received_bytes += write.table.bytes_of(first, last)
            self._counters.received_writes += last - first
        else:
            landed = [part for part in range(first, last) if not write.codes[part]]
            self._counters.received_bytes += sum(write.table.sizes[part] for part in landed)
            self._counters.received_writes += len(landed)
        if last == len(write.table):
            del self._open[write.ident]
            self._answer(write.ident, write.codes, write.nbytes)

    def _answer(self, ident: int, codes: bytes | bytearray, nbytes: int) -> None:
        self._counters.refused_writes += len(codes) - codes.count(0)
        if len(codes) == 1 or not any(codes):
            self._sender.acknowledge(ident, codes[0])
        else:
            self._sender.acknowledge_each(ident, bytes(codes))
        self._delayed_acks += 1
        self._delayed_bytes += nbytes
        due = self._delayed_bytes >= self._acked_bytes_delayed_max
        if due or self._delayed_acks >= ACKS_DELAYED_MAX:
            self._flush()

    # Bytes.

    def _next_frame(self) -> frames.Frame | None:
        """The next frame; None if there is not all of it yet."""
        parsed = frames.parse(self._buffer[self._start : self._end])
        if parsed is None:
            self._fill()
            return None
        frame, head_bytes = parsed
        self._start += head_bytes
        return frame

    def _fill(self) -> None:
        have = self._end - self._start
        if self._start:
            self._buffer[:have] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, have
        if have >= frames.PREFIX_BYTES:  # parsed, so its length is in bounds
            wanted = frames.head_bytes(self._buffer) - have
        else:
            wanted = (DATA_HEAD_BYTES if self._open else self._lookahead_bytes) - have
        try:
            got = self._read_head(self._buffer[have : have + wanted])
        except BlockingIOError:
            self._wait_readable()
            return
        if got == 0:
            if have or self._open:
                raise MalformedFrame("the connection ended in the middle of a write")
            raise PeerClosed
        self._end += got

    def _read_head(self, target: memoryview) -> int:
        return self._channel.receive_into((target,))

    def _payload(self, write: OpenWrite, nbytes: int) -> None:
        """Receive `nbytes` further bytes of `write`, and bring to their end what is complete."""
        left = nbytes - self._from_buffer(write, nbytes)
        while left and not self._stop.is_set():
            if self._pacer.limited:
                left -= self._receive_piece(write, left)
            else:
                left -= self._receive_run(write, left)

    def _from_buffer(self, write: OpenWrite, nbytes: int) -> int:
        """Move payload that was read together with its head."""
        have = min(nbytes, self._end - self._start)
        left = have
        while left:
            left -= self._move(write, left, self._take_buffered)
        return have

    def _take_buffered(self, targets: list[memoryview], nbytes: int) -> int:
        start = self._start
        for target in targets:
            target[:] = self._buffer[self._start : self._start + len(target)]
            self._start += len(target)
        return self._start - start

    def _receive_run(self, write: OpenWrite, left: int) -> int:
        """Receive as many of the `left` bytes as come without a pause."""
        if self._delayed_acks:
            self._flush()
        with write.lock:
            parts, inside = self._run(write, left)
            if parts:
                nbytes = min(left, sum(map(len, parts)) - inside)
                # What comes behind the payload is the next frame's head.
                behind = self._buffer[:DATA_HEAD_BYTES] if nbytes == left else self._nowhere
                got, self._end, ended, digests = self._channel.receive(
                    parts,
                    inside,
                    nbytes,
                    behind,
                    write.lock.interrupt,
                    WAIT_MS,
                    write.hashed,
                )
        if not parts:
            return self._receive_piece(write, left)
        self._start = 0
        write.digests[write.settled : write.settled + len(digests)] = digests
        self._advance(write, got)
        if got == 0:
            if ended:
                raise MalformedFrame("the connection ended in the middle of a write")
            self._wait_readable()
        return got

    def _run(self, write: OpenWrite, left: int) -> tuple[list[memoryview], int]:
        """The whole parts, each in one piece and open, in which the next `left` bytes go, and how
        many bytes of the first are there already. None at all if that one is not such a part."""
        table, landing, first = write.table, write.landing, write.settled
        inside = write.received - (write.ends[first - 1] if first else 0)
        left += inside
        parts: list[memoryview] = []
        if table.solid and landing is not None:
            view, states = landing.view, landing.states
            for index in range(first, len(states)):
                if left <= 0 or states[index] != OPEN:
                    break
                start = table.bases[index] + table.skips[index]
                size = table.sizes[index]
                parts.append(view[start : start + size])
                left -= size
        return parts, inside

    def _receive_piece(self, write: OpenWrite, left: int) -> int:
        """Receive some of the `left` bytes, as many as the link's limit lets through at once."""
        nbytes = min(left, self._pacer.piece_bytes)
        if self._pacer.limited:
            self._wait_readable()
            if not self._pacer.pass_through(nbytes, self._stop):
                return 0
        got = 0
        take = self._take_last if nbytes == left else self._take_received
        try:
            got = self._move(write, nbytes, take)
            if got == 0:
                raise MalformedFrame("the connection ended in the middle of a write")
        except BlockingIOError:
            self._wait_readable()
        self._pacer.give_back(nbytes - got)
        return got

    def _take_received(self, targets: list[memoryview], nbytes: int) -> int:
        return self._channel.receive_into(targets)

    def _take_last(self, targets: list[memoryview], nbytes: int) -> int:
        """As `_take_received`; what comes behind the payload is the next frame's head."""
        if sum(map(len, targets)) < nbytes:
            return self._take_received(targets, nbytes)
        behind = self._buffer[:DATA_HEAD_BYTES]
        got = self._channel.receive_into([*targets, behind])
        self._start, self._end = 0, max(0, got - nbytes)  # nothing was left in the buffer
        return min(got, nbytes)

    def _move(
        self, write: OpenWrite, nbytes: int, take: Callable[[list[memoryview], int], int]
    ) -> int:
        """Let `take` fill up to `nbytes` bytes of the write's targets; it must not block."""
        with write.lock:
            got = take(self._targets(write, nbytes), nbytes)
        self._advance(write, got)
        return got

    def _advance(self, write: OpenWrite, nbytes: int) -> None:
        """So many more bytes of a write are where they belong."""
        write.received += nbytes
        if write.received >= write.ends[write.settled]:
            self._settle(write, bisect_right(write.ends, write.received))

    def _targets(self, write: OpenWrite, nbytes: int) -> list[memoryview]:
        """Where the next `nbytes` bytes go; fewer, if that is in too many places. Under `lock`."""
        table, ends, index, at = write.table, write.ends, write.settled, write.received
        solid = table.solid
        found: list[memoryview] = []
        while nbytes and len(found) < BUFFERS_MAX:
            size = table.sizes[index]
            inside = at - ends[index] + size
            take = min(size - inside, nbytes)
            landing = write.landing
            if landing is None or not landing.is_open(index):
                take = min(take, SCRATCH_BYTES)
                found.append(self._elsewhere(take))
            elif solid:
                start = table.bases[index] + table.skips[index] + inside
                found.append(landing.view[start : start + take])
            else:
                part = table.part(index).part(inside, take)
                found += buffers(landing.view, part, BUFFERS_MAX - len(found))
            at += take
            nbytes -= take
            if at == ends[index]:
                index += 1
        return found

    def _elsewhere(self, nbytes: int) -> memoryview:
        if not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        return self._scratch[:nbytes]

    def _wait_readable(self) -> None:
        self._flush()
        self._channel.wait_readable(POLL_MS)

    def _flush(self) -> None:
        self._delayed_acks = 0
        self._delayed_bytes = 0
        self._sender.flush_acks()
