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
from dualpath.transfer.region import Region
from dualpath.transfer.shm_sender import (
    PLEDGE,
    PLEDGE_REGION,
    PLEDGES_MAX,
    REGIONS_MAX,
    ShmSender,
)
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_receiver import OpenWrite, StreamReceiver
from dualpath.transfer.window import WindowTable

STEP_BYTES = 1 << 20
"""Most bytes copied while a landing is locked."""
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
        super().__init__(sock, peer, windows, Pacer(0), sender, counters, stop)
        self._shm_sender = sender
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
        if isinstance(frame, frames.WriteFromFrame):
            self._copy(frame)
        elif isinstance(frame, frames.RegionFrame):
            self._map(frame)
        elif isinstance(frame, frames.ForgetFrame):
            region = self._regions.pop(frame.region, None)
            if region is None:
                raise MalformedFrame(f"region {frame.region} is not known")
            region.close()
        elif isinstance(frame, frames.AckFrame):
            super()._handle(frame)
        else:
            raise MalformedFrame(f"unexpected {type(frame).__name__}")

    def _map(self, frame: frames.RegionFrame) -> None:
        if not self._fds:
            raise MalformedFrame(f"region {frame.region} came without a descriptor")
        if frame.region in self._regions or len(self._regions) > REGIONS_MAX:
            raise MalformedFrame(f"region {frame.region} announced twice, or too many of them")
        try:
            region = Region.received(self._fds.pop(0), frame.nbytes, writable=False)
        except (InvalidRequest, OSError, ValueError, OverflowError) as error:
            raise MalformedFrame(f"region {frame.region}: {error}") from error
        self._regions[frame.region] = region

    def _copy(self, frame: frames.WriteFromFrame) -> None:
        region = self._regions.get(frame.region)
        source = frame.source
        if region is None or frame.region == PLEDGE_REGION:
            raise MalformedFrame(f"write from region {frame.region}, which is not known")
        if source.end > region.nbytes or source.piece_count > PIECES_MAX:
            raise MalformedFrame(f"source ends at {source.end} of {region.nbytes}, or is too fine")
        if frame.pledge >= PLEDGES_MAX or PLEDGE_REGION not in self._regions:
            raise MalformedFrame(f"pledge {frame.pledge} does not exist")
        write = self._begin_single(frame.write)
        landing = write.landings[0]
        while landing is not None and write.received < source.nbytes and landing.open:
            nbytes = min(STEP_BYTES, source.nbytes - write.received)
            with landing.lock:
                if landing.open:
                    copy_slices(
                        landing.region.view,
                        landing.slices.part(write.received, nbytes),
                        region.view,
                        source.part(write.received, nbytes),
                    )
            write.received += nbytes
        self._finish_if_pledged(write, frame.pledge)

    def _finish_if_pledged(self, write: OpenWrite, pledge: int) -> None:
        page = self._regions[PLEDGE_REGION].view
        held = PLEDGE.unpack_from(page, pledge * PLEDGE.size)[0]
        if held == write.ident or write.landings[0] is None:
            write.received = write.nbytes
            self._settle(write)
            return
        self._cancel(write.ident)
        self._answer(write.ident, (frames.REFUSALS.index("cancelled"),), write.nbytes)
