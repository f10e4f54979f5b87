"""The receiving half of a stream connection.

Owns the socket's read side and the parser's buffer: takes frames apart, receives payloads
straight into their destination, and answers. Guarantees the fence: bytes are received into a
region only under the landing's lock, while it is open, by a call that cannot block; everything
else goes to a scratch buffer.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.slice_copy import buffers
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_sender import StreamSender
from dualpath.transfer.transport import WriteStatus
from dualpath.transfer.window import Landing, Refused, WindowTable

OPEN_WRITES_MAX = 16
"""Writes of one peer that are half way in; a sender has at most one a lane."""
LOOKAHEAD_BYTES = 256
"""Bytes read at once where a head is expected; few, since payload among them is copied."""
BUFFERS_MAX = 64
SCRATCH_BYTES = 256 << 10
ACKS_DELAYED_MAX = 16
POLL_MS = 1000

_CODES = {reason: code for code, reason in enumerate(frames.REFUSALS)}


class PeerClosed(Exception):
    """The peer ended the connection between two frames."""


class OpenWrite:
    """A write whose bytes are arriving; `landing` is None where they are thrown away."""

    __slots__ = ("code", "ident", "landing", "received", "slices")

    def __init__(self, ident: int, slices: Slices, landing: Landing | None, code: int) -> None:
        self.ident = ident
        self.slices = slices
        self.landing = landing
        self.code = code
        self.received = 0


class StreamReceiver:
    """Run by one thread."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        windows: WindowTable,
        pacer: Pacer,
        sender: StreamSender,
        counters: PeerCounters,
        stop: threading.Event,
    ) -> None:
        self._socket = sock
        self._peer = peer
        self._windows = windows
        self._pacer = pacer
        self._sender = sender
        self._counters = counters
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = memoryview(bytearray(frames.HEAD_BYTES_MAX + LOOKAHEAD_BYTES))
        self._start = 0
        self._end = 0
        self._open: dict[int, OpenWrite] = {}
        self._delayed_acks = 0
        self._scratch = memoryview(b"")

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
                if write.landing is not None:
                    self._windows.abandon(write.landing)
            self._open.clear()

    # Frames.

    def _handle(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.WriteFrame):
            write = self._begin(frame)
            self._payload(write, frame.payload)
        elif isinstance(frame, frames.DataFrame):
            opened = self._open.get(frame.ident)
            if opened is None:
                raise MalformedFrame(f"data of write {frame.ident}, which is not open")
            if opened.received + frame.payload > opened.slices.nbytes:
                raise MalformedFrame(f"more data than write {frame.ident} has")
            self._payload(opened, frame.payload)
        elif isinstance(frame, frames.AckFrame):
            for ident, code in frame.acks:
                status = WriteStatus.REFUSED if code else WriteStatus.DONE
                self._sender.settle(ident, status, frames.REFUSALS[code])
        elif isinstance(frame, frames.CancelFrame):
            self._cancel(frame.ident)
        else:
            raise MalformedFrame(f"unexpected {type(frame).__name__}")

    def _begin(self, frame: frames.WriteFrame) -> OpenWrite:
        if frame.ident in self._open or len(self._open) >= OPEN_WRITES_MAX:
            raise MalformedFrame(f"write {frame.ident} opened twice or too many open")
        landing, code = None, 0
        try:
            landing = self._windows.begin(
                self._peer, frame.key, frame.generation, frame.tag, frame.slices
            )
        except Refused as refused:
            code = _CODES[refused.reason]
        write = OpenWrite(frame.ident, frame.slices, landing, code)
        self._open[frame.ident] = write
        return write

    def _cancel(self, ident: int) -> None:
        # The writer has given up; it may have done so after our answer had crossed its frame.
        write = self._open.pop(ident, None)
        if write is not None and write.landing is not None:
            self._windows.abandon(write.landing)

    def _finish(self, write: OpenWrite) -> None:
        del self._open[write.ident]
        code = write.code
        if write.landing is not None:
            try:
                self._windows.land(write.landing)
                self._counters.received_bytes += write.slices.nbytes
                self._counters.received_writes += 1
            except Refused as refused:
                code = _CODES[refused.reason]
        self._answer(write.ident, code)

    def _answer(self, ident: int, code: int) -> None:
        if code:
            self._counters.refused_writes += 1
        self._sender.acknowledge(ident, code)
        self._delayed_acks += 1
        if self._delayed_acks >= ACKS_DELAYED_MAX:
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
        try:
            got = self._read_head(self._buffer[have : have + LOOKAHEAD_BYTES])
        except BlockingIOError:
            self._wait_readable()
            return
        if got == 0:
            if have or self._open:
                raise MalformedFrame("the connection ended in the middle of a write")
            raise PeerClosed
        self._end += got

    def _read_head(self, target: memoryview) -> int:
        return self._socket.recv_into(target, 0, socket.MSG_DONTWAIT)

    def _payload(self, write: OpenWrite, nbytes: int) -> None:
        """Receive `nbytes` further bytes of `write`, and finish it with its last."""
        left = nbytes - self._from_buffer(write, nbytes)
        while left and not self._stop.is_set():
            left -= self._receive_piece(write, min(left, self._pacer.piece_bytes))
        if not left and write.received == write.slices.nbytes:
            self._finish(write)

    def _from_buffer(self, write: OpenWrite, nbytes: int) -> int:
        """Move payload that was read together with its head."""
        have = min(nbytes, self._end - self._start)
        left = have
        while left:
            left -= self._move(write, left, self._take_buffered)
        return have

    def _take_buffered(self, targets: list[memoryview]) -> int:
        start = self._start
        for target in targets:
            target[:] = self._buffer[self._start : self._start + len(target)]
            self._start += len(target)
        return self._start - start

    def _receive_piece(self, write: OpenWrite, nbytes: int) -> int:
        """Receive up to `nbytes` bytes, as many as the link's limit lets through at once."""
        if self._pacer.limited:
            self._wait_readable()
            if not self._pacer.pass_through(nbytes, self._stop):
                return 0
        got = 0
        try:
            got = self._move(write, nbytes, self._take_received)
            if got == 0:
                raise MalformedFrame("the connection ended in the middle of a write")
        except BlockingIOError:
            self._wait_readable()
        self._pacer.give_back(nbytes - got)
        return got

    def _take_received(self, targets: list[memoryview]) -> int:
        if len(targets) == 1:
            return self._socket.recv_into(targets[0], 0, socket.MSG_DONTWAIT)
        return self._socket.recvmsg_into(targets, 0, socket.MSG_DONTWAIT)[0]

    def _move(self, write: OpenWrite, nbytes: int, take: Callable[[list[memoryview]], int]) -> int:
        """Let `take` fill up to `nbytes` bytes of the write's target; it must not block."""
        landing = write.landing
        if landing is None:
            got = take(self._elsewhere(nbytes))
        else:
            with landing.lock:
                if landing.open:
                    part = write.slices
                    if nbytes != part.nbytes:
                        part = part.part(write.received, nbytes)
                    got = take(buffers(landing.region.view, part, BUFFERS_MAX))
                else:
                    got = take(self._elsewhere(nbytes))
        write.received += got
        return got

    def _elsewhere(self, nbytes: int) -> list[memoryview]:
        if not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        return [self._scratch[:nbytes]]

    def _wait_readable(self) -> None:
        self._flush()
        self._poll.poll(POLL_MS)

    def _flush(self) -> None:
        self._delayed_acks = 0
        self._sender.flush_acks()
