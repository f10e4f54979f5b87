"""Checking a data directory that nobody uses: every byte that means something. Reads only.

Owns the order of the checks and what they say about one another: META, the clean flag, the
namespaces, the index (in a child process, index_dump.py), the snapshot, then the segments
(fsck_segments.py) against the index. Takes the directory's lock; never makes or changes a file.
Repairs are in fsck_repair.py. Memory: about 500 bytes for each block of the index.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from dualpath.kvstore import directory_format
from dualpath.kvstore.device import Device
from dualpath.kvstore.directory_format import (
    ASIDE_NAME,
    INVALIDATED_NAME,
    RETAINED_NAME,
    SUMMED_FORMAT,
)
from dualpath.kvstore.fsck_report import FsckCode, FsckReport
from dualpath.kvstore.fsck_segments import CheckedSegment, SegmentCheck
from dualpath.kvstore.index_dump import IndexDump
from dualpath.kvstore.index_snapshot import SNAPSHOT_NAME, check_snapshot
from dualpath.kvstore.index_sums import SUMS_KEY, IndexSums, is_record_key
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace_files import (
    COPIES_NAME,
    NAMESPACES_NAME,
    BadNamespaceFile,
    NamespaceFiles,
)
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.raw_device import RawDevice, owner_of
from dualpath.kvstore.raw_marker import RAW_MARKER, raw_device_of
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.ssd_tier import segment_number
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_KNOWN = frozenset(
    (
        "CLEAN",
        "LOCK",
        "META",
        RAW_MARKER,
        INVALIDATED_NAME,
        RETAINED_NAME,
        "SCRUB",
        "index",
        COPIES_NAME,
        NAMESPACES_NAME,
        "segments",
        SNAPSHOT_NAME,
    )
)


@dataclass(slots=True)
class FsckState:
    """What a check learned, for a repair. `records` are the encoded ones by key, only good ones;
    `bad_keys` those of them that cannot be served. The index reaches up to `generation` (None: it
    tells of all blocks)."""

    layouts: dict[bytes, KVLayout] = field(default_factory=dict)
    records: dict[bytes, bytes] = field(default_factory=dict)
    bad_keys: set[bytes] = field(default_factory=set)
    generation: int | None = None
    segments: dict[int, CheckedSegment] = field(default_factory=dict)
    bad_namespace_files: list[BadNamespaceFile] = field(default_factory=list)


class Fsck:
    """One check of a directory; a context manager that holds its lock. `raw_device` is where its
    segments lie, if that device has another path now than the store was told. Raises InvalidRequest
    (no data directory, a newer format), Unavailable (in use, by which process)."""

    def __init__(
        self,
        path: str | Path,
        *,
        raw_device: str = "",
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir() or not any(
            (self.path / name).exists() for name in ("META", "segments", "index")
        ):
            raise InvalidRequest(f"{self.path} is not a data directory: it holds no META")
        self._lock = _lock(self.path)
        self._on_progress = on_progress
        self.raw_device = raw_device or raw_device_of(self.path)
        self._done = self._total = 0
        self._version = 0
        self._store_id = ""
        self._snapshot_crc: int | None = None
        self._index_is_as_left = False
        self.report = FsckReport()
        self.state = FsckState()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def check(self) -> FsckReport:
        """Check everything. May be called again, after a repair."""
        self.report, self.state = FsckReport(repairs=self.report.repairs), FsckState()
        self._version, self._snapshot_crc, self._index_is_as_left = 0, None, False
        self._check_meta()
        self._check_names()
        self._check_namespaces()
        self._check_clean()
        self._check_snapshot()
        self._check_lists()
        self._check_index()
        self._check_segments()
        return self.report

    def _check_meta(self) -> None:
        try:
            meta = directory_format.read_meta(self.path)
            self._version, self._store_id = meta.version, meta.store_id
        except Corrupt as error:
            self.report.add(FsckCode.META_DAMAGED, "META", str(error))

    def _check_names(self) -> None:
        for entry in sorted(self.path.iterdir()):
            if entry.name == ASIDE_NAME:
                kept = ", ".join(sorted(p.name for p in entry.iterdir())[:10])
                self.report.add(FsckCode.SET_ASIDE, ASIDE_NAME, kept)
            elif entry.name not in _KNOWN:
                self.report.add(FsckCode.UNKNOWN_FILE, entry.name, "not part of a store")

    def _check_namespaces(self) -> None:
        report, found = self.report, NamespaceFiles(self.path).find()
        for path in found.unfinished:
            where = f"{path.parent.name}/{path.name}"
            report.add(FsckCode.UNKNOWN_FILE, where, "left by a crash")
        for bad in found.bad:
            text = bad.why
            if bad.namespace is not None:
                text += "; its other file is whole, and --repair or the next opening writes it anew"
            else:
                text += (
                    "; without it the blocks of the namespace cannot be served: restore it from a "
                    "backup"
                )
            report.add(FsckCode.NAMESPACE_DAMAGED, bad.where, text)
        report.namespaces = len(found.whole) + sum(bad.namespace is None for bad in found.bad)
        self.state.bad_namespace_files = found.bad
        self.state.layouts = {namespace.id: namespace.layout for namespace in found.whole}

    def _check_clean(self) -> None:
        try:
            stamp = directory_format.read_clean(self.path)
        except Corrupt as error:
            self.report.add(FsckCode.CLEAN_DAMAGED, "CLEAN", str(error))
            return
        if stamp is None:
            if (self.path / "index" / "data.mdb").exists():
                self.report.add(FsckCode.NOT_CLEAN, "CLEAN", "the store was not shut down cleanly")
            return
        self._index_is_as_left = stamp.index == directory_format.stamp_index(self.path)
        if not self._index_is_as_left:
            self.report.add(
                FsckCode.INDEX_CHANGED,
                "index/data.mdb",
                "its bytes are not those of the clean shutdown",
            )
        self._snapshot_crc = stamp.snapshot_crc

    def _check_lists(self) -> None:
        try:
            directory_format.read_retained(self.path)
        except Corrupt as error:
            self.report.add(FsckCode.RETAINED_DAMAGED, RETAINED_NAME, str(error))
        try:
            directory_format.read_cuts(self.path)
        except Corrupt as error:
            self.report.add(FsckCode.INVALIDATED_DAMAGED, INVALIDATED_NAME, str(error))

    def _check_snapshot(self) -> None:
        path = self.path / SNAPSHOT_NAME
        if not path.exists():
            if self._snapshot_crc is not None:
                self.report.add(FsckCode.SNAPSHOT_DAMAGED, SNAPSHOT_NAME, "it is missing")
            return
        try:
            check_snapshot(path, self._snapshot_crc)
        except (Corrupt, OSError) as error:
            self.report.add(FsckCode.SNAPSHOT_DAMAGED, SNAPSHOT_NAME, str(error))

    def _check_index(self) -> None:
        report = self.report
        data = self.path / "index" / "data.mdb"
        if not data.exists():
            if self._has_segments() or report.namespaces:
                report.add(FsckCode.INDEX_LOST, "index", "there was something stored, and no index")
            return
        if not data.is_file() or not data.stat().st_size:
            report.add(FsckCode.INDEX_LOST, "index/data.mdb", "it is empty or no file")
            return
        dump = IndexDump(self.path / "index", trusted=self._index_is_as_left)
        sums, found = None, IndexSums()
        for key, value in dump:
            if not is_record_key(key):
                if key == SUMS_KEY:
                    sums = IndexSums.from_bytes(value) or IndexSums(-1, 0)
                continue
            found.add(value)
            report.blocks += 1
            try:
                record = BlockRecord.from_bytes(value)
                if record.key != key:
                    raise Corrupt("it lies under the key of another block")
            except Corrupt as error:
                report.add(FsckCode.RECORD_DAMAGED, f"index, key {key.hex()}", str(error))
                report.bad_blocks += 1
                continue
            self.state.records[key] = value
        self.state.generation = None if sums is None else sums.generation
        if dump.failure:
            report.add(FsckCode.INDEX_UNREADABLE, "index/data.mdb", dump.failure)
        elif sums is None:
            if self._version >= SUMMED_FORMAT and found.records:
                report.add(FsckCode.INDEX_INCOMPLETE, "index/data.mdb", "its sums are gone")
        elif not sums.holds(found):
            report.add(
                FsckCode.INDEX_INCOMPLETE,
                "index/data.mdb",
                f"{found.records} records are found, {sums.records} were committed",
            )

    def _has_segments(self) -> bool:
        folder = self.path / "segments"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return any(segment_number(name) is not None for name in names)

    # Segments

    def _check_segments(self) -> None:
        device = self.open_device(read_only=True)
        try:
            self._check_segments_on(device)
        finally:
            if device is not None:
                device.close()
        self._check_parents()

    def open_device(self, *, read_only: bool) -> PsyncDevice | RawDevice | None:
        """The device of the segments, for one user at a time; None if there is none that can be
        used. Raises InvalidRequest (another store's device), OSError."""
        if self.raw_device:
            return self._open_raw_device(read_only=read_only)
        if not (self.path / "segments").is_dir():
            return None
        return PsyncDevice(self.path / "segments", direct=read_only, read_only=read_only)

    def _open_raw_device(self, *, read_only: bool) -> RawDevice | None:
        try:
            owner, damaged = owner_of(self.raw_device)
        except Corrupt as error:
            if read_only:
                self.report.add(FsckCode.RAW_TABLE_LOST, self.raw_device, str(error))
            return None
        if not owner:
            return None  # blank: a crash came before its first table
        if damaged and read_only:
            text = "a copy of the table is damaged, the other one is used"
            self.report.add(FsckCode.RAW_TABLE_DAMAGED, self.raw_device, text)
        return RawDevice(self.raw_device, owner=self._store_id or owner, read_only=read_only)

    def _check_segments_on(self, device: Device | None) -> None:
        check = None
        if device is not None:
            check = SegmentCheck(device, self.report, self._progress, self.state.generation)
            self.state.segments = {segment.number: segment for segment in check.superblocks()}
        places = self._places()
        self._done, self._total = 0, self._readable_bytes(places)
        for number, segment in sorted(self.state.segments.items()):
            if segment.geometry is None or check is None:
                continue
            keys = places.get(number, {})
            raw = {slot: self.state.records[key] for slot, key in keys.items()}
            for slot in check.contents(segment, raw, self.state.layouts):
                self._bad(keys[slot])

    def _places(self) -> dict[int, dict[int, bytes]]:
        """Keys by segment and slot; of two that claim one slot, the later one."""
        places: dict[int, dict[int, bytes]] = {}
        for key, raw in self.state.records.items():
            record = BlockRecord.from_bytes(raw)
            reason = self._misplaced(record)
            if reason:
                self.report.add(FsckCode.RECORD_MISPLACED, f"index, key {key.hex()}", reason)
                self._bad(key)
                continue
            slots = places.setdefault(record.segment, {})
            other = slots.get(record.slot)
            if other is not None:
                later = BlockRecord.from_bytes(self.state.records[other]).generation
                loser = other if later < record.generation else key
                where = f"segment {record.segment} slot {record.slot}"
                self.report.add(
                    FsckCode.CLAIMED_TWICE, where, f"the earlier block is {loser.hex()}"
                )
                self._bad(loser)
                if loser == key:
                    continue
            slots[record.slot] = key
        return places

    def _misplaced(self, record: BlockRecord) -> str:
        layout = self.state.layouts.get(record.namespace_id)
        if layout is None:
            return f"its namespace {record.namespace_id.hex()} is not there"
        if layout.block_bytes != record.length or layout.chunk_count != len(record.checksums):
            return f"{record.length} bytes do not fit the layout of its namespace"
        segment = self.state.segments.get(record.segment)
        if segment is None or segment.geometry is None:
            return f"segment {record.segment} is not there, or cannot be used"
        if segment.geometry.slot_bytes != layout.slot_bytes:
            return f"{segment.name} has slots of {segment.geometry.slot_bytes} bytes"
        if record.slot >= segment.geometry.slots:
            return f"{segment.name} has {segment.geometry.slots} slots, not {record.slot}"
        return ""

    def _check_parents(self) -> None:
        for key, raw in self.state.records.items():
            record = BlockRecord.from_bytes(raw)
            above = record.namespace_id + record.parent
            if record.parent and above not in self.state.records:
                self.report.add(
                    FsckCode.ORPHAN, f"index, key {key.hex()}", "its parent is not stored"
                )
                self._bad(key)

    def _bad(self, key: bytes) -> None:
        if key not in self.state.bad_keys:
            self.state.bad_keys.add(key)
            self.report.bad_blocks += 1

    def _readable_bytes(self, places: Mapping[int, Mapping[int, bytes]]) -> int:
        total = 0
        for number, keys in places.items():
            geometry = self.state.segments[number].geometry
            assert geometry is not None
            total += geometry.data_offset + len(keys) * geometry.slot_bytes
        return total

    def _progress(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_progress(min(self._done, self._total), self._total)


def _lock(path: Path) -> int:
    """Take the directory's lock without making a file. Raises Unavailable; -1 if there is no lock
    file, so that nobody can use the directory."""
    try:
        fd = os.open(path / "LOCK", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Unavailable(
            f"data directory {path} is in use by process {holder}; stop it first", reason="locked"
        ) from error
    return fd
