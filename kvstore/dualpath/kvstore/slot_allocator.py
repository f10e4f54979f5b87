"""Fixed slots by size class inside extents: pure bookkeeping, no memory and no files.

An extent (a segment on SSD, a run of slabs in DRAM) belongs to one size class; a slot in it costs
one bit. The lowest free slot is given out first, so that neighbours share header pages and writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SlotNumbers = Sequence[int] | NDArray[np.integer]
_SOME_FREE = re.compile(rb"[^\0]")


class _Extent:
    """`bits` has a 1 for each free slot, eight slots a byte, the lowest in the lowest bit; there
    is none before byte `first`."""

    __slots__ = ("bits", "first", "free", "slot_bytes", "slots")

    def __init__(self, slot_bytes: int, slots: int, taken: SlotNumbers) -> None:
        self.slot_bytes = slot_bytes
        self.slots = slots
        is_free = np.ones(slots, np.bool_)
        is_free[np.asarray(taken, np.int64)] = False
        self.free = int(is_free.sum())
        self.bits = bytearray(np.packbits(is_free, bitorder="little"))
        self.first = 0

    def take(self) -> int:
        found = _SOME_FREE.search(self.bits, self.first)
        assert found is not None
        at = self.first = found.start()
        bit = self.bits[at] & -self.bits[at]
        self.bits[at] ^= bit
        self.free -= 1
        return 8 * at + bit.bit_length() - 1

    def give(self, slot: int) -> None:
        at, bit = slot >> 3, 1 << (slot & 7)
        assert 0 <= slot < self.slots, slot
        assert not self.bits[at] & bit, slot
        self.bits[at] |= bit
        self.free += 1
        self.first = min(self.first, at)


class SlotAllocator:
    """Take and give slots. Not thread-safe."""

    def __init__(self) -> None:
        self._extents: dict[int, _Extent] = {}
        self._open: dict[int, dict[int, None]] = {}
        self._empty: dict[int, None] = {}
        self.closed: set[int] = set()
        """Extents that give out no slots."""
        self.used_bytes = 0

    def __repr__(self) -> str:
        taken = sum(e.slots - e.free for e in self._extents.values())
        return f"<SlotAllocator {len(self._extents)} extents, {taken} slots taken>"

    def add(self, extent: int, slot_bytes: int, slots: int, *, taken: SlotNumbers = ()) -> None:
        """Bring in an extent; some slots may be taken already."""
        assert extent not in self._extents, extent
        added = _Extent(slot_bytes, slots, taken)
        self._extents[extent] = added
        self.used_bytes += (slots - added.free) * slot_bytes
        if added.free:
            self._open.setdefault(slot_bytes, {})[extent] = None
        if added.free == slots:
            self._empty[extent] = None

    def remove(self, extent: int) -> None:
        """Take an extent out; none of its slots may be taken."""
        gone = self._extents.pop(extent)
        assert gone.free == gone.slots, extent
        del self._empty[extent]
        self.closed.discard(extent)
        self._open.get(gone.slot_bytes, {}).pop(extent, None)

    def close(self, extent: int) -> None:
        """Give out no further slots of an extent."""
        self.closed.add(extent)
        self._open.get(self._extents[extent].slot_bytes, {}).pop(extent, None)

    def reopen(self, extent: int) -> None:
        """Give out slots of an extent again. Idempotent."""
        opened = self._extents[extent]
        self.closed.discard(extent)
        if opened.free:
            self._open.setdefault(opened.slot_bytes, {})[extent] = None

    def take(self, slot_bytes: int) -> tuple[int, int] | None:
        """(extent, slot) of a free slot of that class; None if there is none."""
        extents = self._open.get(slot_bytes)
        if not extents:
            return None
        number = next(iter(extents))
        extent = self._extents[number]
        if extent.free == extent.slots:
            del self._empty[number]
        slot = extent.take()
        self.used_bytes += slot_bytes
        if not extent.free:
            del extents[number]
        return number, slot

    def give(self, extent: int, slot: int) -> None:
        """Return a taken slot."""
        found = self._extents[extent]
        found.give(slot)
        self.used_bytes -= found.slot_bytes
        if found.free == found.slots:
            self._empty[extent] = None
        if extent not in self.closed:
            self._open.setdefault(found.slot_bytes, {})[extent] = None

    def empty_extents(self) -> list[int]:
        """Extents with no slot taken."""
        return list(self._empty)

    def slot_bytes(self, extent: int) -> int:
        """The size class of an extent."""
        return self._extents[extent].slot_bytes
