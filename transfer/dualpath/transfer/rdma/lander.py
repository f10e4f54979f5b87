"""The receiving side of an RDMA connection: leave to write, and what landed.

The engine's thread gives leave (`asked`) and takes it back; a thread of its own (`run`) hashes
what landed, tells its owner and ends the exchange, so that a slow callback holds up nobody's
fence. Guarantees: leave is given only for landings that are open, for a range that holds no other
than the asked bytes' span, and through a memory window of its own where the device has them; what
was fenced meanwhile is refused.

A device checks key and range, not each slice: while a leave lasts, its holder could write between
the slices too. Peers are invited and so trusted that far; TCP has to be used with others.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash
from dualpath.transfer.landing import Landing
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.rdma.channel import Channel
from dualpath.transfer.rdma.grant import Leave, LeaveLock
from dualpath.transfer.rdma.messages import SKIP_BYTES, Ask, Cancel, Done, Grant, Release
from dualpath.transfer.rdma.registration_cache import Registered, RegistrationCache
from dualpath.transfer.rdma.verbs import Device, Opcode, Window, WorkRequest
from dualpath.transfer.slice_table import SliceTable, TableReader
from dualpath.transfer.stream_frame import REFUSALS, MalformedFrame
from dualpath.transfer.window import WindowTable

_CODES = {reason: code for code, reason in enumerate(REFUSALS)}
PIECES_HASHED_MAX = 1 << 20


def _nothing() -> None:
    pass


class OpenWrite:
    """A write, or a batch of them, whose bytes are arriving. Part i is refused where `landing` is
    None or has refused it; `codes[i]` then says why. `asked` bytes were asked for, `received` have
    come, and parts [0, settled) have come to their end. `fragments` are under way, in their order;
    once one of them was given up, the write is `broken` and nothing more of it lands."""

    def __init__(self, ident: int, table: SliceTable, landing: Landing | None, lock: LeaveLock):
        self.ident = ident
        self.table = table
        self.reader = TableReader(table)
        self.ends = self.reader.ends
        refused = {} if landing is None else landing.refused
        self.codes = bytearray((0 if landing is not None else _CODES["no_window"],)) * len(table)
        for part, reason in refused.items():
            self.codes[part] = _CODES[reason]
        self.landing = landing
        self.lock = lock
        self.fragments: deque[_Fragment] = deque()
        self.broken = False
        self.asked = 0
        self.received = 0
        self.settled = 0
        self.hashed = landing is not None and landing.hashed and landing.open
        self.hasher = xxhash.xxh3_64()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.ends[-1]

    def range_of(self, offset: int, nbytes: int) -> range:
        """The parts that bytes [offset, offset + nbytes) touch."""
        return range(
            bisect_right(self.ends, offset), bisect_right(self.ends, offset + nbytes - 1) + 1
        )

    def digest_of(self, index: int, offset: int, end: int) -> int:
        """Hash those bytes of part `index` in [offset, end) of all; its digest, once it is whole
        and was open all the while, else 0."""
        landing = self.landing
        start = self.ends[index] - self.table.sizes[index]
        first, last = max(offset, start), min(end, self.ends[index])
        if first == start:
            self.hasher.reset()
        if landing is None:
            return 0
        with self.lock:
            if not landing.is_open(index):
                return 0
            for piece in self.reader.buffers(landing.view, first, last - first, PIECES_HASHED_MAX):
                self.hasher.update(piece)
        return self.hasher.intdigest() if last == self.ends[index] else 0


@dataclass(slots=True)
class _Fragment:
    """Bytes of a write that were asked for in a slot; `came` says how they ended."""

    channel: Channel
    slot: int
    nbytes: int
    ended: bool = False
    came: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    """For the landing thread: `nbytes` more of `write` have come, or were given up; or, without
    a write, `cancelled` is none any more."""

    channel: Channel
    slot: int
    write: OpenWrite | None
    nbytes: int
    came: bool = False
    cancelled: int = 0


class RdmaLander:
    """See the module."""

    def __init__(
        self,
        peer: str,
        windows: WindowTable,
        registrations: RegistrationCache,
        device: Device,
        counters: PeerCounters,
        stop: threading.Event,
    ) -> None:
        self._peer = peer
        self._windows = windows
        self._registrations = registrations
        self._device = device
        self._counters = counters
        self._stop = stop
        self._slots = 0
        self._open: dict[int, OpenWrite] = {}
        self._leaves: dict[int, tuple[Leave, OpenWrite, _Fragment]] = {}
        self._busy: set[int] = set()
        self._bound: dict[int, Leave] = {}  # by rkey, until the window's key is withdrawn
        self._idle_windows: deque[Window] = deque()
        self._all_windows: list[Window] = []
        self._changed = threading.Condition()  # guards the tasks
        self._tasks: deque[_Task] = deque()
        self._say_done: Callable[[Channel, Done], None] = _unheard
        self._fence: Callable[[Leave], None] = _unheard

    def begin(
        self,
        slots: int,
        say_done: Callable[[Channel, Done], None],
        fence: Callable[[Leave], None],
    ) -> None:
        """The peer is there. `say_done` and `fence` may be called by any thread."""
        self._slots = slots
        self._say_done = say_done
        self._fence = fence
        if self._device.info.memory_windows:
            self._all_windows = [self._device.window() for _ in range(slots)]
            self._idle_windows.extend(self._all_windows)

    # Messages; the engine's thread.

    def asked(self, channel: Channel, ask: Ask) -> None:
        """Give leave to write what is armed and open."""
        self._occupy(ask.slot)
        write = self._begin(ask)
        offset = write.asked
        write.asked += ask.nbytes
        fragment = _Fragment(channel, ask.slot, ask.nbytes)
        if write.asked > write.nbytes:
            raise MalformedFrame(f"asked for more than write {ask.ident} has")
        wanted = write.range_of(offset, ask.nbytes)
        landing = write.landing
        with write.lock:
            parts = [index for index in wanted if landing is not None and landing.is_open(index)]
            if parts and landing is not None:
                # Held under the lock: a region is closed only after its landings were.
                memory = self._registrations.hold(landing.window.region)
                leave, bind = self._leave(channel, write, parts, offset, ask.nbytes, memory)
                write.lock.leaves.append(leave)
        write.fragments.append(fragment)
        if not parts:
            self._pass_on(write, fragment, came=True)
            return
        self._leaves[ask.slot] = leave, write, fragment
        channel.say(Grant(ask.slot, memory.address, leave.rkey, _skipping(wanted, parts)), bind)

    def written(self, slot: int) -> None:
        """The writer says by an immediate that it has written all of what it was granted."""
        self._end(slot, came=True)

    def released(self, release: Release) -> None:
        """The writer says that it will not write what it was granted."""
        self._end(release.slot, came=False)

    def cancelled(self, channel: Channel, cancel: Cancel) -> None:
        """The writer has given a write up."""
        self._occupy(cancel.slot)
        self._add(_Task(channel, cancel.slot, None, 0, cancelled=cancel.ident))

    def _occupy(self, slot: int) -> None:
        if slot >= self._slots or slot in self._busy:
            raise MalformedFrame(f"an exchange in slot {slot}, which is taken or unknown")
        self._busy.add(slot)

    def _begin(self, ask: Ask) -> OpenWrite:
        opening = ask.opening
        if opening is None:
            write = self._open.get(ask.ident)
            if write is None:
                raise MalformedFrame(f"more of write {ask.ident}, which is not open")
            return write
        if ask.ident in self._open or len(self._open) > 2 * self._slots:
            raise MalformedFrame(f"write {ask.ident} opened twice or too many open")
        lock = LeaveLock(self._fence)
        landing = self._windows.begin_table(
            self._peer, opening.key, opening.generation, opening.first_tag, opening.table, lock
        )
        write = self._open[ask.ident] = OpenWrite(ask.ident, opening.table, landing, lock)
        return write

    def _leave(
        self,
        channel: Channel,
        write: OpenWrite,
        parts: Sequence[int],
        offset: int,
        nbytes: int,
        memory: Registered,
    ) -> tuple[Leave, list[WorkRequest]]:
        if not self._all_windows:
            return Leave(channel, parts, memory, None, memory.keys.rkey), []
        # One for each slot: that of a slot's last exchange was withdrawn before its Done was sent.
        window = self._idle_windows.popleft()
        rkey = window.next_key()
        start, end = _span(write, parts, offset, nbytes)
        leave = Leave(channel, parts, memory, window, rkey)
        self._bound[rkey] = leave
        bind = WorkRequest(
            0,
            Opcode.BIND,
            False,
            remote_address=memory.address + start,
            rkey=rkey,
            window=window,
            memory=memory.keys,
            nbytes=end - start,
        )
        return leave, [bind]

    def _end(self, slot: int, *, came: bool) -> None:
        found = self._leaves.pop(slot, None)
        if found is None:
            raise MalformedFrame(f"slot {slot} was written or released, but not granted")
        leave, write, fragment = found

        def over() -> None:
            self._ended(write, leave)
            self._pass_on(write, fragment, came=came)

        # What is hashed is what stays: not before nobody can write there any more.
        self.withdraw(leave, over)

    def _pass_on(self, write: OpenWrite, fragment: _Fragment, *, came: bool) -> None:
        """A fragment has ended. One for which no leave was needed ends before those in front of
        it do: they land in their order all the same."""
        fragment.ended, fragment.came = True, came
        while write.fragments and write.fragments[0].ended:
            first = write.fragments.popleft()
            self._add(_Task(first.channel, first.slot, write, first.nbytes, came=first.came))

    def _ended(self, write: OpenWrite, leave: Leave) -> None:
        with write.lock:
            if leave in write.lock.leaves:
                write.lock.leaves.remove(leave)
        leave.ended.set()

    def withdraw(self, leave: Leave, then: Callable[[], None] = _nothing) -> None:
        """Invalidate a leave's memory window, if it has one and that was not done before; `then`
        is called once its key is void."""
        if leave.window is None:
            if not leave.withdrawing:
                leave.withdrawing = True
                self._registrations.let_go(leave.memory)
            then()
        elif not leave.withdrawing:
            leave.withdrawing, leave.then = True, then
            leave.channel.invalidate(leave.rkey, lambda: self._withdrawn(leave))
        elif self._bound.get(leave.rkey) is not leave:
            then()
        elif then is not _nothing:
            leave.then = then

    def _withdrawn(self, leave: Leave) -> None:
        assert leave.window is not None
        del self._bound[leave.rkey]
        self._idle_windows.append(leave.window)
        self._registrations.let_go(leave.memory)
        leave.ended.set()
        leave.then()

    # Landing; the thread of `run`.

    def run(self) -> None:
        """Bring what came to its end, until `stop` is set."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._tasks or self._stop.is_set())
                    if self._stop.is_set():
                        return
                    task = self._tasks.popleft()
                codes = self._take(task)
                self._busy.discard(task.slot)
                self._say_done(task.channel, Done(task.slot, codes))
        finally:
            for write in list(self._open.values()):
                self._abandon(write)
            self._open.clear()

    def wake(self) -> None:
        """Let the thread look at `stop`."""
        with self._changed:
            self._changed.notify_all()

    def _add(self, task: _Task) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()

    def _take(self, task: _Task) -> bytes:
        write = task.write
        if write is None:
            gone = self._open.pop(task.cancelled, None)
            if gone is not None:
                self._abandon(gone)
            return b""
        write.broken |= not task.came
        if write.broken or self._open.get(write.ident) is not write:
            return b""  # a Cancel follows, or came before
        return self._land(write, task.nbytes)

    def _land(self, write: OpenWrite, nbytes: int) -> bytes:
        """`nbytes` more have come: settle the parts that are whole; codes if that was the last."""
        offset, write.received = write.received, write.received + nbytes
        digests = {}
        if write.hashed:
            for index in write.range_of(offset, nbytes):
                digests[index] = write.digest_of(index, offset, write.received)
        first, last = write.settled, bisect_right(write.ends, write.received)
        if write.landing is not None and last > first:
            known = [digests.get(index, 0) for index in range(first, last)] if write.hashed else ()
            refused = self._windows.land_parts(write.landing, first, last, known)
            for index, reason in refused.items():
                write.codes[index] = _CODES[reason]
        landed = [index for index in range(first, last) if not write.codes[index]]
        self._counters.received_writes += len(landed)
        self._counters.received_bytes += sum(write.table.sizes[index] for index in landed)
        write.settled = last
        if last < len(write.ends):
            return b""
        del self._open[write.ident]
        self._counters.refused_writes += len(write.codes) - write.codes.count(0)
        return bytes(write.codes) if any(write.codes) else b"\0"

    def _abandon(self, write: OpenWrite) -> None:
        if write.landing is not None:
            self._windows.abandon(write.landing, write.settled)

    # The end.

    def halted(self) -> None:
        """No byte can come any more: every leave has ended. Any thread, once the queue pairs have
        been halted."""
        for leave in (
            *(each[0] for each in list(self._leaves.values())),
            *list(self._bound.values()),
        ):
            leave.ended.set()

    def release(self) -> None:
        """Free the memory windows and let go of the memory, once the queue pairs were halted.
        Windows that are bound keep both the memory and their queue pair from being freed."""
        for window in self._all_windows:
            window.close()
        for leave in list(self._bound.values()):
            self._registrations.let_go(leave.memory)
        for leave, _, _ in self._leaves.values():
            if leave.window is None and not leave.withdrawing:
                self._registrations.let_go(leave.memory)


def _unheard(*_: object) -> None:
    raise AssertionError("the connection has not begun")


def _span(write: OpenWrite, parts: Sequence[int], offset: int, nbytes: int) -> tuple[int, int]:
    """From the first byte of the region that these bytes of these parts touch to the last."""
    starts, ends = [], []
    for index in parts:
        part = write.table.part(index)
        begin = write.ends[index] - write.table.sizes[index]
        first = max(offset, begin)
        last = min(offset + nbytes, write.ends[index])
        slices = part.part(first - begin, last - first)
        starts.append(slices.start)
        ends.append(slices.end)
    return min(starts), max(ends)


def _skipping(wanted: range, parts: Sequence[int]) -> bytes:
    skip = bytearray(SKIP_BYTES)
    if len(parts) < len(wanted):
        for index in sorted(set(wanted).difference(parts)):
            skip[index >> 3] |= 1 << (index & 7)
    return bytes(skip)
