"""Finding blocks by their headers: those that the index was not told of, or all if it is lost.

A header alone may describe a block that was evicted, or one whose data never reached the medium, so
every byte is verified. After a killed process that was perhaps read from a cache: flush segments
before anybody counts on what was found. Of several blocks of one key the latest is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dualpath.kvstore import checksum
from dualpath.kvstore.device import DeviceFile
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.segment import SegmentGeometry, page_buffer, read_headers, write_headers

FLUSHES_MAX = 8
"""A segment that refuses so often in a row is not only out of sorts."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment whose superblock is good."""

    geometry: SegmentGeometry
    file: DeviceFile


@dataclass(frozen=True, slots=True)
class ScannedHeaders:
    """`generation` is the highest that any whole header names, be its block good or not; -1 if
    there is none."""

    records: dict[bytes, BlockRecord]
    generation: int


def scan_headers(
    segments: Mapping[int, OpenSegment],
    layouts: Mapping[bytes, KVLayout],
    newer_than: int = -1,
    *,
    wanted: Callable[[BlockRecord], bool] = lambda record: True,
) -> ScannedHeaders:
    """Blocks of a later generation, by key, that are `wanted` and whose every byte verifies.
    `layouts` are by namespace id."""
    latest: dict[bytes, BlockRecord] = {}
    generation = -1
    for number, segment in segments.items():
        buffer = page_buffer(segment.geometry.slot_bytes)
        for record in read_headers(segment.file, segment.geometry, newer_than):
            generation = max(generation, record.generation)
            known = latest.get(record.key)
            if (
                record.segment == number
                and wanted(record)
                and (known is None or known.generation < record.generation)
                and is_whole(record, segment, layouts.get(record.namespace_id), buffer)
            ):
                latest[record.key] = record
    return ScannedHeaders(latest, generation)


def flushed(
    records: Mapping[bytes, BlockRecord],
    segments: Mapping[int, OpenSegment],
    layouts: Mapping[bytes, KVLayout],
    *,
    again: bool,
) -> dict[bytes, BlockRecord]:
    """These blocks, on the medium; without those of segments that refuse. With `again` they are
    written once more: the killed process may have been told that they could not be, and a flush
    tells that once."""
    kept: dict[bytes, BlockRecord] = {}
    by_segment: dict[int, list[BlockRecord]] = {}
    for record in records.values():
        by_segment.setdefault(record.segment, []).append(record)
    for number in sorted(by_segment):
        segment, found = segments[number], by_segment[number]
        for _ in range(FLUSHES_MAX):
            try:
                if again:
                    found = _written_again(found, segment, layouts)
                segment.file.sync()
            except OSError as error:
                # A failed flush may have cost all that was written before, on a raw device of all.
                again = True
                _log.warning("segment %d cannot be flushed: %s", number, error)
            else:
                kept.update((record.key, record) for record in found)
                break
        else:
            _log.error("%d blocks of segment %d go: it cannot be flushed", len(found), number)
    return kept


def _written_again(
    records: Sequence[BlockRecord], segment: OpenSegment, layouts: Mapping[bytes, KVLayout]
) -> list[BlockRecord]:
    """Those that were still whole when they were written. Raises OSError."""
    buffer = page_buffer(segment.geometry.slot_bytes)
    whole = []
    for record in records:
        if is_whole(record, segment, layouts.get(record.namespace_id), buffer):
            segment.file.write(segment.geometry.slot_offset(record.slot), [buffer])
            whole.append(record)
    write_headers(segment.file, segment.geometry, {record.slot: record for record in whole})
    return whole


def is_whole(
    record: BlockRecord, segment: OpenSegment, layout: KVLayout | None, buffer: memoryview
) -> bool:
    """Whether the block is there, as its header and the layout of its namespace say; read into
    `buffer`, of a slot."""
    geometry = segment.geometry
    if (
        layout is None
        or layout.block_bytes != record.length
        or layout.chunk_count != len(record.checksums)
        or layout.slot_bytes != geometry.slot_bytes
        or record.slot >= geometry.slots
    ):
        return False
    try:
        segment.file.read(geometry.slot_offset(record.slot), [buffer])
    except OSError:
        return False
    return checksum.of_block(buffer, layout) == record.checksums
