"""Bounded memory of a relay in which chunks wait between two networks.

Owns one region, cut into slabs of the largest chunk's size; a slab serves one power-of-two class
of slots at a time and comes back when all of them are free. Slots that were freed last are taken
first, because their pages are warm. Moves no bytes; belongs to the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.kvstore.layout import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices

SLAB_BYTES = CHUNK_BYTES_MAX
assert SLAB_BYTES % CHUNK_BYTES_MIN == 0


@dataclass(slots=True, eq=False)
class _Slab:
    offset: int
    slot_bytes: int = 0
    free: list[int] = field(default_factory=list)
    used: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of the staging region that one chunk occupies."""

    offset: int
    nbytes: int
    slab: _Slab

    @property
    def slices(self) -> Slices:
        """Where the chunk lies in the region."""
        return Slices.contiguous(self.offset, self.nbytes)


class Staging:
    """`capacity_bytes` in slots; `used_bytes` is the sum of the slots' sizes."""

    def __init__(self, region: Region) -> None:
        slabs = region.nbytes // SLAB_BYTES
        if slabs < 1:
            raise InvalidRequest(
                f"staging needs at least {SLAB_BYTES} bytes, the region has {region.nbytes}"
            )
        self.region = region
        self.capacity_bytes = slabs * SLAB_BYTES
        self.used_bytes = 0
        self._idle = [_Slab(index * SLAB_BYTES) for index in reversed(range(slabs))]
        self._partial: dict[int, list[_Slab]] = {}

    def take(self, nbytes: int) -> Slot | None:
        """A slot for a chunk, or None if there is no room now. Raises InvalidRequest."""
        if not 1 <= nbytes <= SLAB_BYTES:
            raise InvalidRequest(f"a chunk has 1..{SLAB_BYTES} bytes, not {nbytes}")
        slot_bytes = _slot_bytes(nbytes)
        partial = self._partial.setdefault(slot_bytes, [])
        if partial:
            slab = partial[-1]
        elif self._idle:
            slab = self._idle.pop()
            slab.slot_bytes = slot_bytes
            slab.free = list(range(slab.offset, slab.offset + SLAB_BYTES, slot_bytes))[::-1]
            partial.append(slab)
        else:
            return None
        offset = slab.free.pop()
        slab.used += 1
        if not slab.free:
            partial.pop()
        self.used_bytes += slot_bytes
        return Slot(offset, nbytes, slab)

    def give_back(self, slot: Slot) -> None:
        """Free a slot. Its bytes must be fenced and no write may still read them."""
        slab = slot.slab
        assert slot.offset not in slab.free, "a slot was given back twice"
        partial = self._partial[slab.slot_bytes]
        if not slab.free:
            partial.append(slab)
        slab.free.append(slot.offset)
        slab.used -= 1
        self.used_bytes -= slab.slot_bytes
        if not slab.used:
            partial.remove(slab)
            self._idle.append(slab)


def _slot_bytes(nbytes: int) -> int:
    size = CHUNK_BYTES_MIN
    while size < nbytes:
        size *= 2
    return min(size, SLAB_BYTES)
