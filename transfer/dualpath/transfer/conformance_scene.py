"""The stage on which the conformance checks play: two connected transports and what they said.

Owns waiting (always with a limit) and recording; knows no check.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import (
    Arrival,
    Completion,
    OnPeerLost,
    Transport,
    Write,
    WriteStatus,
)

WAIT_S = 20.0
"""A check that waits longer has failed."""
WRITER = "writer"
READER = "reader"


@dataclass(frozen=True, slots=True)
class TransportPair:
    """Two transports that can reach each other, not yet connected.

    `writer` is named WRITER and can listen at `address`; `reader` is named READER. `make_region`
    makes memory that either may write from. `queue_bytes_max` is the writer's bound for a peer,
    at least 16 MiB. The pair's maker closes both.
    """

    writer: Transport
    reader: Transport
    address: str
    make_region: Callable[[int], Region]
    queue_bytes_max: int


MakePair = Callable[[OnPeerLost, OnPeerLost], AbstractContextManager[TransportPair]]
"""Called with what the writer and the reader are to call when a peer is lost."""


class Recorder:
    """Collects what callbacks said, in order, and waits for more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.completions: list[Completion] = []
        self.arrivals: list[Arrival] = []
        self.losses: list[tuple[str, str]] = []

    def on_completion(self, completion: Completion) -> None:
        """Record a completion."""
        with self._changed:
            self.completions.append(completion)
            self._changed.notify_all()

    def on_arrival(self, arrival: Arrival) -> bool:
        """Record an arrival and accept it."""
        with self._changed:
            self.arrivals.append(arrival)
            self._changed.notify_all()
        return True

    def on_lost(self, peer: str, reason: str) -> None:
        """Record the loss of a peer."""
        with self._changed:
            self.losses.append((peer, reason))
            self._changed.notify_all()

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait until `ready` holds; it is looked at whenever something was recorded."""
        with self._changed:
            if not self._changed.wait_for(ready, WAIT_S):
                raise AssertionError(f"{what} did not happen within {WAIT_S} s: {self}")

    def wait_completions(self, count: int) -> list[Completion]:
        """Wait for `count` completions in all and return them by submission tag."""
        self.wait(f"{count} completions", lambda: len(self.completions) >= count)
        assert len(self.completions) == count, f"too many completions: {self}"
        return sorted(self.completions, key=lambda each: each.tag)

    def wait_arrivals(self, count: int) -> list[Arrival]:
        """Wait for `count` arrivals."""
        self.wait(f"{count} arrivals", lambda: len(self.arrivals) >= count)
        return list(self.arrivals)

    def wait_losses(self, count: int) -> None:
        """Wait until peers were lost `count` times in all."""
        self.wait(f"{count} losses", lambda: len(self.losses) >= count)

    def __repr__(self) -> str:
        return (
            f"<Recorder completions={self.completions[-8:]} arrivals={self.arrivals[-8:]} "
            f"losses={self.losses[-8:]}>"
        )


class Gate:
    """Holds a callback back until `open`; bounded, so that a failed check ends."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()

    def pass_through(self) -> bool:
        """Say that somebody is here and wait until the gate opens."""
        self._reached.set()
        return self._open.wait(WAIT_S)

    def wait_reached(self) -> None:
        """Wait until somebody waits at the gate."""
        assert self._reached.wait(WAIT_S), "nobody came to the gate"

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()


class Scene:
    """A connected pair: `writer` writes to READER, whose windows are on `reader`."""

    def __init__(self, pair: TransportPair, writer_heard: Recorder, reader_heard: Recorder) -> None:
        self.pair = pair
        self.writer = pair.writer
        self.reader = pair.reader
        self.writer_heard = writer_heard
        self.reader_heard = reader_heard
        self._tags = itertools.count(1)

    def connect(self) -> None:
        """Dial as the contract says: the reader dials the writer with its invitation."""
        if not self.writer.address:
            self.writer.listen(self.pair.address)
        invitation = self.writer.invite(READER)
        self.reader.connect(WRITER, self.writer.address, invitation, deadline_s=WAIT_S)

    def source(self, nbytes: int) -> Region:
        """Memory to write from, filled with bytes that tell their offset."""
        region = self.pair.make_region(nbytes)
        region.view[:] = pattern(nbytes)
        return region

    def tag(self) -> int:
        """A tag not used before in this scene."""
        return next(self._tags)

    def write(
        self,
        source: Region,
        window: RegionDescriptor,
        slices: Slices,
        tag: int,
        *,
        source_slices: Slices | None = None,
        lane: Lane = Lane.LOAD_PREFILL,
        deadline_s: float = WAIT_S,
    ) -> None:
        """Write to the reader; the source slices are those of the target by default."""
        write = Write(source, source_slices or slices, window, slices, lane, tag, deadline_s)
        self.writer.write(READER, write, self.writer_heard.on_completion)

    def send(self, source: Region, window: RegionDescriptor, slices: Slices) -> int:
        """Arm a fresh tag, write it, and return it."""
        tag = self.tag()
        self.reader.arm(window, [(tag, slices)])
        self.write(source, window, slices, tag)
        return tag

    def gated_window(self, region: Region, gate: Gate) -> RegionDescriptor:
        """A window whose first arrival waits at `gate`."""
        first = threading.Lock()

        def on_arrival(arrival: Arrival) -> bool:
            if first.acquire(blocking=False):
                gate.pass_through()
            return self.reader_heard.on_arrival(arrival)

        return self.reader.expose(region, 0, region.nbytes, on_arrival)

    def window(self, region: Region) -> RegionDescriptor:
        """A window on all of `region` that accepts and records."""
        return self.reader.expose(region, 0, region.nbytes, self.reader_heard.on_arrival)

    def finish(self, count: int) -> list[WriteStatus]:
        """Wait for `count` completions in all; their statuses in the order of tags."""
        return [each.status for each in self.writer_heard.wait_completions(count)]


@contextmanager
def scene_of(make_pair: MakePair, *, connected: bool = True) -> Iterator[Scene]:
    """A scene on a fresh pair."""
    writer_heard, reader_heard = Recorder(), Recorder()
    with make_pair(writer_heard.on_lost, reader_heard.on_lost) as pair:
        scene = Scene(pair, writer_heard, reader_heard)
        if connected:
            scene.connect()
        yield scene


def pattern(nbytes: int) -> bytes:
    """Bytes of which no two runs of a page are alike."""
    words = np.arange((nbytes + 3) // 4, dtype=np.uint32) * np.uint32(2654435761)
    return words.tobytes()[:nbytes]


def extents(count: int, nbytes: int) -> Sequence[Slices]:
    """`count` ranges of `nbytes` bytes, one after another."""
    return [Slices.contiguous(index * nbytes, nbytes) for index in range(count)]


def expect(error: type[Exception], act: Callable[[], object]) -> None:
    """Fail unless `act` raises `error` with a message."""
    message = None
    try:
        act()
    except error as raised:
        message = str(raised)
    assert message is not None, f"{error.__name__} was not raised"
    assert message, f"{error.__name__} without a message"


def accept(arrival: Arrival) -> bool:
    """An on_arrival that takes everything."""
    return True


def gather(region: Region, slices: Slices) -> bytes:
    """The bytes of `slices`, one after another."""
    return b"".join(bytes(region.view[at : at + nbytes]) for at, nbytes in slices.pieces())


def wait_for_byte(region: Region, offset: int) -> None:
    """Wait until something has landed at `offset`, which held zeros."""
    deadline = time.monotonic() + WAIT_S
    while region.view[offset : offset + 64] == bytes(64):
        assert time.monotonic() < deadline, f"nothing landed at {offset}"


def queued_behind_a_gate(scene: Scene, lanes: list[Lane], nbytes: int) -> list[int]:
    """Stall the reader, submit a write on each of `lanes`, and return the tags as they came.

    A first write, tag 0, holds the reader up until all were submitted; tags count from 1.
    """
    source = scene.source(nbytes)
    target = Region.anonymous(nbytes)
    gate = Gate()
    window, slices = scene.gated_window(target, gate), Slices.contiguous(0, nbytes)
    scene.reader.arm(window, [(tag, slices) for tag in range(len(lanes) + 1)])
    scene.write(source, window, slices, 0)
    gate.wait_reached()
    for tag, lane in enumerate(lanes, start=1):
        scene.write(source, window, slices, tag, lane=lane)
    gate.open()
    assert scene.finish(len(lanes) + 1) == [WriteStatus.DONE] * (len(lanes) + 1)
    return [arrival.tag for arrival in scene.reader_heard.arrivals if arrival.tag]
