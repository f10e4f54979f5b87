"""Finding blocks by their headers: those that the index was not told of, or all if it is lost.

A header alone may describe a block that was evicted, or one whose data never reached the medium, so
every byte is verified. After a killed process that was perhaps read from a cache: flush segments
before anybody counts on what was found. Of several blocks of one key the latest is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dualpath.kvstore import checksum
from dualpath.kvstore.device import DeviceFile
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.segment import SegmentGeometry, page_buffer, read_headers

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
    records: Mapping[bytes, BlockRecord], segments: Mapping[int, OpenSegment]
) -> dict[bytes, BlockRecord]:
    """Flush the segments of these blocks; without those of segments that refuse."""
    bad = set()
    for number in sorted({record.segment for record in records.values()}):
        try:
            segments[number].file.sync()
        except OSError as error:
            _log.warning("segment %d cannot be flushed, its newest blocks go: %s", number, error)
            bad.add(number)
    return {key: record for key, record in records.items() if record.segment not in bad}


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
