"""The receiving half of a shm connection: copies named bytes out of the sender's memory.

Owns the mappings of the sender's memfds, all read-only and sealed against shrinking, so that
neither side can write into the other's memory or take it away from under it. Copies go in steps
under the landing's lock, as everything that lands.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from dualpath.transfer import stream_frame as frames
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.memfd_channel import close_fds, receive_with_fds
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.region import PAGE_BYTES, Region
from dualpath.transfer.shm_sender import (
    PLEDGE,
    PLEDGE_REGION,
    PLEDGES_MAX,
    REGIONS_MAX,
    ShmSender,
)
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.stream_channel import ClearChannel
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_receiver import OpenWrite, StreamReceiver
from dualpath.transfer.table_copy import land_some
from dualpath.transfer.window import WindowTable

ACKED_BYTES_DELAYED_MAX = 4 << 20
"""While more is to be copied, answers wait for so many bytes: each wakes the writer up."""
_CANCELLED = frames.REFUSALS.index("cancelled")
PIECES_MAX = 1 << 16
"""Most pieces of a source; a peer could keep this thread busy with single bytes."""


class ShmReceiver(StreamReceiver):
    """As StreamReceiver, for frames that name their bytes."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        windows: WindowTable,
        sender: ShmSender,
        counters: PeerCounters,
        stop: threading.Event,
    ) -> None:
        super().__init__(ClearChannel(sock), peer, windows, Pacer(0), sender, counters, stop)
        self._socket = sock
        self._acked_bytes_delayed_max = ACKED_BYTES_DELAYED_MAX
        self._lookahead_bytes = frames.HEAD_BYTES_MAX  # there is never payload among it
        self._regions: dict[int, Region] = {}
        self._fds: list[int] = []

    def run(self) -> None:
        """As StreamReceiver.run; drops the mappings at the end."""
        try:
            super().run()
        finally:
            close_fds(self._fds)
            for region in self._regions.values():
                with contextlib.suppress(BufferError):
                    region.close()
            self._regions.clear()

    def _read_head(self, target: memoryview) -> int:
        try:
            got, fds = receive_with_fds(self._socket, target, socket.MSG_DONTWAIT)
        except InvalidRequest as error:
            raise MalformedFrame(str(error)) from error
        self._fds += fds
        if len(self._fds) > REGIONS_MAX:
            raise MalformedFrame(f"{len(self._fds)} descriptors that no frame names")
        return got

    def _handle(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.BatchFromFrame):
            self._copy(frame)
        elif isinstance(frame, frames.RegionFrame):
            self._map(frame)
        elif isinstance(frame, frames.ForgetFrame):
            region = self._regions.pop(frame.region, None)
            if region is None:
                raise MalformedFrame(f"region {frame.region} is not known")
            region.close()
        elif isinstance(frame, frames.AckFrame | frames.ResultsFrame):
            super()._handle(frame)
        else:
            raise MalformedFrame(f"unexpected {type(frame).__name__}")

    def _map(self, frame: frames.RegionFrame) -> None:
        if not self._fds:
            raise MalformedFrame(f"region {frame.region} came without a descriptor")
        if frame.region in self._regions or len(self._regions) > REGIONS_MAX:
            raise MalformedFrame(f"region {frame.region} announced twice, or too many of them")
        if frame.region == PLEDGE_REGION and frame.nbytes < PAGE_BYTES:
            raise MalformedFrame(f"a pledge page of {frame.nbytes} bytes")
        try:
            region = Region.received(self._fds.pop(0), frame.nbytes, writable=False)
        except (InvalidRequest, OSError, ValueError, OverflowError) as error:
            raise MalformedFrame(f"region {frame.region}: {error}") from error
        self._regions[frame.region] = region

    def _copy(self, frame: frames.BatchFromFrame) -> None:
        region, source, batch = self._regions.get(frame.region), frame.source, frame.batch
        if region is None or frame.region == PLEDGE_REGION:
            raise MalformedFrame(f"write from region {frame.region}, which is not known")
        end = source.span()[1]
        if end > region.nbytes or source.pieces_max > PIECES_MAX:
            raise MalformedFrame(f"source ends at {end} of {region.nbytes}, or is too fine")
        if frame.pledge >= PLEDGES_MAX or PLEDGE_REGION not in self._regions:
            raise MalformedFrame(f"pledge {frame.pledge} does not exist")
        write = self._begin(batch.ident, batch.key, batch.generation, batch.first_tag, batch.table)
        count = len(batch.table)
        while write.settled < count and not self._stop.is_set():
            first = write.settled
            last, digests = self._land(write, region, source)
            write.digests[first:last] = digests
            # Bytes may have been read before this look at the pledge, none is after it.
            if write.codes.count(0, first, last) and not self._pledged(frame):
                self._cancel(write.ident)
                self._answer(write.ident, bytes((_CANCELLED,)), write.nbytes)
                return
            if last > first:
                self._settle(write, last)

    def _land(self, write: OpenWrite, region: Region, source: SliceTable) -> tuple[int, list[int]]:
        try:
            return land_some(write.landing, region.view, source, write.settled)
        except (ValueError, OverflowError) as error:
            raise MalformedFrame(f"source in region {region.nbytes}: {error}") from error

    def _pledged(self, frame: frames.BatchFromFrame) -> bool:
        page = self._regions[PLEDGE_REGION].view
        held = PLEDGE.unpack_from(page, frame.pledge * PLEDGE.size)[0]
        return bool(held == frame.batch.ident)
