"""Slots on SSD: segments on a device, within a budget of bytes.

Bookkeeping (`take`, `give`, `shrink`, `take_retired`) is memory only and needs the caller's lock.
I/O (`ensure`, `read`, `sync`, `remove`) may run beside it; `ensure` and everything that writes is
for one thread. Blocks are written by `data_pump`. A segment's file comes into being when its first
block is to be written. Empty segments of one class make way for another class;
their files go through `take_retired`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager

import numpy as np
from dualpath.kvstore import segment as segments
from dualpath.kvstore.device import ALIGN_BYTES, Device, DeviceFile
from dualpath.kvstore.segment import HEADERS_PER_PAGE, SegmentGeometry
from dualpath.kvstore.slot_allocator import SlotAllocator, SlotNumbers
from numpy.typing import NDArray

_PREFIX = "segment-"


def segment_name(segment: int) -> str:
    """File name of a segment."""
    return f"{_PREFIX}{segment:08d}"


def segment_number(name: str) -> int | None:
    """Inverse of `segment_name`; None for any other file."""
    digits = name.removeprefix(_PREFIX)
    return int(digits) if name.startswith(_PREFIX) and digits.isdecimal() else None


class SsdTier:
    """See the module docstring."""

    def __init__(self, device: Device, capacity_bytes: int, segment_bytes: int) -> None:
        self.device = device
        self.capacity_bytes = self._budget_bytes = capacity_bytes
        self._segment_bytes = segment_bytes
        self._allocator = SlotAllocator()
        self._geometry: dict[int, SegmentGeometry] = {}
        self._files: dict[int, DeviceFile] = {}
        self._retired: list[int] = []
        self._unmade: set[int] = set()
        """Segments that found no space: they never get a file."""
        self._allocated_bytes = 0
        self._next_segment = 0
        self._failed_flushes: Counter[int] = Counter()
        self.slots_bytes = 0
        """Bytes of all slots, taken or free, of the segments that there are."""

    def __repr__(self) -> str:
        return (
            f"<SsdTier {len(self._geometry)} segments, {self.used_bytes} of "
            f"{self.capacity_bytes} bytes taken, {self.device.description}>"
        )

    @property
    def in_files(self) -> bool:
        """Whether each segment is a file of its own, that others may open by its name."""
        return self.device.in_files

    @property
    def used_bytes(self) -> int:
        """Bytes of taken slots."""
        return self._allocator.used_bytes

    def adopt(
        self, segment: int, geometry: SegmentGeometry, file: DeviceFile, taken: SlotNumbers
    ) -> None:
        """Bring in a segment that was found at opening. Empty ones beyond the budget retire."""
        self._next_segment = max(self._next_segment, segment + 1)
        self._files[segment] = file
        self._geometry[segment] = geometry
        self._allocated_bytes += geometry.file_bytes
        self.slots_bytes += geometry.slots * geometry.slot_bytes
        self._allocator.add(segment, geometry.slot_bytes, geometry.slots, taken=taken)
        if not len(taken) and self._allocated_bytes > self.capacity_bytes:
            self._retire(segment)

    def skip(self, segment: int, nbytes: int) -> None:
        """Never use this number again: a damaged file has it, and takes `nbytes` of the budget."""
        self._next_segment = max(self._next_segment, segment + 1)
        self._allocated_bytes += nbytes

    def take(self, slot_bytes: int) -> tuple[int, int] | None:
        """(segment, slot) of a free slot; None if something must be evicted first."""
        place = self._allocator.take(slot_bytes)
        if place is None and self._grow(slot_bytes):
            place = self._allocator.take(slot_bytes)
        return place

    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(number, slot_bytes, slots) of each segment that has a file, in order."""
        return tuple(
            (number, self._geometry[number].slot_bytes, self._geometry[number].slots)
            for number in sorted(self._files)
            if number in self._geometry
        )

    def give(self, segment: int, slot: int) -> None:
        """Return a slot."""
        self._allocator.give(segment, slot)

    def take_retired(self) -> list[int]:
        """Segments that are used no more; their files are the caller's to `remove`."""
        retired, self._retired = self._retired, []
        return retired

    def shrink(self, segment: int) -> None:
        """The file system has no space for this segment, nor for others that have no file yet: make
        do with the rest from now on, so that blocks are evicted instead of refused; until
        `restore_budget`."""
        if segment not in self._geometry:
            return
        without = {number for number in self._geometry if number not in self._files} | {segment}
        for number in without:
            self._allocator.close(number)
        self._unmade |= without
        least = self._allocated_bytes - sum(self._geometry[n].file_bytes for n in without)
        self.capacity_bytes = min(self.capacity_bytes, least)

    def suspend(self, segment: int) -> None:
        """Give out no slots of a segment for now. Idempotent."""
        if segment in self._geometry:
            self._allocator.close(segment)

    def resume(self, segment: int) -> None:
        """Undo `suspend`. Idempotent."""
        if segment in self._geometry and segment not in self._unmade:
            self._allocator.reopen(segment)

    @property
    def suspended(self) -> Set[int]:
        """Segments that give out no slots: who leaves them makes no room."""
        return self._allocator.closed

    def restore_budget(self) -> None:
        """Try to use all of the budget again."""
        self.capacity_bytes = self._budget_bytes

    def has(self, segment: int) -> bool:
        """Whether the segment is known."""
        return segment in self._geometry

    def _grow(self, slot_bytes: int) -> bool:
        geometry = self._fitting(slot_bytes)
        if geometry is None:
            for empty in self._allocator.empty_extents():
                self._retire(empty)
            geometry = self._fitting(slot_bytes)
        if geometry is None:
            return False
        segment = self._next_segment
        self._next_segment += 1
        self._geometry[segment] = geometry
        self._allocated_bytes += geometry.file_bytes
        self.slots_bytes += geometry.slots * slot_bytes
        self._allocator.add(segment, slot_bytes, geometry.slots)
        return True

    def _fitting(self, slot_bytes: int) -> SegmentGeometry | None:
        """A segment of about the configured size, in what is left of the budget."""
        left = self.capacity_bytes - self._allocated_bytes
        least = SegmentGeometry(slot_bytes, 1).file_bytes
        return SegmentGeometry.fitting(slot_bytes, min(left, max(self._segment_bytes, least)))

    def _retire(self, segment: int) -> None:
        self._allocator.remove(segment)
        geometry = self._geometry.pop(segment)
        self._allocated_bytes -= geometry.file_bytes
        self.slots_bytes -= geometry.slots * geometry.slot_bytes
        self._unmade.discard(segment)
        self._retired.append(segment)

    def remove(self, segment: int) -> None:
        """Remove the file of a retired segment."""
        file = self._files.pop(segment, None)
        if file is not None:
            file.close()
        with self._flushing(segment):
            self.device.remove(segment_name(segment))

    def ensure(self, segment: int) -> None:
        """Make the segment's file exist. Raises OSError (ENOSPC, EIO, ...)."""
        if segment in self._files:
            return
        with self._flushing(segment):
            self._make(segment)

    def _make(self, segment: int) -> None:
        geometry = self._geometry[segment]
        name = segment_name(segment)
        # A crash or an I/O error may have left a file that nothing refers to.
        self.device.remove(name)
        file = self.device.create(name, geometry.file_bytes)
        try:
            segments.write_superblock(file, segment, geometry)
        except OSError:
            file.close()
            self.device.remove(name)
            raise
        self._files[segment] = file

    def read(self, segment: int, slot: int, offset: int, view: memoryview) -> None:
        """Fill `view` from bytes of a slot. Raises OSError."""
        start = self._geometry[segment].slot_offset(slot) + offset
        self._files[segment].read(start, [view])

    def locate(
        self, segments: NDArray[np.int32], slots: NDArray[np.int32], inside: NDArray[np.int64]
    ) -> tuple[list[DeviceFile], NDArray[np.int32], NDArray[np.int64]]:
        """(files, the file of each place, its offset there) of places `inside` slots."""
        if (segments == segments[0]).all():
            segment = int(segments[0])
            one = self._geometry[segment]
            offsets = inside + one.data_offset + slots.astype(np.int64) * one.slot_bytes
            return [self._files[segment]], np.zeros(len(segments), np.int32), offsets
        known, index = np.unique(segments, return_inverse=True)
        geometry = [self._geometry[segment] for segment in known.tolist()]
        starts = np.array([g.data_offset for g in geometry], np.int64)[index]
        sizes = np.array([g.slot_bytes for g in geometry], np.int64)[index]
        files = [self._files[segment] for segment in known.tolist()]
        return files, index.astype(np.int32), starts + slots * sizes + inside

    def locate_headers(
        self, segments: NDArray[np.int32], slots: NDArray[np.int32]
    ) -> tuple[list[DeviceFile], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """(files, the file of each slot's header, the offset of its page there, the header's number
        in the page)."""
        known, index = np.unique(segments, return_inverse=True)
        files = [self._files[segment] for segment in known.tolist()]
        page, number = np.divmod(slots.astype(np.int64), HEADERS_PER_PAGE)
        return files, index.astype(np.int32), (1 + page) * ALIGN_BYTES, number

    def sync(self, segment: int) -> None:
        """Make what was written to a segment durable, since its last failed flush. Raises
        OSError."""
        with self._flushing(segment):
            self._files[segment].sync()

    def failed_flushes(self, segment: int) -> int:
        """How many flushes have failed so far that may have cost what was written to a segment."""
        return self._failed_flushes[self._flushed_with(segment)]

    @contextmanager
    def _flushing(self, segment: int) -> Iterator[None]:
        """Note what fails within as a failed flush."""
        try:
            yield
        except OSError:
            self._failed_flushes[self._flushed_with(segment)] += 1
            raise

    def _flushed_with(self, segment: int) -> int:
        """Segments on a raw device are flushed all at once."""
        return segment if self.in_files else -1

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
