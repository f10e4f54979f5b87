"""Fixed slots by size class inside extents: pure bookkeeping, no memory and no files.

An extent (a segment on SSD, a run of slabs in DRAM) belongs to one size class. Slots are given
out lowest first while an extent is fresh, so that neighbours share header pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection


class _Extent:
    __slots__ = ("closed", "free", "slot_bytes", "slots", "taken")

    def __init__(self, slot_bytes: int, slots: int, taken: Collection[int]) -> None:
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.closed = False
        self.taken = bytearray(slots)
        for slot in taken:
            self.taken[slot] = 1
        self.free = array("I", (s for s in range(slots - 1, -1, -1) if not self.taken[s]))


class SlotAllocator:
    """Take and give slots. Not thread-safe."""

    def __init__(self) -> None:
        self._extents: dict[int, _Extent] = {}
        self._open: dict[int, dict[int, None]] = {}
        self.used_bytes = 0

    def __repr__(self) -> str:
        taken = sum(e.slots - len(e.free) for e in self._extents.values())
        return f"<SlotAllocator {len(self._extents)} extents, {taken} slots taken>"

    def add(self, extent: int, slot_bytes: int, slots: int, *, taken: Collection[int] = ()) -> None:
        """Bring in an extent; some slots may be taken already."""
        assert extent not in self._extents, extent
        added = _Extent(slot_bytes, slots, taken)
        self._extents[extent] = added
        self.used_bytes += (slots - len(added.free)) * slot_bytes
        if added.free:
            self._open.setdefault(slot_bytes, {})[extent] = None

    def remove(self, extent: int) -> None:
        """Take an extent out; none of its slots may be taken."""
        gone = self._extents.pop(extent)
        assert len(gone.free) == gone.slots, extent
        self._open.get(gone.slot_bytes, {}).pop(extent, None)

    def close(self, extent: int) -> None:
        """Give out no further slots of an extent."""
        closed = self._extents[extent]
        closed.closed = True
        self._open.get(closed.slot_bytes, {}).pop(extent, None)

    def take(self, slot_bytes: int) -> tuple[int, int] | None:
        """(extent, slot) of a free slot of that class; None if there is none."""
        extents = self._open.get(slot_bytes)
        if not extents:
            return None
        number = next(iter(extents))
        extent = self._extents[number]
        slot = extent.free.pop()
        extent.taken[slot] = 1
        self.used_bytes += slot_bytes
        if not extent.free:
            del extents[number]
        return number, slot

    def give(self, extent: int, slot: int) -> None:
        """Return a taken slot."""
        found = self._extents[extent]
        assert found.taken[slot], (extent, slot)
        found.taken[slot] = 0
        found.free.append(slot)
        self.used_bytes -= found.slot_bytes
        if not found.closed:
            self._open.setdefault(found.slot_bytes, {})[extent] = None

    def empty_extents(self) -> list[int]:
        """Extents with no slot taken."""
        return [n for n, extent in self._extents.items() if len(extent.free) == extent.slots]

    def slot_bytes(self, extent: int) -> int:
        """The size class of an extent."""
        return self._extents[extent].slot_bytes
