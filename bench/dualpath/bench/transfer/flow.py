"""A flow of batches from one transport to another, a number of them or until it is stopped.

SLOTS batches are on their way at once. Batch j has the memory of slot j modulo SLOTS and the tags
from j times the parts on: the reader arms it when the slot's batch before has landed, which is
before the writer hears of that and sends it. Every part is verified where it landed, by its hash.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import xxhash
from dualpath.bench.transfer.grain import SLOTS, Grain
from dualpath.transfer.errors import DualPathError, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.transport import (
    Arrival,
    BatchCompletion,
    Transport,
    WriteBatch,
    WriteStatus,
)

DEADLINE_S = 60.0
_MIX = np.uint64(0x9E3779B97F4A7C15)


def fill(memory: memoryview) -> None:
    """Give memory the bytes that a writer sends: no two words alike."""
    words = np.frombuffer(memory[: len(memory) // 8 * 8], dtype=np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64) * _MIX


class FlowReader:
    """The receiving end; counts what has landed and whether it was right."""

    def __init__(self, transport: Transport, grain: Grain, region: Region) -> None:
        self._transport = transport
        self._grain = grain
        self._region = region
        self._expected = _digests(grain)
        self._targets = [grain.target(slot) for slot in range(SLOTS)]
        self._changed = threading.Condition()  # guards what follows
        self._left: dict[int, int] = {}  # parts that have not landed, by batch
        self._first = 0
        self._last = 0
        self._batches_done = 0
        self.landed_bytes = 0
        self.wrong_parts = 0
        self.window = transport.expose(
            region, 0, grain.target_bytes, self._on_arrival, on_hashed=self._on_hashed
        )

    def arm(self, batches: int) -> int:
        """Expect so many further batches; return the first one's number."""
        with self._changed:
            self._first = self._last
            self._last += batches
            self._batches_done = 0
            starts = range(self._first, min(self._last, self._first + SLOTS))
        for batch in starts:
            self._arm(batch)
        return self._first

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        """Until all of them have landed. Raises Unavailable if they do not in time."""
        with self._changed:
            count = self._last - self._first
            if not self._changed.wait_for(lambda: self._batches_done == count, timeout_s):
                raise Unavailable(
                    f"{self._batches_done} of {count} batches landed in {timeout_s:g} s"
                )

    def close(self) -> None:
        """Fence the memory."""
        self._transport.revoke(self.window)

    def _arm(self, batch: int) -> None:
        with self._changed:
            self._left[batch] = self._grain.parts
        first_tag = batch * self._grain.parts
        self._transport.arm_table(self.window, first_tag, self._targets[batch % SLOTS])

    def _on_arrival(self, arrival: Arrival) -> bool:
        digest = xxhash.xxh3_64()
        for offset, nbytes in arrival.slices.pieces():
            digest.update(self._region.view[offset : offset + nbytes])
        return self._on_hashed([arrival.tag], [digest.intdigest()])[0]

    def _on_hashed(self, tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
        parts, at = self._grain.parts, 0
        next_batches = []
        with self._changed:
            while at < len(tags):
                # Parts of one batch come in order, so that a run of them is judged at once.
                batch, part = divmod(tags[at], parts)
                count = min(parts - part, len(tags) - at)
                start = batch % SLOTS * parts + part
                right = self._expected[start : start + count]
                in_order = tags[at + count - 1] - tags[at] == count - 1
                if not in_order or list(digests[at : at + count]) != right:
                    self.wrong_parts += 1
                at += count
                self.landed_bytes += count * self._grain.part_bytes
                self._left[batch] -= count
                if not self._left[batch]:
                    del self._left[batch]
                    self._batches_done += 1
                    if batch + SLOTS < self._last:
                        next_batches.append(batch + SLOTS)
            if self._batches_done == self._last - self._first:
                self._changed.notify_all()
        for batch in next_batches:
            self._arm(batch)
        return [True] * len(tags)


class FlowWriter:
    """The sending end; its region must hold `source_bytes` that were filled."""

    def __init__(
        self, transport: Transport, grain: Grain, region: Region, lane: Lane = Lane.LOAD_PREFILL
    ) -> None:
        self._transport = transport
        self._grain = grain
        self._region = region
        self._lane = lane
        self._tables = [(grain.source(slot), grain.target(slot)) for slot in range(SLOTS)]
        self._changed = threading.Condition()  # guards what follows
        self._pending = 0
        self._last = 0
        self._stopped = False
        self._failure = ""

    def start(self, peer: str, window: RegionDescriptor, first: int, batches: int) -> None:
        """Send batches [first, first + batches)."""
        with self._changed:
            self._last = first + batches
            self._stopped, self._failure = False, ""
        for batch in range(first, min(self._last, first + SLOTS)):
            self._send(peer, window, batch)

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        """Until nothing is on its way. Raises Unavailable if a batch failed, or in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending == 0, timeout_s):
                raise Unavailable(f"{self._pending} batches were not answered in {timeout_s:g} s")
            if self._failure:
                raise Unavailable(f"the flow broke: {self._failure}")

    def stop(self) -> None:
        """Send no further batch."""
        with self._changed:
            self._stopped = True

    def _send(self, peer: str, window: RegionDescriptor, batch: int) -> None:
        source, target = self._tables[batch % SLOTS]
        first_tag = batch * self._grain.parts
        work = WriteBatch(
            self._region,
            source,
            window,
            target,
            self._lane,
            first_tag,
            DEADLINE_S,
        )
        with self._changed:
            self._pending += 1

        def ended(told: BatchCompletion) -> None:
            good = told.status is WriteStatus.DONE and not told.refused
            with self._changed:
                if not good:
                    self._failure = f"{told.status.value} {told.detail} {dict(told.refused)}"
                more = good and not self._stopped and batch + SLOTS < self._last
            if more:
                self._send(peer, window, batch + SLOTS)
            self._ended()

        try:
            self._transport.write_batch(peer, work, ended)
        except DualPathError as error:
            with self._changed:
                self._failure = str(error)
            self._ended()

    def _ended(self) -> None:
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()


def _digests(grain: Grain) -> list[int]:
    memory = memoryview(bytearray(grain.source_bytes))
    fill(memory)
    size = grain.part_bytes
    return [
        xxhash.xxh3_64_intdigest(memory[start : start + size])
        for start in range(0, len(memory), size)
    ]
