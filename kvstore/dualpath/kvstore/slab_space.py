"""A contiguous range of memory handed out as slots of several size classes.

Pure bookkeeping: offsets in, offsets out. The range is cut into equal slabs; a run of slabs
belongs to one size class for as long as any slot of it is taken. Runs are chosen so that at most
an eighth of them is waste, where the range allows it.
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.slot_allocator import SlotAllocator
from dualpath.kvstore.space_plan import coldest_window
from numpy.typing import NDArray

ALIGN_BYTES = 4096
_SLABS_AIM = 256
_SLAB_BYTES_MAX = 64 << 20
_WASTE_MAX = 0.125


class SlabSpace:
    """Bytes [base, base + nbytes). Not thread-safe."""

    def __init__(self, base: int, nbytes: int) -> None:
        slab = nbytes // _SLABS_AIM // ALIGN_BYTES * ALIGN_BYTES
        self._slab_bytes = max(ALIGN_BYTES, min(slab, _SLAB_BYTES_MAX))
        self._base = base
        self._run_of: list[int] = [-1] * (nbytes // self._slab_bytes)
        # Of each slab whether it is free: runs of free ones are searched for by the million.
        self._free = bytearray(b"\1" * len(self._run_of))
        self._lengths: dict[int, int] = {}
        self._allocator = SlotAllocator()
        self.capacity_bytes = len(self._run_of) * self._slab_bytes

    def __repr__(self) -> str:
        return f"<SlabSpace {self.used_bytes} of {self.capacity_bytes} bytes taken>"

    @property
    def used_bytes(self) -> int:
        """Bytes of taken slots."""
        return self._allocator.used_bytes

    def take(self, slot_bytes: int) -> int:
        """Offset of a free slot of `slot_bytes` (a multiple of 4 KiB); -1 if there is none."""
        place = self._allocator.take(slot_bytes)
        if place is None:
            if not self._grow(slot_bytes):
                return -1
            place = self._allocator.take(slot_bytes)
            assert place is not None
        run, slot = place
        return self._base + run * self._slab_bytes + slot * slot_bytes

    def give(self, offset: int) -> None:
        """Return a slot by its offset."""
        run = self._run_of[(offset - self._base) // self._slab_bytes]
        inside = offset - self._base - run * self._slab_bytes
        self._allocator.give(run, inside // self._allocator.slot_bytes(run))

    def coldest_window(
        self,
        offsets: NDArray[np.int64],
        used: NDArray[np.int64],
        blocked: NDArray[np.bool_],
        slot_bytes: int,
    ) -> NDArray[np.int64]:
        """Which of all taken slots to give back so that one of `slot_bytes` can be taken: positions
        in `offsets`, none if blocked ones are in the way everywhere. See `space_plan`."""
        run_of = np.array(self._run_of)
        runs = run_of[(offsets - self._base) // self._slab_bytes]
        length = -(-slot_bytes // self._slab_bytes)
        window = coldest_window(run_of, runs, used, blocked, length)
        if window is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.isin(runs, run_of[slice(*window)]))

    def _grow(self, slot_bytes: int) -> bool:
        length = self._run_length(slot_bytes)
        if length == 0:
            return False
        start = self._free_run(length)
        if start < 0 and self._drop_empty_runs():
            start = self._free_run(length)
        if start < 0:
            length = -(-slot_bytes // self._slab_bytes)
            start = self._free_run(length)
        if start < 0:
            return False
        self._run_of[start : start + length] = [start] * length
        self._free[start : start + length] = bytes(length)
        self._allocator.add(start, slot_bytes, length * self._slab_bytes // slot_bytes)
        return True

    def _run_length(self, slot_bytes: int) -> int:
        """Slabs of a run: the fewest with little waste; 0 if one slot exceeds the range."""
        length = self._lengths.get(slot_bytes)
        if length is None:
            length = self._lengths[slot_bytes] = self._best_length(slot_bytes)
        return length

    def _best_length(self, slot_bytes: int) -> int:
        least = -(-slot_bytes // self._slab_bytes)
        total = len(self._run_of)
        if least > total:
            return 0
        best, best_waste = least, 1.0
        for length in range(least, min(least * 8, max(least, total // 8)) + 1):
            nbytes = length * self._slab_bytes
            waste = nbytes % slot_bytes / nbytes
            if waste <= _WASTE_MAX:
                return length
            if waste < best_waste:
                best, best_waste = length, waste
        return best

    def _free_run(self, length: int) -> int:
        return self._free.find(b"\1" * length)

    def _drop_empty_runs(self) -> bool:
        """Whether there were any."""
        empty = self._allocator.empty_extents()
        for run in empty:
            self._allocator.remove(run)
            end = run + self._run_of[run:].count(run)
            self._run_of[run:end] = [-1] * (end - run)
            self._free[run:end] = b"\1" * (end - run)
        return bool(empty)
