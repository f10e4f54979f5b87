"""The sending half of a shm connection: names source bytes instead of sending them.

Owns the pledge page, a small shared memory that says which writes' sources may be read: a write
holds a slot of it from before its frame goes out until its completion is delivered. The receiver
copies first and looks at the slot afterwards, so bytes that were read after the completion (when
the owner may have changed them) never count as landed.
"""

from __future__ import annotations

import select
import socket
import struct
import weakref
from collections.abc import Mapping, Sequence

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.memfd_channel import send_with_fds
from dualpath.transfer.outbox import NONE_REFUSED, Fragment, Outbox, PendingWrite
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.region import PAGE_BYTES, Region
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.stream_channel import ClearChannel
from dualpath.transfer.stream_sender import BUFFERS_MAX, StreamSender, Truncated
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.transport import WRITE_BYTES_MAX, WriteBatch, WriteStatus

PLEDGE_REGION = 0
"""The region number under which the pledge page is announced."""
PLEDGE = struct.Struct("<Q")
PLEDGES_MAX = PAGE_BYTES // PLEDGE.size
"""Most writes that the receiver has not answered."""
REGIONS_MAX = 1024
"""Regions that the receiver keeps mapped for one connection."""

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

assert REGIONS_MAX > PLEDGES_MAX + 1  # so that there is always one without a write to forget


class ShmSender(StreamSender):
    """As StreamSender; sources must have a memfd."""

    def __init__(
        self,
        sock: socket.socket,
        outbox: Outbox,
        counters: PeerCounters,
        inflight_bytes_max: int,
        turns: StreamTurns,
    ) -> None:
        super().__init__(ClearChannel(sock), outbox, Pacer(0), counters, WRITE_BYTES_MAX, turns)
        self._socket = sock
        self._poll = select.poll()  # the sending thread's
        self._poll.register(sock, select.POLLOUT)
        self._fragment_bytes = WRITE_BYTES_MAX  # a name is as long for any write
        self._inflight_bytes_max = inflight_bytes_max
        self._page_sent = False
        # The rest is guarded by `_changed`.
        self._page: Region | None = None  # from the first write until `release`
        self._inflight_bytes = 0
        self._free = list(range(PLEDGES_MAX))
        self._slots: dict[int, int] = {}  # by the write's ident
        self._regions: dict[int, weakref.ref[Region]] = {}  # by serial, least recently used first

    def _complete(
        self,
        settled: Sequence[PendingWrite],
        status: WriteStatus,
        detail: str,
        refused: Mapping[int, str] = NONE_REFUSED,
    ) -> None:
        with self._changed:
            for pending in settled:
                slot = self._slots.pop(pending.ident, None)
                if slot is not None:
                    self._pledge(slot, 0)
                    self._free.append(slot)
                    self._inflight_bytes -= pending.nbytes
            self._changed.notify()
        super()._complete(settled, status, detail, refused)

    def _next_fragment(self, now: float) -> Fragment | None:
        # What is with the receiver goes in its order; the rest waits here, in the order of lanes.
        if not self._free or self._inflight_bytes >= self._inflight_bytes_max:
            return None
        fragment = super()._next_fragment(now)
        if fragment is not None:
            pending = fragment.pending
            slot = self._free.pop()
            self._slots[pending.ident] = slot
            if self._page is None:
                self._page = Region.memfd("dualpath-pledges", PAGE_BYTES)
            self._pledge(slot, pending.ident)
            self._inflight_bytes += pending.nbytes
        return fragment

    def _transmit_fragment(self, fragment: Fragment) -> None:
        pending, write = fragment.pending, fragment.pending.write
        with self._changed:
            slot, page = self._slots.get(pending.ident), self._page
        if slot is None or page is None:
            return  # the connection has ended meanwhile
        if not self._page_sent:
            self._announce(PLEDGE_REGION, page)
            self._page_sent = True
        self._introduce(write.source)
        target, lane = write.target, write.lane
        if isinstance(write, WriteBatch):
            tag, to, source = write.first_tag, write.target_table, write.source_table
        else:
            tag = write.tag
            to, source = SliceTable.of(write.target_slices), SliceTable.of(write.source_slices)
        named = (slot, write.source.serial, source)
        frame = frames.batch_from(
            pending.ident, target.key, target.generation, tag, lane, to, *named
        )
        self._transmit([frame], pending)
        self._counters.sent_bytes += pending.nbytes
        if pending.truncate_at >= 0:
            raise Truncated("cut behind the name of a write")

    def _send_some(
        self, parts: Sequence[bytes | memoryview], fds: Sequence[int], wait_ms: int
    ) -> int:
        if not fds:
            return super()._send_some(parts, fds, wait_ms)
        try:
            return send_with_fds(self._socket, parts[:BUFFERS_MAX], fds, _FLAGS)
        except BlockingIOError:
            self._poll.poll(wait_ms)
            return 0

    def _introduce(self, region: Region) -> None:
        """Make sure that the receiver knows `region`."""
        known = self._regions.pop(region.serial, None)
        self._regions[region.serial] = known or weakref.ref(region)
        if known is None:
            self._forget_unused()
            self._announce(region.serial, region)

    def _announce(self, ident: int, region: Region) -> None:
        self._transmit([frames.region(ident, region.nbytes)], None, (region.fd,))

    def _forget_unused(self) -> None:
        """Let go of regions that were closed, and of the oldest over the limit."""
        with self._changed:
            busy = self._outbox.sources_of(self._slots)
        for serial, reference in list(self._regions.items()):
            region = reference()
            closed = region is None or region.fd < 0
            if serial not in busy and (closed or len(self._regions) >= REGIONS_MAX):
                del self._regions[serial]
                self._transmit([frames.forget(serial)], None)

    def _pledge(self, slot: int, ident: int) -> None:
        if self._page is not None:
            PLEDGE.pack_into(self._page.view, slot * PLEDGE.size, ident)

    def release(self) -> None:
        """Withdraw all pledges and give the page up."""
        with self._changed:
            if self._page is not None:
                self._page.view[:] = bytes(PAGE_BYTES)
                self._page.close()
                self._page = None
