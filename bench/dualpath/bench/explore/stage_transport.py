"""A transport whose writes take place step by step, when the agenda says so.

Owns writes in flight. A write begins (the receiver's real window table accepts or refuses it), its
first half arrives, its second half arrives and it lands, its completion comes back: four events.
Writes over one connection begin in order, and go on independently of each other. A connection can
be cut at any moment; a write can be flipped or come twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

from dualpath.bench.explore.agenda import Agenda
from dualpath.bench.explore.stage_loop import StageLoop
from dualpath.transfer.errors import PeerLost
from dualpath.transfer.landing import Landing
from dualpath.transfer.outbox import check_write
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import (
    Completion,
    OnArrival,
    OnBatchCompletion,
    OnCompletion,
    OnHashed,
    PeerTraffic,
    Write,
    WriteBatch,
    WriteStatus,
)
from dualpath.transfer.window import Refused, WindowTable
from dualpath.transfer.write_split import write_split


class Violation(AssertionError):
    """Something happened that must never happen."""


@dataclass(eq=False)
class FlyingWrite:
    """One write on its way; `over` once its completion is known at its writer, or it has none."""

    number: int
    sender: StageTransport
    peer: str
    write: Write
    on_completion: OnCompletion | None
    target: StageTransport
    source: bytes
    """What is to arrive: the source must not change before the write has ended."""
    landing: Landing | None = None
    flipped: bool = False
    over: bool = False


class Wire:
    """All connections of a stage and what flies on them."""

    def __init__(self, agenda: Agenda, loop: StageLoop) -> None:
        self._agenda = agenda
        self._loop = loop
        self._numbers = count(1)
        self.flying: dict[int, FlyingWrite] = {}
        """Writes that may still touch memory, by number."""

    def send(
        self, sender: StageTransport, peer: str, write: Write, on_completion: OnCompletion | None
    ) -> FlyingWrite:
        """Put a write on its way."""
        number = next(self._numbers)
        source = _bytes_of(write.source, write.source_slices)
        flying = FlyingWrite(number, sender, peer, write, on_completion, sender.links[peer], source)
        self.flying[number] = flying
        self._agenda.add(
            f"data {sender.name_of_self}>{peer}",
            f"{self._say(flying)} begins",
            lambda: self._begin(flying),
        )
        if on_completion is not None:
            self._loop.call_later(write.deadline_s, self._expire, flying)
        return flying

    def again(self, flying: FlyingWrite) -> None:
        """A second copy of a write, of which nobody hears."""
        number = next(self._numbers)
        copy = FlyingWrite(
            number, flying.sender, flying.peer, flying.write, None, flying.target, flying.source
        )
        self.flying[number] = copy
        self._agenda.add(
            f"stray {number}", f"{self._say(copy)} comes again", lambda: self._begin(copy)
        )

    def cut(self, first: StageTransport, second: StageTransport) -> None:
        """The connection between two transports ends, whatever is on it is lost."""
        for here, there in ((first, second), (second, first)):
            for peer in [peer for peer, link in here.links.items() if link is there]:
                del here.links[peer]
                self._agenda.drop(f"data {here.name_of_self}>{peer}")
                for flying in list(self.flying.values()):
                    if flying.sender is here and flying.peer == peer and flying.on_completion:
                        self._lose(flying)

    def _lose(self, flying: FlyingWrite) -> None:
        self._agenda.drop(f"write {flying.number}.")
        if flying.landing is not None:
            flying.target.windows.abandon(flying.landing)
        self._complete(flying, WriteStatus.LOST, "cut")

    def _expire(self, flying: FlyingWrite) -> None:
        if not flying.over:
            if flying.landing is not None:
                flying.target.windows.abandon(flying.landing)
            self._agenda.drop(f"write {flying.number}.")
            self.flying.pop(flying.number, None)
            flying.over = True
            assert flying.on_completion is not None
            flying.on_completion(self._completion(flying, WriteStatus.EXPIRED, "deadline"))

    def _begin(self, flying: FlyingWrite) -> None:
        if flying.number not in self.flying:
            return
        write = flying.write
        try:
            flying.landing = flying.target.windows.begin(
                flying.peer,
                write.target.key,
                write.target.generation,
                write.tag,
                write.target_slices,
            )
        except Refused as refused:
            self._complete(flying, WriteStatus.REFUSED, refused.reason)
            return
        self._check_alone(flying)
        half = write.target_slices.nbytes // 2
        step = f"write {flying.number}."
        self._agenda.add(
            step, f"{self._say(flying)} is half there", lambda: self._copy(flying, 0, half)
        )
        self._agenda.add(step, f"{self._say(flying)} lands", lambda: self._land(flying, half))

    def _check_alone(self, flying: FlyingWrite) -> None:
        """No two writes may be let into the same bytes at once."""
        assert flying.landing is not None
        start, end = SliceTable.of(flying.landing.slices).span()
        for other in self.flying.values():
            landing = other.landing
            if other is flying or landing is None or not landing.open:
                continue
            low, high = SliceTable.of(landing.slices).span()
            if landing.view is flying.landing.view and low < end and start < high:
                raise Violation(f"{self._say(flying)} and {self._say(other)} write the same bytes")

    def _copy(self, flying: FlyingWrite, offset: int, end: int) -> None:
        landing = flying.landing
        assert landing is not None
        if flying.on_completion is not None and not flying.over:
            now = _bytes_of(flying.write.source, flying.write.source_slices)
            if now != flying.source:
                raise Violation(f"the source of {self._say(flying)} has changed under it")
        data = bytearray(flying.source)
        if flying.flipped:
            data[0] ^= 0x40
        with landing.lock:
            if landing.open:
                copy_slices(
                    landing.view,
                    landing.slices.part(offset, end - offset),
                    memoryview(data),
                    Slices.contiguous(offset, end - offset),
                )

    def _land(self, flying: FlyingWrite, half: int) -> None:
        assert flying.landing is not None
        self._copy(flying, half, len(flying.source))
        status, detail = WriteStatus.DONE, ""
        try:
            flying.target.windows.land(flying.landing)
        except Refused as refused:
            status, detail = WriteStatus.REFUSED, refused.reason
        self._complete(flying, status, detail)

    def _complete(self, flying: FlyingWrite, status: WriteStatus, detail: str) -> None:
        self.flying.pop(flying.number, None)
        if flying.over or flying.on_completion is None:
            return

        def tell() -> None:
            if not flying.over:
                flying.over = True
                assert flying.on_completion is not None
                flying.on_completion(self._completion(flying, status, detail))

        self._agenda.add(
            f"answer {flying.number}.", f"{self._say(flying)} is answered {status.value}", tell
        )

    @staticmethod
    def _completion(flying: FlyingWrite, status: WriteStatus, detail: str) -> Completion:
        write = flying.write
        return Completion(flying.peer, write.tag, status, write.target_slices.nbytes, detail)

    @staticmethod
    def _say(flying: FlyingWrite) -> str:
        return f"write {flying.number} to {flying.peer} of tag {flying.write.tag}"


def _bytes_of(region: Region, slices: Slices) -> bytes:
    data = bytearray(slices.nbytes)
    copy_slices(memoryview(data), Slices.contiguous(0, len(data)), region.view, slices)
    return bytes(data)


class StageTransport:
    """One side; see Transport. Only what is needed once peers are connected."""

    def __init__(self, name_of_self: str, wire: Wire) -> None:
        self.name_of_self = name_of_self
        self.windows = WindowTable()
        self.links: dict[str, StageTransport] = {}
        """Who is connected, by the name that it has here."""
        self._wire = wire

    @property
    def name(self) -> str:
        """`stage`."""
        return "stage"

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """See Transport.expose."""
        return self.windows.expose(region, offset, nbytes, on_arrival, on_hashed=on_hashed)

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """See Transport.arm."""
        self.windows.arm(window, targets)

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """See Transport.arm_table."""
        self.windows.arm_table(window, first_tag, targets)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """See Transport.disarm."""
        return self.windows.disarm(window, tags)

    def revoke(self, window: RegionDescriptor) -> None:
        """See Transport.revoke."""
        self.windows.revoke(window)

    def place(self, window: RegionDescriptor, tag: int, target: Slices, source: memoryview) -> str:
        """See Transport.place."""
        return self.windows.place(window, tag, target, source)

    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None:
        """See Transport.write."""
        check_write(write)
        if peer not in self.links:
            raise PeerLost(f"{peer!r} is not connected")
        self._wire.send(self, peer, write, on_completion)

    def write_batch(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """See Transport.write_batch."""
        write_split(self, peer, batch, on_completion)

    def traffic(self) -> Sequence[PeerTraffic]:
        """Not counted here."""
        return ()


@dataclass
class StageNetwork:
    """Stands for an agent's Network: only its transport is needed."""

    transport: StageTransport
