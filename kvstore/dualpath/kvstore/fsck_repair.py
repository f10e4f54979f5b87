"""Repairing a data directory after a check, so that it opens and serves what is right.

Guarantees that nothing is destroyed that could be right: whatever is replaced (META, namespaces,
segments that cannot be used, the whole index) is first put aside in `damaged/`. What is bad leaves
the index with its descendants; what the index lost comes back from headers whose data verifies.
The index is never patched: a new one is written beside it and takes its place by a rename, so a
crash in the middle leaves the old or the new one. The store then opens as after a crash.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator

from dualpath.kvstore import directory_format
from dualpath.kvstore.device import ALIGN_BYTES, Device, DeviceFile
from dualpath.kvstore.directory_format import ASIDE_NAME, INVALIDATED_NAME, RETAINED_NAME, Meta
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_report import FsckCode, FsckReport
from dualpath.kvstore.fsck_segments import CheckedSegment
from dualpath.kvstore.header_scan import (
    OpenSegment,
    ScannedHeaders,
    flushed,
    is_whole,
    scan_headers,
)
from dualpath.kvstore.index_snapshot import SNAPSHOT_NAME, store_id_of
from dualpath.kvstore.invalidation_cuts import InvalidationCuts
from dualpath.kvstore.namespace_files import NamespaceFiles
from dualpath.kvstore.psync_device import sync_directory
from dualpath.kvstore.raw_device import owner_of
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.segment import (
    SegmentGeometry,
    erase_headers,
    highest_generation,
    page_buffer,
    read_headers,
    write_headers,
    write_superblock,
)
from dualpath.transfer.errors import Corrupt

_PUTS_MAX = 4096
_INDEX_CODES = (
    FsckCode.INDEX_LOST,
    FsckCode.INDEX_CHANGED,
    FsckCode.INDEX_UNREADABLE,
    FsckCode.INDEX_INCOMPLETE,
    FsckCode.RECORD_DAMAGED,
)
"""After these, records may be missing: the headers are asked."""


class FsckRepair:
    """Repairs what `fsck` has checked, under its lock. Segments on a raw device that cannot be read
    stay where they are: there is no aside."""

    def __init__(self, fsck: Fsck) -> None:
        self._fsck = fsck
        self._path = fsck.path

    def run(self) -> FsckReport:
        """Repair, check again, and return that report. Raises OSError (no space, I/O errors)."""
        report = self._fsck.report
        if not report.problems and not report.has(FsckCode.FREE_HEADER_DAMAGED):
            return report
        asks_headers = report.has(*_INDEX_CODES)
        self._repair_meta()
        self._repair_namespaces()
        self._repair_retained()
        self._with_device(self._repair_segments)
        self._repair_cuts()
        # What can be served is known only now.
        report = self._fsck.check()
        if asks_headers or report.has(*_INDEX_CODES):
            device = self._fsck.open_device(read_only=False)
            try:
                self._replace_index(device)
            finally:
                if device is not None:
                    device.close()
        elif self._fsck.state.bad_keys:
            self._replace_index(None)
        elif report.has(FsckCode.CLEAN_DAMAGED, FsckCode.SNAPSHOT_DAMAGED):
            self._forget_clean()
        self._with_device(self._repair_headers)
        return self._fsck.check()

    def _with_device(self, repair: Callable[[Device], None]) -> None:
        device = self._fsck.open_device(read_only=False)
        if device is not None:
            try:
                repair(device)
            finally:
                device.close()

    def _did(self, text: str) -> None:
        self._fsck.report.repairs.append(text)

    def _repair_meta(self) -> None:
        if self._fsck.report.has(FsckCode.META_DAMAGED):
            kept = self._aside("META")
            known = self._known_store_id()
            store_id = known or uuid.uuid4().hex
            # Of an unknown format: the oldest is brought up to date by the next opening.
            directory_format.write_meta(self._path, Meta(1, store_id))
            told = "its former id" if known else "a new id (restart agents that mount it)"
            self._did(f"META is written anew, with {told}, {store_id}; {kept}")

    def _known_store_id(self) -> str:
        """As the table of the raw device or the snapshot of a clean close tells; else ""."""
        raw = self._fsck.raw_device
        with contextlib.suppress(Corrupt, OSError):
            if raw and (owner := owner_of(raw)[0]):
                return owner
        with contextlib.suppress(Corrupt, OSError):
            return store_id_of(self._path / SNAPSHOT_NAME)
        return ""

    def _aside(self, name: str) -> str:
        """Put something of the directory aside, if it is there; say where the old one is."""
        path = self._path / name
        if not path.exists():
            return "there was none"
        return f"the old one is {directory_format.set_aside(self._path, path)}"

    def _repair_retained(self) -> None:
        if self._fsck.report.has(FsckCode.RETAINED_DAMAGED):
            kept = directory_format.set_aside(self._path, self._path / RETAINED_NAME)
            self._did(f"{RETAINED_NAME} is put aside as {kept}: retentions are forgotten")

    def _repair_cuts(self) -> None:
        if self._fsck.report.has(FsckCode.INVALIDATED_DAMAGED):
            InvalidationCuts(self._path).replace_damaged(self._highest_generation())
            self._did(
                f"{INVALIDATED_NAME} is written anew, the old one is in {ASIDE_NAME}: no block "
                "that is there now will be taken from its header"
            )

    def _repair_namespaces(self) -> None:
        for bad in self._fsck.state.bad_namespace_files:
            if bad.namespace is not None:
                kept = NamespaceFiles(self._path).write_anew(bad)
                self._did(f"{bad.where} is written anew from its other file{kept}")
            elif bad.path.exists():
                kept = directory_format.set_aside(self._path, bad.path)
                self._did(
                    f"{bad.where} is put aside as {kept}; its blocks leave the index. If its "
                    "content turns up, restore it, delete index/ and repair again"
                )

    # Segments

    def _repair_segments(self, device: Device) -> None:
        for segment in self._fsck.state.segments.values():
            if segment.geometry is not None or segment.blank or not segment.readable:
                continue
            if device.in_files and self._extend(segment):
                continue
            if self._rewrite_superblock(device, segment) or not device.in_files:
                continue
            kept = directory_format.set_aside(self._path, self._path / "segments" / segment.name)
            self._did(f"{segment.name} cannot be read and is put aside as {kept}")

    def _extend(self, segment: CheckedSegment) -> bool:
        """A segment that was cut short keeps the blocks that are whole."""
        wanted = segment.wanted_bytes
        if wanted <= segment.nbytes:
            return False
        with (self._path / "segments" / segment.name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, wanted)
            os.fsync(file.fileno())
        self._did(f"{segment.name} is as long as before again, {wanted} bytes; the rest is lost")
        return True

    def _rewrite_superblock(self, device: Device, segment: CheckedSegment) -> bool:
        """If the records and headers agree on what it must have been."""
        sizes = {layout.slot_bytes for layout in self._fsck.state.layouts.values()}
        fits = [
            geometry
            for size in sorted(sizes)
            if (geometry := SegmentGeometry.fitting(size, segment.nbytes)) is not None
        ]
        file = device.open(segment.name)
        try:
            votes = [(self._agreeing(segment, file, geometry), geometry) for geometry in fits]
            count, geometry = max(votes, key=lambda vote: vote[0], default=(0, None))
            if not count or geometry is None:
                return False
            page = page_buffer()
            file.read(0, [page])
            kept = directory_format.keep_bytes(
                self._path, f"{segment.name}.superblock", bytes(page)
            )
            write_superblock(file, segment.number, geometry)
        finally:
            file.close()
        self._did(
            f"the superblock of {segment.name} is written anew: {geometry.slots} slots of "
            f"{geometry.slot_bytes} bytes; the old one is {kept}"
        )
        return True

    def _agreeing(
        self, segment: CheckedSegment, file: DeviceFile, geometry: SegmentGeometry
    ) -> int:
        """Headers whose block lies where this geometry says."""
        if geometry.file_bytes > segment.nbytes:
            return 0
        opened, buffer = OpenSegment(geometry, file), page_buffer(geometry.slot_bytes)
        layouts = self._fsck.state.layouts
        return sum(
            record.segment == segment.number
            and is_whole(record, opened, layouts.get(record.namespace_id), buffer)
            for record in read_headers(file, geometry)
        )

    def _repair_headers(self, device: Device) -> None:
        kept = self._fsck.state
        for segment in kept.segments.values():
            if segment.geometry is None or not (segment.bad_headers or segment.bad_free_headers):
                continue
            good = {
                record.slot: record
                for record in map(BlockRecord.from_bytes, self._left())
                if record.segment == segment.number and record.slot in segment.bad_headers
            }
            file = device.open(segment.name)
            try:
                table = page_buffer(segment.geometry.data_offset - ALIGN_BYTES)
                file.read(ALIGN_BYTES, [table])
                where = directory_format.keep_bytes(
                    self._path, f"{segment.name}.headers", bytes(table)
                )
                write_headers(file, segment.geometry, good)
                erase_headers(file, segment.geometry, segment.bad_free_headers)
                file.sync()
            finally:
                file.close()
            self._did(
                f"{len(good)} headers of {segment.name} are written anew and "
                f"{len(segment.bad_free_headers)} blanked; the old ones are {where}"
            )

    # Index

    def _replace_index(self, device: Device | None) -> None:
        """Write an index of all that can be served and let it take the place of the old one. With
        `device` the headers there are asked for more."""
        found = dict(self._good_records())
        brought = 0
        reaches = self._fsck.state.generation
        if device is not None:
            scanned = self._from_headers(device, found)
            found |= scanned.records
            brought, reaches = len(scanned.records), max(0, scanned.generation)
        elif reaches is None:
            reaches = self._highest_generation()
        kept = _rooted(found)
        new = self._path / "index.new"
        if new.exists():
            directory_format.set_aside(self._path, new)
        new.mkdir(mode=0o700)
        index = DurableIndex(new)
        try:
            for start in range(0, len(kept), _PUTS_MAX):
                part = kept[start : start + _PUTS_MAX]
                index.apply([], [(record.key, record.to_bytes()) for record in part])
            index.apply([], [], reaches)
        finally:
            index.close()
        self._forget_clean()
        old = self._aside("index")
        new.rename(self._path / "index")
        sync_directory(self._path)
        dropped = len(self._fsck.state.records) + brought - len(kept)
        self._did(
            f"the index is written anew: {len(kept)} blocks, {brought} of them found by their "
            f"headers, {dropped} left out; {old}"
        )

    def _forget_clean(self) -> None:
        for name in ("CLEAN", SNAPSHOT_NAME):
            if (self._path / name).exists():
                kept = directory_format.set_aside(self._path, self._path / name)
                self._did(f"{name} is put aside as {kept}")

    def _left(self) -> list[bytes]:
        state = self._fsck.state
        return [raw for key, raw in state.records.items() if key not in state.bad_keys]

    def _good_records(self) -> Iterator[tuple[bytes, BlockRecord]]:
        for raw in self._left():
            record = BlockRecord.from_bytes(raw)
            yield record.key, record

    def _highest_generation(self) -> int:
        """Of all headers that are there now."""
        highest = [0]

        def look(device: Device) -> None:
            for segment in self._fsck.state.segments.values():
                if segment.geometry is not None:
                    file = device.open(segment.name)
                    try:
                        highest.append(highest_generation(file, segment.geometry))
                    finally:
                        file.close()

        self._with_device(look)
        return max(highest)

    def _from_headers(self, device: Device, known: dict[bytes, BlockRecord]) -> ScannedHeaders:
        """Blocks whose header and data are whole, that are not known, in slots that are free; all
        of them on the medium, as at an opening."""
        taken = {(record.segment, record.slot) for record in known.values()}

        def is_new(record: BlockRecord) -> bool:
            return record.key not in known and (record.segment, record.slot) not in taken

        opened: dict[int, OpenSegment] = {}
        try:
            for segment in self._fsck.state.segments.values():
                if segment.geometry is not None:
                    file = device.open(segment.name)
                    opened[segment.number] = OpenSegment(segment.geometry, file)
            state = self._fsck.state
            scanned = scan_headers(opened, state.layouts, wanted=is_new)
            few = state.generation is not None  # those that the index was not told of
            found = flushed(scanned.records, opened, state.layouts, again=few)
        finally:
            for each in opened.values():
                each.file.close()
        left = InvalidationCuts(self._path).left(found)
        return ScannedHeaders(left, scanned.generation)


def _rooted(records: dict[bytes, BlockRecord]) -> list[BlockRecord]:
    """Those whose whole chain is there; parents before children."""
    children: dict[bytes, list[BlockRecord]] = {}
    level = []
    for record in records.values():
        if record.parent:
            children.setdefault(record.namespace_id + record.parent, []).append(record)
        else:
            level.append(record)
    kept = []
    while level:
        kept += level
        level = [child for record in level for child in children.pop(record.key, ())]
    return kept
