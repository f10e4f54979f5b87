"""Scrubbing: stored blocks are read again and verified before anybody needs them.

Goes through the segments in order, block by block, chunk by chunk, into a buffer of its own; the
DRAM tier is not touched. A block that is bad twice in a row leaves the store with its descendants.
The position, (segment, slot), is that of the next block; it is the caller's to keep. Decides
nothing about when and how fast (`scrub_pace.py`). One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dualpath.kvstore import checksum
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.layout import ALIGN_BYTES, CHUNK_BYTES_MAX
from dualpath.kvstore.segment import page_buffer
from dualpath.kvstore.store_api import ScrubStep
from dualpath.kvstore.store_state import StoreState

Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Pinned:
    """A block that cannot move while it is verified."""

    row: int
    place: Position
    extents: tuple[tuple[int, int], ...]
    expected: tuple[int, ...]


class Scrubber:
    """See the module docstring."""

    def __init__(self, state: StoreState, position: Position = (0, 0)) -> None:
        self._state = state
        self._buffer = page_buffer(CHUNK_BYTES_MAX)
        self._ahead: list[tuple[int, int]] = []
        self.position = position

    def step(self, nbytes: int) -> ScrubStep:
        """Verify blocks until `nbytes` are read or the end of the store is reached; at least one
        if there is any."""
        read = blocks = bad = 0
        finished = False
        while not read or read < nbytes:
            pinned = self._next()
            if pinned is None:
                finished = True
                break
            blocks += 1
            read += sum(length for _, length in pinned.extents)
            # A passing error of the wire is no rot: only what is bad twice goes.
            failure = self._failure(pinned) and self._failure(pinned)
            bad += self._settle(pinned, failure)
        counters = self._state.counters
        with self._state.lock:
            counters.scrubbed_bytes += read
            counters.scrubbed_blocks += blocks
            counters.scrub_bad_blocks += bad
            counters.scrub_passes += finished
        return ScrubStep(read, blocks, bad, finished)

    def _next(self) -> _Pinned | None:
        """Pin the next block; None at the end, where the position goes back to the start."""
        state = self._state
        with state.lock:
            state.check_open()
            while True:
                while self._ahead:
                    slot, row = self._ahead.pop()
                    if self._is_at(row, slot):
                        return self._pin(row)
                    self.position = (self.position[0], slot + 1)
                if not self._look_ahead():
                    self.position = (0, 0)
                    return None

    def _is_at(self, row: int, slot: int) -> bool:
        table = self._state.table
        return bool(
            table.state[row] == RowState.PRESENT
            and not table.dirty[row]
            and (int(table.segment[row]), int(table.slot[row])) == (self.position[0], slot)
        )

    def _look_ahead(self) -> bool:
        """Fill `_ahead` with what follows the position in its segment, or else in the next one
        that holds anything; last first. False if there is nothing."""
        table = self._state.table
        segment, slot = self.position
        stored = (table.state == RowState.PRESENT) & ~table.dirty
        rows = np.flatnonzero(stored & (table.segment == segment) & (table.slot >= slot))
        if not len(rows):
            above = table.segment[stored & (table.segment > segment)]
            if not len(above):
                return False
            segment = int(above.min())
            rows = np.flatnonzero(stored & (table.segment == segment))
        order = np.argsort(table.slot[rows])[::-1]
        found = rows[order]
        self.position = (segment, 0 if segment != self.position[0] else slot)
        self._ahead = list(zip(table.slot[found].tolist(), found.tolist(), strict=True))
        return True

    def _pin(self, row: int) -> _Pinned:
        state, table = self._state, self._state.table
        entry = state.catalog.entry_of(row)
        layout = entry.layout
        sums = entry.pool.take(table.checksum_row[row : row + 1])[0]
        place = int(table.segment[row]), int(table.slot[row])
        table.pins[row] += 1
        self.position = (place[0], place[1] + 1)
        extents = tuple(layout.chunk_extent(chunk) for chunk in range(layout.chunk_count))
        return _Pinned(row, place, extents, tuple(sums.tolist()))

    def _failure(self, pinned: _Pinned) -> str:
        """What is wrong with a block; "" if nothing is."""
        for chunk, (offset, nbytes) in enumerate(pinned.extents):
            view = self._buffer[: -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES]
            try:
                self._state.ssd.read(*pinned.place, offset, view)
            except OSError as error:
                return f"it cannot be read: {error}"
            if checksum.xxh3_64(view[:nbytes]) != pinned.expected[chunk]:
                return f"chunk {chunk} does not have its checksum"
        return ""

    def _settle(self, pinned: _Pinned, failure: str) -> int:
        """Drop what is bad; unpin. Return how many bad blocks left, 0 or 1."""
        state = self._state
        bad = bool(failure) and state.table.state[pinned.row] == RowState.PRESENT
        if bad:
            state.read_failed(pinned.row, f"scrubbed: {failure}")
        with state.lock:
            state.residency.unpin(pinned.row)
            state.room.notify_all()
        return int(bad)
