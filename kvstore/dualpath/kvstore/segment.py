"""Segments: preallocated files of fixed slots, with a superblock and a table of headers.

    0        superblock (4 KiB): magic, format version, segment id, slot size, slots, CRC
    4 KiB    header table: one 1 KiB header a slot, rounded up to 4 KiB
    ...      slots, each `slot_bytes` (a multiple of 4 KiB)

Owns geometry and encodings and reads and writes them through a DeviceFile. A header stays behind
when its block is evicted: up to the generation that the index reaches, only the index says whether
it means anything.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.device import ALIGN_BYTES, DeviceFile
from dualpath.kvstore.record import HEADER_BYTES, RECORD_FIELDS, RECORD_MAGIC, BlockRecord
from dualpath.transfer.errors import Corrupt, InvalidRequest
from numpy.typing import NDArray

SEGMENT_FORMAT = 1
HEADERS_PER_PAGE = ALIGN_BYTES // HEADER_BYTES
SLOTS_PER_SEGMENT_MAX = 1 << 20
RUN_PAGES_MAX = 256
"""Most header pages that are read or written at once."""

_SUPERBLOCK = struct.Struct("<8sIIII")
_MAGIC = b"dpsegmt\0"
_CRC = struct.Struct("<I")
SUPERBLOCK_BYTES = _SUPERBLOCK.size + _CRC.size
"""What follows in its page is zero."""

assert ALIGN_BYTES % HEADER_BYTES == 0


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def page_buffer(nbytes: int = ALIGN_BYTES) -> memoryview:
    """Page-aligned zeroed memory, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, nbytes))


@dataclass(frozen=True, slots=True)
class SegmentGeometry:
    """Offsets inside a segment file, bytes."""

    slot_bytes: int
    slots: int

    @staticmethod
    def fitting(slot_bytes: int, file_bytes_max: int) -> SegmentGeometry | None:
        """The most slots that fit into a file of `file_bytes_max`; None if not even one does."""
        slots = (file_bytes_max - ALIGN_BYTES) // (slot_bytes + HEADER_BYTES)
        slots = min(slots, SLOTS_PER_SEGMENT_MAX)
        while slots > 0 and SegmentGeometry(slot_bytes, slots).file_bytes > file_bytes_max:
            slots -= 1
        return SegmentGeometry(slot_bytes, slots) if slots > 0 else None

    @property
    def data_offset(self) -> int:
        """Where slot 0 starts."""
        return ALIGN_BYTES + _align(self.slots * HEADER_BYTES)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.data_offset + self.slots * self.slot_bytes

    def slot_offset(self, slot: int) -> int:
        """Where a slot starts."""
        return self.data_offset + slot * self.slot_bytes

    def header_page(self, slot: int) -> tuple[int, int]:
        """(offset of the page that holds the slot's header, offset of the header inside)."""
        page, inside = divmod(slot, HEADERS_PER_PAGE)
        return ALIGN_BYTES + page * ALIGN_BYTES, inside * HEADER_BYTES


def write_superblock(file: DeviceFile, segment: int, geometry: SegmentGeometry) -> None:
    """Write and sync the superblock of a new file."""
    body = _SUPERBLOCK.pack(_MAGIC, SEGMENT_FORMAT, segment, geometry.slot_bytes, geometry.slots)
    page = page_buffer()
    page[: len(body) + _CRC.size] = body + _CRC.pack(zlib.crc32(body))
    file.write(0, [page])
    file.sync()


def is_blank(file: DeviceFile) -> bool:
    """Whether the superblock was never written."""
    if file.nbytes < ALIGN_BYTES:
        return True
    page = page_buffer()
    try:
        file.read(0, [page])
    except OSError:
        return False
    return not any(page)


def read_superblock(file: DeviceFile, segment: int, name: str) -> SegmentGeometry:
    """Read and check. Raises Corrupt, or InvalidRequest for a newer format."""
    if file.nbytes < ALIGN_BYTES:
        raise Corrupt(f"segment {name} has only {file.nbytes} bytes")
    page = page_buffer()
    file.read(0, [page])
    geometry = decode_superblock(page, segment, name)
    if geometry.file_bytes > file.nbytes:
        raise Corrupt(
            f"segment {name} was truncated: {file.nbytes} of {geometry.file_bytes} bytes are left"
        )
    return geometry


def decode_superblock(page: memoryview, segment: int, name: str) -> SegmentGeometry:
    """What the first page of a segment says. Raises Corrupt, or InvalidRequest for a newer
    format."""
    body = bytes(page[: _SUPERBLOCK.size])
    (crc,) = _CRC.unpack_from(page, _SUPERBLOCK.size)
    magic, version, number, slot_bytes, slots = _SUPERBLOCK.unpack(body)
    if magic != _MAGIC or crc != zlib.crc32(body):
        raise Corrupt(f"segment {name}: the superblock is damaged")
    if version > SEGMENT_FORMAT:
        raise InvalidRequest(
            f"segment {name} has format {version}, this version reads up to {SEGMENT_FORMAT}; "
            "upgrade dualpath or use another data directory",
            reason="newer_format",
        )
    geometry = SegmentGeometry(slot_bytes, slots)
    if number != segment or slots < 1 or slot_bytes % ALIGN_BYTES or slot_bytes < ALIGN_BYTES:
        raise Corrupt(f"segment {name}: the superblock names segment {number}, {geometry}")
    return geometry


def write_headers(
    file: DeviceFile, geometry: SegmentGeometry, headers: Mapping[int, BlockRecord]
) -> None:
    """Write headers by slot; neighbours in the same 4 KiB page are kept. One thread a segment.
    Neighbouring pages are written at once."""
    _write_headers(file, geometry, {slot: headers[slot].to_header() for slot in headers})


def erase_headers(file: DeviceFile, geometry: SegmentGeometry, slots: Collection[int]) -> None:
    """Blank the headers of slots; otherwise as `write_headers`."""
    _write_headers(file, geometry, dict.fromkeys(slots, bytes(HEADER_BYTES)))


def _write_headers(
    file: DeviceFile, geometry: SegmentGeometry, headers: Mapping[int, bytes]
) -> None:
    pages: dict[int, list[int]] = {}
    for slot in sorted(headers):
        pages.setdefault(slot // HEADERS_PER_PAGE, []).append(slot)
    for first, count in runs(pages, RUN_PAGES_MAX):
        slots = [slot for page in range(first, first + count) for slot in pages[page]]
        start, _ = geometry.header_page(first * HEADERS_PER_PAGE)
        buffer = page_buffer(count * ALIGN_BYTES)
        if len(slots) < count * HEADERS_PER_PAGE:
            file.read(start, [buffer])
        for slot in slots:
            page, inside = geometry.header_page(slot)
            at = page - start + inside
            buffer[at : at + HEADER_BYTES] = headers[slot]
        file.write(start, [buffer])


def runs(numbers: Iterable[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of runs of consecutive numbers, each at most `most` long."""
    first = count = 0
    for number in sorted(numbers):
        if count and number == first + count and count < most:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def read_headers(
    file: DeviceFile, geometry: SegmentGeometry, newer_than: int = -1
) -> Iterator[BlockRecord]:
    """Yield the headers of a later generation that decode, in order of slots; the others were never
    written or are damaged. Unreadable pages are skipped."""
    for first, run in _header_runs(file, geometry):
        for number in _newer(run, newer_than):
            record = _decoded(run, number)
            if record is not None and record.slot == first + number < geometry.slots:
                yield record


def highest_generation(file: DeviceFile, geometry: SegmentGeometry) -> int:
    """Of all whole headers, whatever they are worth; -1 if there is none."""
    highest = -1
    for _, run in _header_runs(file, geometry):
        numbers = _newer(run, highest)
        generations = _fixed_parts(run)["generation"][numbers]
        for at in np.argsort(generations)[::-1].tolist():
            record = _decoded(run, numbers[at])
            if record is not None:
                highest = record.generation
                break
    return highest


def _header_runs(file: DeviceFile, geometry: SegmentGeometry) -> Iterator[tuple[int, memoryview]]:
    """(first slot, pages of headers from there on), in memory that is used again."""
    pages = -(-geometry.slots // HEADERS_PER_PAGE)
    buffer = page_buffer(min(pages, RUN_PAGES_MAX) * ALIGN_BYTES)
    for first in range(0, pages, RUN_PAGES_MAX):
        run = buffer[: min(RUN_PAGES_MAX, pages - first) * ALIGN_BYTES]
        _read_pages(file, ALIGN_BYTES + first * ALIGN_BYTES, run)
        yield first * HEADERS_PER_PAGE, run


def _read_pages(file: DeviceFile, start: int, run: memoryview) -> None:
    """Pages that cannot be read are zero."""
    try:
        file.read(start, [run])
    except OSError:
        for at in range(0, len(run), ALIGN_BYTES):
            page = run[at : at + ALIGN_BYTES]
            try:
                file.read(start + at, [page])
            except OSError:
                page[:] = bytes(ALIGN_BYTES)


def _fixed_parts(run: memoryview) -> NDArray[np.void]:
    table = np.frombuffer(run, np.uint8).reshape(-1, HEADER_BYTES)
    return np.ascontiguousarray(table[:, : RECORD_FIELDS.itemsize]).view(RECORD_FIELDS)[:, 0]


def _newer(run: memoryview, newer_than: int) -> list[int]:
    """Numbers of the headers that are worth decoding."""
    fixed = _fixed_parts(run)
    found = fixed["magic"] == np.void(RECORD_MAGIC)
    if newer_than >= 0:
        found &= fixed["generation"] > np.uint64(newer_than)
    numbers: list[int] = np.flatnonzero(found).tolist()
    return numbers


def _decoded(run: memoryview, number: int) -> BlockRecord | None:
    try:
        return BlockRecord.from_bytes(
            bytes(run[number * HEADER_BYTES : (number + 1) * HEADER_BYTES])
        )
    except Corrupt:
        return None
