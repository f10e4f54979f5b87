"""Finding blocks by their headers: those that the index was not told of, or all if it is lost.

A header alone may describe a block that was evicted, or one whose data never reached the medium, so
every byte is verified. After a killed process that was perhaps read from a cache, so segments are
flushed before anybody counts on what was found. Of several blocks of one key the latest is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from dualpath.kvstore import checksum
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.device import DeviceFile
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
    segments: Mapping[int, OpenSegment], catalog: Catalog, newer_than: int = -1
) -> ScannedHeaders:
    """Blocks of a later generation, by key, whose every byte verifies; durable on return."""
    latest: dict[bytes, BlockRecord] = {}
    generation = -1
    for number, segment in segments.items():
        buffer = page_buffer(segment.geometry.slot_bytes)
        for record in read_headers(segment.file, segment.geometry, newer_than):
            generation = max(generation, record.generation)
            entry = catalog.find(record.namespace_id)
            known = latest.get(record.key)
            if (
                entry is not None
                and record.segment == number
                and _fits(record, segment.geometry, entry)
                and (known is None or known.generation < record.generation)
                and _verifies(record, segment, entry, buffer)
            ):
                latest[record.key] = record
    return ScannedHeaders(_flushed(latest, segments), generation)


def _flushed(
    records: dict[bytes, BlockRecord], segments: Mapping[int, OpenSegment]
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


def _fits(record: BlockRecord, geometry: SegmentGeometry, entry: NamespaceEntry) -> bool:
    return (
        entry.layout.block_bytes == record.length
        and entry.layout.chunk_count == len(record.checksums)
        and entry.layout.slot_bytes == geometry.slot_bytes
        and record.slot < geometry.slots
    )


def _verifies(
    record: BlockRecord, segment: OpenSegment, entry: NamespaceEntry, buffer: memoryview
) -> bool:
    try:
        segment.file.read(segment.geometry.slot_offset(record.slot), [buffer])
    except OSError:
        return False
    return checksum.of_block(buffer, entry.layout) == record.checksums
