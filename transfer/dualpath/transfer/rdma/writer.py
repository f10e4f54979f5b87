"""The writing side of an RDMA connection: from the outbox to the peer's memory.

Owns the slots: at most so many exchanges, and so many bytes, are under way, and what is more
urgent overtakes the rest, which waits in the outbox. Guarantees that a completion is handed on
only once nothing reads the source any more. Run by the engine's thread, except where noted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dualpath.transfer.lane import Lane
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import NONE_REFUSED, Outbox, PendingWrite
from dualpath.transfer.rdma.channel import Channel
from dualpath.transfer.rdma.messages import Ask, Cancel, Done, Grant, Opening, Release
from dualpath.transfer.rdma.registration_cache import Registered, RegistrationCache
from dualpath.transfer.rdma.verbs import Piece
from dualpath.transfer.rdma.write_requests import WriteRequests
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.stream_frame import REFUSALS, MalformedFrame
from dualpath.transfer.stream_sender import Truncated
from dualpath.transfer.transport import WriteBatch, WriteStatus


@dataclass(frozen=True, slots=True)
class Ended:
    """A write whose completion is to be delivered."""

    pending: PendingWrite
    status: WriteStatus
    detail: str = ""
    refused: Mapping[int, str] = field(default_factory=lambda: NONE_REFUSED)


class Exchange:
    """Bytes [offset, offset + nbytes) of a write on their way, in one slot; or, without `pending`,
    a Cancel. It is over once the peer has said Done and nothing reads the source."""

    def __init__(
        self, slot: int, channel: Channel, pending: PendingWrite | None, offset: int, nbytes: int
    ) -> None:
        self.slot = slot
        self.channel = channel
        self.pending = pending
        self.nbytes = nbytes
        self.memory: Registered | None = None
        self.dropped = False
        self.done: Done | None = None
        self.completed_all: Callable[[Exchange], None] = _unheard
        self._offset = offset
        self._grant: Grant | None = None
        self._outstanding = 0
        self._exhausted = True  # nothing is to be posted before there is a grant

    @property
    def granted(self) -> bool:
        """Whether the peer has granted it."""
        return self._grant is not None

    @property
    def reading(self) -> bool:
        """Whether the device may still read the source."""
        return self._outstanding > 0 or not self._exhausted

    def begin(self, grant: Grant, memory: Registered) -> None:
        """Write, as granted."""
        self._grant = grant
        self.memory = memory
        self._exhausted = False
        self.channel.write(self)

    def drop(self) -> bool:
        """Post nothing more; whether there was more to post."""
        unfinished = not self._exhausted
        self.dropped = self._exhausted = True
        if unfinished:
            self.channel.drop(self)
        return unfinished

    @property
    def cut(self) -> bool:
        """Whether the connection is to end in the middle of these bytes (fault tests)."""
        pending = self.pending
        return pending is not None and 0 <= pending.truncate_at < self._offset + self.nbytes

    def requests(self) -> WriteRequests:
        """See WriteStream."""
        assert self._grant is not None
        assert self.memory is not None
        assert self.pending is not None
        nbytes = self.nbytes
        if self.cut:
            nbytes = max(0, self.pending.truncate_at - self._offset)
        source = Piece(self.memory.address, 0, self.memory.keys.lkey)
        # Of a write that is cut the peer must not hear that it has all of it.
        return WriteRequests(
            self.pending,
            self._offset,
            nbytes,
            self._grant,
            source,
            self.channel.pieces_max,
            tell=not self.cut,
        )

    def posted(self, count: int, exhausted: bool) -> None:
        """See WriteStream."""
        self._outstanding += count
        self._exhausted = exhausted
        if not self.reading:
            self.completed_all(self)

    def completed(self, count: int) -> None:
        """See WriteStream."""
        self._outstanding -= count
        if not self.reading:
            self.completed_all(self)


def _unheard(exchange: Exchange) -> None:
    raise AssertionError(f"slot {exchange.slot} completed before it began")


class RdmaWriter:
    """See the module. `ended` collects what is to be delivered."""

    def __init__(
        self,
        outbox: Outbox,
        lock: threading.Lock,
        registrations: RegistrationCache,
        counters: PeerCounters,
        *,
        fragment_bytes: int,
        inflight_bytes_max: int,
    ) -> None:
        self.ended: deque[Ended] = deque()
        self._outbox = outbox
        self._lock = lock  # guards the outbox and what is expiring
        self._registrations = registrations
        self._counters = counters
        self._fragment_bytes = fragment_bytes
        self._inflight_bytes_max = inflight_bytes_max
        self._inflight_bytes = 0
        self._channels: Mapping[Lane, Channel] = {}
        self._free_slots: list[int] = []
        self._exchanges: dict[int, Exchange] = {}
        self._cancels: deque[tuple[int, Channel]] = deque()
        self._expiring: dict[int, PendingWrite] = {}
        self._expiring_until = 0.0

    def begin(self, channels: Mapping[Lane, Channel], slots: int) -> None:
        """The peer is there; each lane has its channel."""
        self._channels = channels
        self._free_slots = list(range(slots - 1, -1, -1))

    # Asking.

    def ask(self) -> None:
        """Open exchanges for what waits, as far as there are slots and bytes."""
        while self._free_slots and self._cancels:
            ident, channel = self._cancels.popleft()
            slot = self._open(Exchange(self._free_slots[-1], channel, None, 0, 0))
            channel.say(Cancel(slot, ident))
        while self._free_slots and self._inflight_bytes < self._inflight_bytes_max:
            with self._lock:
                fragment = self._outbox.next_fragment(self._fragment_bytes)
            if fragment is None:
                return
            pending, offset, nbytes = fragment.pending, fragment.offset, fragment.nbytes
            channel = self._channel_of(pending)
            slot = self._open(Exchange(self._free_slots[-1], channel, pending, offset, nbytes))
            channel.say(Ask(slot, pending.ident, nbytes, None if offset else _opening(pending)))

    def _channel_of(self, pending: PendingWrite) -> Channel:
        return self._channels[pending.write.lane]

    def _open(self, exchange: Exchange) -> int:
        self._free_slots.pop()
        exchange.completed_all = self._completed_all
        self._exchanges[exchange.slot] = exchange
        self._inflight_bytes += exchange.nbytes
        return exchange.slot

    # What the peer says.

    def granted(self, grant: Grant) -> None:
        """Write, or say that we will not."""
        exchange = self._exchanges.get(grant.slot)
        if exchange is None or exchange.pending is None or exchange.granted or exchange.done:
            raise MalformedFrame(f"a grant in slot {grant.slot}, where nothing was asked")
        if exchange.dropped:
            exchange.channel.say(Release(grant.slot))
            return
        exchange.begin(grant, self._registrations.hold(exchange.pending.write.source))

    def done(self, done: Done) -> None:
        """The peer has taken, or refused, the bytes of an exchange."""
        exchange = self._exchanges.get(done.slot)
        if exchange is None or exchange.done is not None:
            raise MalformedFrame(f"an exchange in slot {done.slot} ended that was not open")
        exchange.done = done
        if not exchange.reading:
            self._close(exchange)

    def _completed_all(self, exchange: Exchange) -> None:
        pending, memory = exchange.pending, exchange.memory
        if memory is None or pending is None:
            return
        exchange.memory = None
        self._registrations.let_go(memory)
        if not exchange.dropped:
            self._counters.sent_bytes += exchange.nbytes
        if exchange.cut and not exchange.dropped:
            raise Truncated(f"cut after {pending.truncate_at} bytes of a write")
        self._finish_expiring(pending)
        if exchange.done is not None:
            self._close(exchange)

    def _close(self, exchange: Exchange) -> None:
        del self._exchanges[exchange.slot]
        self._free_slots.append(exchange.slot)
        self._inflight_bytes -= exchange.nbytes
        pending, done = exchange.pending, exchange.done
        if pending is None or done is None or not done.codes:
            return
        if any(each.pending is pending and each.reading for each in self._exchanges.values()):
            raise MalformedFrame(f"a verdict on write {pending.ident} while it is being written")
        verdict = _verdict(pending, done.codes)
        with self._lock:
            settled = self._outbox.settle(pending.ident)
        if settled is not None:
            self.ended.append(verdict)

    # Deadlines.

    def expire(self, now: float, grace_s: float) -> None:
        """End the writes whose deadline has passed; those of which the device is still reading
        end once it has read what was posted. Raises TimeoutError if that takes over `grace_s`."""
        with self._lock:
            expired = self._outbox.expire(now)
            if expired and not self._expiring:
                self._expiring_until = now + grace_s
            self._expiring.update({pending.ident: pending for pending in expired})
        for pending in expired:
            for exchange in [each for each in self._exchanges.values() if each.pending is pending]:
                if exchange.drop():
                    exchange.channel.say(Release(exchange.slot))
                if not exchange.reading:
                    self._completed_all(exchange)
            if pending.sent:
                self._cancels.append((pending.ident, self._channel_of(pending)))
            self._finish_expiring(pending)
        if self._expiring and now >= self._expiring_until:
            raise TimeoutError(f"{len(self._expiring)} expired writes are still being read")

    def next_deadline(self) -> float | None:
        """When `expire` has to be called next. Called with the lock held."""
        deadline = self._outbox.next_deadline()
        if self._expiring:
            return min(deadline or self._expiring_until, self._expiring_until)
        return deadline

    def _finish_expiring(self, pending: PendingWrite) -> None:
        if any(each.pending is pending and each.reading for each in self._exchanges.values()):
            return
        with self._lock:
            if self._expiring.pop(pending.ident, None) is None:
                return
        self.ended.append(Ended(pending, WriteStatus.EXPIRED, "deadline"))

    # The end.

    def drain(self, status: WriteStatus, reason: str) -> list[Ended]:
        """Take out all that has no completion yet; called with the lock held, by any thread."""
        ended = [Ended(pending, status, reason) for pending in self._outbox.drain()]
        ended += [Ended(each, WriteStatus.EXPIRED, "deadline") for each in self._expiring.values()]
        self._expiring.clear()
        return ended

    def release(self) -> None:
        """Let go of the sources' registrations, once the queue pairs have been halted."""
        for exchange in self._exchanges.values():
            if exchange.memory is not None:
                self._registrations.let_go(exchange.memory)
                exchange.memory = None


def _opening(pending: PendingWrite) -> Opening:
    write = pending.write
    target = write.target
    if isinstance(write, WriteBatch):
        return Opening(target.key, target.generation, write.first_tag, write.target_table)
    return Opening(target.key, target.generation, write.tag, SliceTable.of(write.target_slices))


def _verdict(pending: PendingWrite, codes: bytes) -> Ended:
    write = pending.write
    count = len(write.target_table) if isinstance(write, WriteBatch) else 1
    if len(codes) not in (1, count):
        raise MalformedFrame(f"an answer to {len(codes)} of the {count} writes of a batch")
    if not any(codes):
        return Ended(pending, WriteStatus.DONE)
    if not isinstance(write, WriteBatch):
        return Ended(pending, WriteStatus.REFUSED, REFUSALS[codes[0]])
    each = codes if len(codes) == count else codes * count
    refused = {tag: REFUSALS[code] for tag, code in enumerate(each, write.first_tag) if code}
    return Ended(pending, WriteStatus.DONE, refused=refused)
