"""Checking segments: superblocks, header tables and the bytes of stored blocks.

Every byte of a segment is covered except the data of free slots, which means nothing: the
superblock's page (CRC, then zeros), the header of each stored block (equal to its record), that
of each free slot (blank, or whole with its CRC), what pads headers and slots (zeros), and the
data of stored blocks (checksums a chunk). Only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from dualpath.kvstore import checksum
from dualpath.kvstore.device import ALIGN_BYTES, Device, DeviceFile
from dualpath.kvstore.fsck_report import FsckCode, FsckReport
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.record import HEADER_BYTES, BlockRecord, encoded_length
from dualpath.kvstore.segment import (
    HEADERS_PER_PAGE,
    SUPERBLOCK_BYTES,
    SegmentGeometry,
    decode_superblock,
    page_buffer,
)
from dualpath.kvstore.ssd_tier import segment_number
from dualpath.transfer.errors import Corrupt

Progress = Callable[[int], None]
"""Called with bytes read."""


@dataclass(slots=True)
class CheckedSegment:
    """A segment file and what was found in it. `geometry` is None if the superblock is bad."""

    name: str
    number: int
    nbytes: int
    geometry: SegmentGeometry | None = None
    wanted_bytes: int = 0
    """How long the superblock says the file is; 0 if it does not say."""
    blank: bool = False
    readable: bool = True
    bad_headers: list[int] = field(default_factory=list)
    """Stored slots whose header is not that of the record."""
    bad_free_headers: list[int] = field(default_factory=list)


class SegmentCheck:
    """See the module docstring. The index reaches up to `generation` (None: to the last)."""

    def __init__(
        self, device: Device, report: FsckReport, progress: Progress, generation: int | None
    ) -> None:
        self._device = device
        self._report = report
        self._progress = progress
        self._generation = generation

    def superblocks(self) -> Iterator[CheckedSegment]:
        """Look at every segment's first page."""
        for name in self._device.names():
            number = segment_number(name)
            if number is None:
                self._report.add(FsckCode.UNKNOWN_FILE, name, "not a segment")
                continue
            self._report.segments += 1
            try:
                file = self._device.open(name)
            except OSError as error:
                self._report.add(FsckCode.SEGMENT_UNREADABLE, name, str(error))
                yield CheckedSegment(name, number, 0, readable=False)
                continue
            try:
                yield self._superblock(CheckedSegment(name, number, file.nbytes), file)
            finally:
                file.close()

    def _superblock(self, segment: CheckedSegment, file: DeviceFile) -> CheckedSegment:
        page = page_buffer()
        try:
            if file.nbytes >= ALIGN_BYTES:
                file.read(0, [page])
            if not any(page):
                segment.blank = True
                self._report.add(FsckCode.BLANK_SEGMENT, segment.name, "there is no superblock yet")
                return segment
            geometry = decode_superblock(page, segment.number, segment.name)
            segment.wanted_bytes = geometry.file_bytes
            if geometry.file_bytes <= file.nbytes:
                segment.geometry = geometry
            else:
                text = f"{file.nbytes} of {geometry.file_bytes} bytes are left"
                self._report.add(FsckCode.SEGMENT_SIZE, segment.name, text)
        except Corrupt as error:
            self._report.add(FsckCode.SUPERBLOCK_DAMAGED, segment.name, str(error))
        except OSError as error:
            segment.readable = False
            self._report.add(FsckCode.SEGMENT_UNREADABLE, segment.name, str(error))
        if any(page[SUPERBLOCK_BYTES:]):
            self._report.add(FsckCode.PADDING, segment.name, "behind the superblock")
        if segment.geometry is not None and file.nbytes > segment.geometry.file_bytes:
            extra = file.nbytes - segment.geometry.file_bytes
            self._report.add(FsckCode.PADDING, segment.name, f"{extra} bytes too long")
        return segment

    def contents(
        self,
        segment: CheckedSegment,
        records: Mapping[int, bytes],
        layouts: Mapping[bytes, KVLayout],
    ) -> list[int]:
        """Check headers and data; return the slots whose data is bad. `records` are those of the
        index for this segment, encoded, by slot; all of them fit its geometry."""
        assert segment.geometry is not None
        try:
            file = self._device.open(segment.name)
        except OSError as error:
            self._report.add(FsckCode.SEGMENT_UNREADABLE, segment.name, str(error))
            return list(records)
        try:
            self._headers(segment, segment.geometry, file, records)
            bad = []
            for slot, raw in sorted(records.items()):
                record = BlockRecord.from_bytes(raw)
                if not self._data(segment, file, record, layouts[record.namespace_id]):
                    bad.append(slot)
            return bad
        finally:
            file.close()

    def _headers(
        self,
        segment: CheckedSegment,
        geometry: SegmentGeometry,
        file: DeviceFile,
        records: Mapping[int, bytes],
    ) -> None:
        page = page_buffer()
        for first in range(0, geometry.slots, HEADERS_PER_PAGE):
            offset, _ = geometry.header_page(first)
            last = min(first + HEADERS_PER_PAGE, geometry.slots)
            try:
                file.read(offset, [page])
            except OSError as error:
                self._report.add(
                    FsckCode.SEGMENT_UNREADABLE, f"{segment.name} at {offset}", str(error)
                )
                segment.bad_headers += [slot for slot in range(first, last) if slot in records]
                continue
            self._progress(ALIGN_BYTES)
            for slot in range(first, last):
                inside = (slot - first) * HEADER_BYTES
                header = bytes(page[inside : inside + HEADER_BYTES])
                self._header(segment, slot, header, records.get(slot), offset + inside)
            if any(page[(last - first) * HEADER_BYTES :]):
                where = f"{segment.name} at {offset + (last - first) * HEADER_BYTES}"
                self._report.add(FsckCode.PADDING, where, "behind the last header")

    def _header(
        self,
        segment: CheckedSegment,
        slot: int,
        header: bytes,
        record: bytes | None,
        offset: int,
    ) -> None:
        where = f"{segment.name} at {offset} (header of slot {slot})"
        if record is not None:
            if header != record.ljust(HEADER_BYTES, b"\0"):
                segment.bad_headers.append(slot)
                self._report.add(
                    FsckCode.HEADER_DAMAGED, where, "it is not that of the block in the index"
                )
            return
        if not any(header):
            return
        try:
            found = BlockRecord.from_bytes(header)
            whole = found.slot == slot and not any(header[encoded_length(header) :])
        except Corrupt:
            whole = False
        if not whole:
            segment.bad_free_headers.append(slot)
            self._report.add(FsckCode.FREE_HEADER_DAMAGED, where, "the slot holds no block")
        elif self._generation is not None and found.generation > self._generation:
            text = "newer than the index; the next opening takes the block if it is whole"
            self._report.add(FsckCode.NEWER_BLOCK, where, text)

    def _data(
        self, segment: CheckedSegment, file: DeviceFile, record: BlockRecord, layout: KVLayout
    ) -> bool:
        assert segment.geometry is not None
        start = segment.geometry.slot_offset(record.slot)
        where = f"{segment.name} at {start} (slot {record.slot})"
        good = True
        for chunk, expected in enumerate(record.checksums):
            offset, nbytes = layout.chunk_extent(chunk)
            buffer = page_buffer(-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES)
            try:
                file.read(start + offset, [buffer])
            except OSError as error:
                self._report.add(FsckCode.SEGMENT_UNREADABLE, where, str(error))
                return False
            self._progress(len(buffer))
            self._report.read_bytes += len(buffer)
            if checksum.xxh3_64(buffer[:nbytes]) != expected:
                good = False
                self._report.add(
                    FsckCode.DATA_DAMAGED, where, f"chunk {chunk} does not have its checksum"
                )
            if any(buffer[nbytes:]):
                self._report.add(FsckCode.PADDING, where, "behind the block")
        return good
