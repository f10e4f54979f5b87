"""Opening: from the durable facts to rows in memory.

A record is taken only if its CRC holds, its namespace is known, its segment's superblock is good
and its geometry fits; of two records for one slot the later generation is taken. What does not
hang below a root is dropped, so that presence is prefix-closed. If the index is lost or damaged,
it is rebuilt from the headers; there every block's bytes are verified, because a header alone
may describe an evicted block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from dualpath.kvstore import checksum
from dualpath.kvstore.block_table import NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.device import Device, DeviceFile
from dualpath.kvstore.durable_index import DurableIndex, probe
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.segment import (
    SegmentGeometry,
    is_blank,
    page_buffer,
    read_headers,
    read_superblock,
)
from dualpath.kvstore.ssd_tier import SsdTier, segment_number
from dualpath.transfer.errors import Corrupt

_PUTS_MAX = 4096
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Found:
    geometry: SegmentGeometry
    file: DeviceFile


@dataclass(frozen=True, slots=True)
class Recovered:
    """What opening found. `dropped` records were damaged, orphaned or stale."""

    generation: int
    blocks: int
    dropped: int
    rebuilt: bool


class Recovery:
    """One opening of a store."""

    def __init__(
        self, directory: DataDirectory, device: Device, catalog: Catalog, table: BlockTable
    ) -> None:
        self._directory = directory
        self._device = device
        self._catalog = catalog
        self._table = table
        self._segments: dict[int, _Found] = {}
        self._damaged: list[int] = []
        self._stale: list[tuple[bytes, int]] = []
        self._suspect = False
        self._index: DurableIndex | None = None

    @property
    def index(self) -> DurableIndex:
        """The open index, once `load` has returned."""
        assert self._index is not None
        return self._index

    def read(self) -> tuple[list[BlockRecord], bool]:
        """(records that may be taken, whether the index was rebuilt from headers)."""
        for namespace in self._directory.namespaces():
            self._catalog.open(namespace)
        self._open_segments()
        lost = not (self._directory.index_path / "data.mdb").exists() and bool(self._segments)
        try:
            if not self._directory.was_clean and not probe(self._directory.index_path):
                raise Corrupt("the index cannot be walked by a child process")
            self._index = DurableIndex(self._directory.index_path)
            if not lost:
                return self._usable(self._index), False
        except Corrupt as error:
            _log.warning("%s; it is set aside and rebuilt from the headers", error)
        self._stale.clear()
        records = self._from_headers()
        self._rewrite(records)
        _log.warning("the index was rebuilt from headers: %d blocks", len(records))
        return records, True

    def _rewrite(self, records: list[BlockRecord]) -> None:
        """Set the index aside and write a new one."""
        if self._index is not None:
            self._index.close()
            self._index = None
        self._directory.set_index_aside()
        self._index = DurableIndex(self._directory.index_path)
        for start in range(0, len(records), _PUTS_MAX):
            part = records[start : start + _PUTS_MAX]
            self._index.apply([], [(record.key, record.to_bytes()) for record in part])

    def load(
        self, records: list[BlockRecord], ssd: SsdTier, residency: Residency, *, rebuilt: bool
    ) -> Recovered:
        """Bring records into memory; delete the others from the index."""
        kept = self._link(self._one_a_slot(records))
        taken: dict[int, list[int]] = {}
        for record, row in kept:
            self._table.segment[row], self._table.slot[row] = record.segment, record.slot
            residency.restore(row, record.generation, record.checksums)
            taken.setdefault(record.segment, []).append(record.slot)
        for segment in sorted(self._segments):
            found = self._segments[segment]
            ssd.adopt(segment, found.geometry, found.file, taken.get(segment, ()))
        for segment in self._damaged:
            ssd.skip(segment)
        if self._suspect or not self._delete_stale():
            # A page with a bad record may have bad neighbours that only a write would find.
            _log.warning("the index is damaged; it is set aside and written anew")
            self._rewrite([record for record, _ in kept])
        generation = max((record.generation for record, _ in kept), default=0)
        return Recovered(generation, len(kept), len(self._stale), rebuilt)

    def _delete_stale(self) -> bool:
        """False if the index refuses. Must be done before any slot is written again."""
        if not self._stale:
            return True
        _log.warning("%d records were damaged, orphaned or stale: dropped", len(self._stale))
        try:
            self.index.apply(self._stale, [])
        except OSError as error:
            _log.warning("%s", error)
            return False
        return True

    def _open_segments(self) -> None:
        for name in self._device.names():
            segment = segment_number(name)
            if segment is None:
                continue
            file = self._device.open(name)
            if is_blank(file):
                # A crash came between creating the file and its superblock.
                file.close()
                self._device.remove(name)
                self._damaged.append(segment)
                continue
            try:
                geometry = read_superblock(file, segment, name)
            except (Corrupt, OSError) as error:
                _log.warning("%s; the segment is left alone and its blocks are dropped", error)
                file.close()
                self._damaged.append(segment)
                continue
            except BaseException:
                file.close()
                self.close()
                raise
            self._segments[segment] = _Found(geometry, file)

    def close(self) -> None:
        """Give everything back after a failure."""
        if self._index is not None:
            self._index.close()
        for found in self._segments.values():
            found.file.close()
        self._segments.clear()

    def _usable(self, index: DurableIndex) -> list[BlockRecord]:
        records = []
        for key, value in index.records():
            try:
                record = BlockRecord.from_bytes(value)
            except Corrupt:
                self._stale.append((bytes(key), -1))
                self._suspect = True
                continue
            if record.key != key or not self._fits(record):
                self._stale.append((bytes(key), -1))
                continue
            records.append(record)
        return records

    def _fits(self, record: BlockRecord) -> bool:
        entry = self._catalog.find(record.namespace_id)
        found = self._segments.get(record.segment)
        return (
            entry is not None
            and found is not None
            and entry.layout.block_bytes == record.length
            and entry.layout.chunk_count == len(record.checksums)
            and entry.layout.slot_bytes == found.geometry.slot_bytes
            and record.slot < found.geometry.slots
        )

    def _one_a_slot(self, records: Iterable[BlockRecord]) -> list[BlockRecord]:
        latest: dict[tuple[int, int], BlockRecord] = {}
        for record in sorted(records, key=lambda record: record.generation):
            older = latest.get((record.segment, record.slot))
            if older is not None:
                self._stale.append((older.key, older.generation))
            latest[(record.segment, record.slot)] = record
        return list(latest.values())

    def _link(self, records: list[BlockRecord]) -> list[tuple[BlockRecord, int]]:
        """Rows for the records that hang below a root; parents come first in the result."""
        children: dict[bytes, list[BlockRecord]] = {}
        level: list[tuple[BlockRecord, int]] = []
        for record in records:
            if record.parent:
                children.setdefault(record.namespace_id + record.parent, []).append(record)
            else:
                level.append((record, NO_ROW))
        kept: list[tuple[BlockRecord, int]] = []
        while level:
            below: list[tuple[BlockRecord, int]] = []
            for record, parent in level:
                row = self._row(record, parent)
                kept.append((record, row))
                below += [(child, row) for child in children.pop(record.key, ())]
            level = below
        for orphans in children.values():
            self._stale += [(orphan.key, orphan.generation) for orphan in orphans]
        return kept

    def _row(self, record: BlockRecord, parent: int) -> int:
        entry = self._catalog.find(record.namespace_id)
        assert entry is not None
        row = self._table.add(entry.index, record.hash, parent, entry.layout.slot_bytes)
        assert self._table.state[row] == RowState.PENDING
        return row

    def _from_headers(self) -> list[BlockRecord]:
        """Records of all headers whose block's bytes verify; one a key, the latest."""
        latest: dict[bytes, BlockRecord] = {}
        for segment, found in self._segments.items():
            for record in read_headers(found.file, found.geometry):
                entry = self._catalog.find(record.namespace_id)
                known = latest.get(record.key)
                if (
                    entry is not None
                    and record.segment == segment
                    and self._fits(record)
                    and (known is None or known.generation < record.generation)
                    and _verifies(record, found, entry)
                ):
                    latest[record.key] = record
        return list(latest.values())


def _verifies(record: BlockRecord, found: _Found, entry: NamespaceEntry) -> bool:
    buffer = page_buffer(found.geometry.slot_bytes)
    try:
        found.file.read(found.geometry.slot_offset(record.slot), [buffer])
    except OSError:
        return False
    return checksum.of_block(buffer, entry.layout) == record.checksums
