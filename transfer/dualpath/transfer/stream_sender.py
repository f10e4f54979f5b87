"""The sending half of a stream connection.

Owns the socket's write side: the outbox of writes, acknowledgements for the peer's writes, and
the thread that puts them on the wire. Guarantees: sources are read only for writes without a
completion, and never once `end` has returned; a blocked peer costs no write its deadline.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.errors import PeerLost
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import NONE_REFUSED, Fragment, Outbox, PendingWrite, deliver
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.slice_copy import buffers
from dualpath.transfer.stream_channel import StreamChannel
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.transport import (
    OnBatchCompletion,
    OnCompletion,
    Write,
    WriteBatch,
    WriteStatus,
)

UNSENT_ACKS_MAX = 1 << 16
"""A peer that writes on without reading its acknowledgements loses the connection."""
BUFFERS_MAX = 512
"""Most buffers of one sendmsg (IOV_MAX is 1024)."""
FRAGMENT_S = 0.002
"""Time that a fragment should take."""
POLL_S_MAX = 0.05
"""A sender that waits for a full socket looks at deadlines this often."""


class Truncated(Exception):
    """A write was cut short on request (see `StreamSender.submit`)."""


class StreamSender:
    """One thread runs `run`; every other method may be called from any thread."""

    def __init__(
        self,
        channel: StreamChannel,
        outbox: Outbox,
        pacer: Pacer,
        counters: PeerCounters,
        fragment_bytes: int,
        turns: StreamTurns,
    ) -> None:
        self._channel = channel
        self._outbox = outbox
        self._pacer = pacer
        self._counters = counters
        self._fragment_bytes_min = min(fragment_bytes, pacer.piece_bytes)
        self._fragment_bytes = self._fragment_bytes_min
        self._interrupt = bytearray(1)
        self._turns = turns
        self._changed = turns.join()  # guards what follows
        self._ended = False
        self._acks: deque[tuple[int, int]] = deque()  # (ident, code)
        self._control: deque[bytes] = deque()
        self._reserved = 0
        self._reserved_until = 0.0
        self._wire = threading.Lock()  # held for each send; guards what follows
        self._carry = b""  # the rest of a frame of acknowledgements
        self._in_frame = False

    @property
    def queued_bytes(self) -> int:
        """Bytes of writes that have no completion yet."""
        return self._outbox.queued_bytes

    def submit(self, write: Write, on_completion: OnCompletion, truncate_at: int = -1) -> None:
        """Queue a checked write. Raises Overloaded, or PeerLost once ended.

        With `truncate_at` >= 0 the connection ends after that many bytes of it (fault tests).
        """
        with self._changed:
            if self._ended:
                raise PeerLost(f"the connection to {self._outbox.peer!r} has ended")
            pending = self._outbox.add(write, on_completion, time.monotonic())
            pending.truncate_at = truncate_at
            self._changed.notify()

    def submit_batch(self, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """Queue a checked batch. Raises as `submit`."""
        with self._changed:
            if self._ended:
                raise PeerLost(f"the connection to {self._outbox.peer!r} has ended")
            self._outbox.add_batch(batch, on_completion, time.monotonic())
            self._changed.notify()

    def settle(self, ident: int, codes: bytes) -> bool:
        """End a write as the peer said; False if it has ended before.

        `codes` (in REFUSALS) has one for the whole, or one for each write of a batch. Raises
        PeerLost if the peer cannot have all of it yet: its source is still being read.
        """
        with self._changed:
            pending = self._outbox.find(ident)
        if pending is None:
            return False
        if not pending.gone:
            with self._wire:  # the send that has just given the kernel the rest may be under way
                gone = pending.gone
            if not gone:
                raise PeerLost(
                    f"{self._outbox.peer!r} answered write {ident} before it had all of it"
                )
        status, detail, refused = self._verdict(pending, codes)
        with self._changed:
            pending = self._outbox.settle(ident)
        if pending is None:
            return False
        self._complete([pending], status, detail, refused)
        return True

    def _verdict(
        self, pending: PendingWrite, codes: bytes
    ) -> tuple[WriteStatus, str, Mapping[int, str]]:
        write = pending.write
        count = len(write.target_table) if isinstance(write, WriteBatch) else 1
        if len(codes) not in (1, count):
            raise PeerLost(
                f"{self._outbox.peer!r} answered {len(codes)} of the {count} writes of a batch"
            )
        if not any(codes):
            return WriteStatus.DONE, "", NONE_REFUSED
        if not isinstance(write, WriteBatch):
            return WriteStatus.REFUSED, frames.REFUSALS[codes[0]], NONE_REFUSED
        each = codes if len(codes) == count else codes * count
        refused = {
            tag: frames.REFUSALS[code] for tag, code in enumerate(each, write.first_tag) if code
        }
        return WriteStatus.DONE, "", refused

    def acknowledge(self, ident: int, code: int) -> None:
        """Queue an answer to a write of the peer. Raises PeerLost over the bound."""
        with self._changed:
            if len(self._acks) >= UNSENT_ACKS_MAX:
                raise PeerLost(f"{self._outbox.peer!r} does not read its acknowledgements")
            self._acks.append((ident, code))

    def acknowledge_each(self, ident: int, codes: bytes) -> None:
        """Queue an answer to a batch of the peer that has a code for each of its writes."""
        with self._changed:
            if len(self._control) >= UNSENT_ACKS_MAX:
                raise PeerLost(f"{self._outbox.peer!r} does not read its acknowledgements")
            self._control.append(frames.results(ident, codes))
            self._changed.notify()

    def flush_acks(self) -> None:
        """Send what `acknowledge` queued: here if the wire is free, else by the thread."""
        # Whoever holds the wire looks at the acknowledgements again before it sleeps.
        while self._acks and self._wire.acquire(blocking=False):
            try:
                if self._in_frame or self._carry:
                    return
                frame = self._take_acks()
                if not frame:
                    return
                self._carry = frame[self._channel.send_at_once(frame) :]
            finally:
                self._wire.release()
            if self._carry:
                with self._changed:
                    self._control.append(b"")  # makes the thread send the rest
                    self._changed.notify()

    def end(self, status: WriteStatus, reason: str) -> bool:
        """Complete all pending writes with `status`; False if that was done before."""
        with self._changed:
            if self._ended:
                return False
            self._ended = True
            pending = self._outbox.drain()
            self._changed.notify_all()
        self._interrupt[0] = 1
        with contextlib.suppress(OSError):
            self._channel.hang_up()
        with self._wire:
            pass  # no send is under way now, and none starts: sources are no longer read
        self._complete(pending, status, reason)
        return True

    def run(self) -> None:
        """Send until the connection ends. Raises OSError or Truncated."""
        while True:
            with self._changed:
                if self._ended:
                    return
                now = time.monotonic()
                expired = self._expire(now)
                control = self._take_control()
                fragment = None if control is not None else self._next_fragment(now)
                if fragment is not None:
                    self._turns.wake_others(self._changed)
                if control is None and fragment is None and not expired:
                    self._changed.wait(self._idle_s(now))
                    continue
            self._complete(expired, WriteStatus.EXPIRED, "deadline")
            if control is not None:
                self._transmit([control], None)
            elif fragment is not None:
                self._transmit_fragment(fragment)

    # What a transport with another way for the bytes overrides.

    def _complete(
        self,
        settled: Sequence[PendingWrite],
        status: WriteStatus,
        detail: str,
        refused: Mapping[int, str] = NONE_REFUSED,
    ) -> None:
        """Deliver the completions of writes that left the outbox; called without locks."""
        for pending in settled:
            deliver(self._outbox.peer, pending, status, detail, refused)

    def _transmit_fragment(self, fragment: Fragment) -> None:
        pending, offset, nbytes = fragment.pending, fragment.offset, fragment.nbytes
        head = frames.data(pending.ident, nbytes) if offset else _opening(pending, nbytes)
        cut = 0 <= pending.truncate_at < offset + nbytes
        if cut:
            nbytes = max(0, pending.truncate_at - offset)
        payload = _payload(pending, offset, nbytes) if nbytes else []
        started_at = time.monotonic()
        self._transmit([head, *payload], pending)
        self._size_fragments(time.monotonic() - started_at)
        self._counters.sent_bytes += nbytes
        if cut:
            raise Truncated(f"cut after {pending.truncate_at} bytes of a write")

    def _size_fragments(self, took_s: float) -> None:
        """Longer fragments where they pass quickly: an urgent write waits for one of them."""
        if self._pacer.limited:
            return
        if took_s < FRAGMENT_S / 2:
            self._fragment_bytes = min(2 * self._fragment_bytes, frames.FRAGMENT_BYTES_MAX)
        elif took_s > 2 * FRAGMENT_S:
            self._fragment_bytes = max(self._fragment_bytes // 2, self._fragment_bytes_min)

    def release(self) -> None:
        """Give up what the sender holds; called once, after both threads have stopped."""

    # The wire.

    def _transmit(
        self,
        parts: Sequence[bytes | memoryview],
        pending: PendingWrite | None,
        fds: Sequence[int] = (),
    ) -> None:
        left: Sequence[bytes | memoryview] = parts
        while True:
            wait_ms = self._patience_ms()
            with self._wire:
                if self._ended:
                    return
                if self._carry:
                    left = [self._carry, *left]
                    self._carry = b""
                sent = self._send_some(left, fds, wait_ms)
                left = _without(left, sent)
                self._in_frame = bool(left)
                if not left and pending is not None and pending.sent == pending.nbytes:
                    pending.gone = True
            if not left:
                return
            if sent:
                fds = ()
            left = self._expire_while_blocked(left, pending)

    def _send_some(
        self, parts: Sequence[bytes | memoryview], fds: Sequence[int], wait_ms: int
    ) -> int:
        assert not fds  # only the shm transport has some
        # Over BUFFERS_MAX the rest follows with the next call.
        return self._channel.send(parts[:BUFFERS_MAX], self._interrupt, wait_ms)

    def _patience_ms(self) -> int:
        """How long to wait for the socket before deadlines are looked at again."""
        with self._changed:
            deadline = self._outbox.next_deadline()
        wait_s = POLL_S_MAX
        if deadline is not None:
            wait_s = min(wait_s, max(0.0, deadline - time.monotonic()))
        return math.ceil(wait_s * 1000)

    def _expire_while_blocked(
        self, left: Sequence[bytes | memoryview], current: PendingWrite | None
    ) -> Sequence[bytes | memoryview]:
        with self._changed:
            expired = self._expire(time.monotonic())
        if current is not None and current in expired:
            # The frame must be finished, but its source is no longer ours to read.
            left = [b"".join(left)]
        self._complete(expired, WriteStatus.EXPIRED, "deadline")
        return left

    # What to send next; all under `_changed`.

    def _expire(self, now: float) -> list[PendingWrite]:
        expired = self._outbox.expire(now)
        if expired:
            self._turns.wake_others(self._changed)
        for pending in expired:
            if 0 < pending.sent < pending.nbytes:
                self._control.append(frames.cancel(pending.ident))
        return expired

    def _take_control(self) -> bytes | None:
        if not self._control and not self._acks:
            return None
        control = b"".join(self._control)
        self._control.clear()
        return control + self._pop_acks()

    def _take_acks(self) -> bytes:
        with self._changed:
            return self._pop_acks()

    def _pop_acks(self) -> bytes:
        count = min(len(self._acks), frames.ACKS_MAX)
        if not count:
            return b""
        return frames.acks([self._acks.popleft() for _ in range(count)])

    def _next_fragment(self, now: float) -> Fragment | None:
        if not self._pacer.limited:
            return self._outbox.next_fragment(self._fragment_bytes)
        if not self._outbox.waiting:
            return None
        if not self._reserved:
            self._reserved = self._fragment_bytes
            self._reserved_until = self._pacer.reserve(self._reserved)
        if self._reserved_until > now:
            return None
        fragment = self._outbox.next_fragment(self._reserved)
        if fragment is not None:
            self._pacer.give_back(self._reserved - fragment.nbytes)
            self._reserved = 0
        return fragment

    def _idle_s(self, now: float) -> float | None:
        until = [
            moment
            for moment in (
                self._outbox.next_deadline(),
                self._reserved_until if self._reserved and self._outbox.waiting else None,
            )
            if moment is not None
        ]
        return max(0.0, min(until) - now) if until else None


def _opening(pending: PendingWrite, payload: int) -> bytes:
    """The head of a write's, or a batch's, first frame."""
    write, target = pending.write, pending.write.target
    if isinstance(write, WriteBatch):
        return frames.batch(
            pending.ident,
            target.key,
            target.generation,
            write.first_tag,
            write.lane,
            write.target_table,
            payload,
        )
    return frames.write(
        pending.ident,
        target.key,
        target.generation,
        write.tag,
        write.lane,
        write.target_slices,
        payload,
    )


def _payload(pending: PendingWrite, offset: int, nbytes: int) -> list[memoryview]:
    """Bytes [offset, offset + nbytes) of the source, without a copy."""
    write, view = pending.write, pending.write.source.view
    if isinstance(write, WriteBatch):
        assert pending.reader is not None
        return pending.reader.buffers(view, offset, nbytes, nbytes)
    part = write.source_slices
    if nbytes != pending.nbytes:
        part = part.part(offset, nbytes)
    return buffers(view, part, nbytes)


def _without(parts: Sequence[bytes | memoryview], sent: int) -> Sequence[bytes | memoryview]:
    """What of `parts` is left after the first `sent` bytes."""
    for index, part in enumerate(parts):
        size = len(part)
        if sent < size:
            return [memoryview(part)[sent:], *parts[index + 1 :]]
        sent -= size
    return ()
