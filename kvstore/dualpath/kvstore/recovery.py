"""Opening: from the durable facts to rows in memory.

The facts come from the snapshot of a clean close, else from the durable index and the headers of
blocks that it was not told of, else (if the index is lost or damaged) from all headers. Whatever is
found by its header is verified byte by byte (header_scan.py). All three become `BlockColumns`,
which are checked in one way: a block is taken only if its namespace is known, its segment's
superblock is good and its geometry fits; of two blocks for one slot the later generation is taken.
What does not hang below a root is dropped, so that presence is prefix-closed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.catalog import Catalog
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.device import Device
from dualpath.kvstore.directory_format import ASIDE_NAME
from dualpath.kvstore.durable_index import DurableIndex, Probe
from dualpath.kvstore.header_scan import OpenSegment, flushed, scan_headers
from dualpath.kvstore.heap import trim_heap
from dualpath.kvstore.index_snapshot import SnapshotState, read_snapshot
from dualpath.kvstore.invalidation_cuts import InvalidationCuts
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.record_columns import NamespaceShape, RecordColumns
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.segment import highest_generation, is_blank, read_superblock
from dualpath.kvstore.ssd_tier import SsdTier, segment_name, segment_number
from dualpath.transfer.errors import Corrupt
from numpy.typing import NDArray

_PUTS_MAX = 4096
_DECODED_AT_ONCE = 1 << 13
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What opening found. `dropped` records were damaged, orphaned or stale."""

    generation: int
    blocks: int
    dropped: int
    rebuilt: bool
    """Whether the index was lost and made anew from the headers."""
    from_snapshot: bool = False
    newer: int = 0
    """Blocks that the index had not been told of before the crash."""
    troubles: tuple[str, ...] = ()
    """A sentence for each thing that was damaged or gone, for the operator."""


class Recovery:
    """One opening of a store: `recover`, once."""

    def __init__(self, directory: DataDirectory, device: Device, catalog: Catalog) -> None:
        self._directory = directory
        self._device = device
        self._catalog = catalog
        self._segments: dict[int, OpenSegment] = {}
        self._damaged: dict[int, int] = {}
        self._stale: list[tuple[bytes, int]] = []
        self.cuts = InvalidationCuts(directory.path)
        """What was invalidated; told of more from then on."""
        self._newer: dict[bytes, bytes] = {}
        self._suspect = False
        self._unknown: set[bytes] = set()
        self._rebuilt = False
        self._from_snapshot = False
        self._generation = 0
        self._index: DurableIndex | None = None

    @property
    def index(self) -> DurableIndex:
        """The open index, once `recover` has returned."""
        assert self._index is not None
        return self._index

    def recover(self, ssd: SsdTier, residency: Residency) -> Recovered:
        """Bring what is stored into memory; delete from the index what cannot be used."""
        if self.cuts.damage:
            self._directory.troubles.append(
                f"{self.cuts.damage}: nobody knows what was invalidated, so headers are not trusted"
            )
        recovered = self._load(self._read(), ssd, residency)
        self.cuts.replace_damaged(recovered.generation)
        # The columns are free now; they were as large as all that the store keeps of them.
        trim_heap()
        return recovered

    def _read(self) -> BlockColumns:
        """The blocks that there may be, from the fastest source that can be trusted."""
        troubles = self._directory.troubles
        probe = None if self._directory.was_clean else Probe(self._directory.index_path)
        try:
            for namespace in self._directory.namespaces():
                self._catalog.restore(namespace)
            self._open_segments()
            try:
                if self._index_is_lost():
                    raise Corrupt(f"the index {self._directory.index_path} is gone")
                if probe is not None and not probe.passed():
                    raise Corrupt("the index cannot be walked by a child process")
                self._index = DurableIndex(self._directory.index_path)
                snapshot = self._from_clean_close()
                if probe is not None and self._index.generation is not None:
                    self._newer = self._by_headers(self._index.generation)
                return self._from_index(self._index) if snapshot is None else snapshot
            except Corrupt as error:
                _log.warning("%s; it is set aside and rebuilt from the headers", error)
                reason = str(error)
        finally:
            if probe is not None:
                probe.close()
        self._stale.clear()
        self._newer.clear()
        self._unknown.clear()
        self._suspect, self._rebuilt = False, True
        records = list(self._by_headers().items())
        self._rewrite(records)
        _log.warning("the index was rebuilt from headers: %d blocks", len(records))
        troubles.append(f"{reason}; it was rebuilt from headers: {len(records)} blocks")
        return self._decoded(records)

    def _index_is_lost(self) -> bool:
        """Whether there is none although there was one: from the first opening on there is, and
        segments and namespaces come later."""
        if (self._directory.index_path / "data.mdb").exists():
            return False
        return bool(self._segments or self._damaged or len(self._catalog))

    def _rewrite(self, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Set the index aside and write a new one."""
        if self._index is not None:
            self._index.close()
            self._index = None
        self._directory.set_index_aside()
        self._index = DurableIndex(self._directory.index_path)
        for start in range(0, len(records), _PUTS_MAX):
            self._index.apply([], records[start : start + _PUTS_MAX])
        # Until here it says that it reaches nothing: a crash costs no block.
        self._index.apply([], [], self._generation)

    def _load(self, found: BlockColumns, ssd: SsdTier, residency: Residency) -> Recovered:
        kept = found.rooted(self._fitting(found) & found.latest_of_slots())
        for at in np.flatnonzero(~kept).tolist():
            self._stale.append((self._key(found, at), int(found.generations[at])))
        self._tell_missing(found)
        columns = found if kept.all() else found.take(np.flatnonzero(kept))
        residency.restore(columns)
        self._adopt_segments(columns, ssd)
        if len(columns):
            self._generation = max(self._generation, int(columns.generations.max()))
        orphans = {key for key, _ in self._stale if self._newer.pop(key, None) is not None}
        # An older record of such a key was passed over, so it must go as well.
        self._stale = [(key, -1 if key in orphans else born) for key, born in self._stale]
        if self._suspect or not self._correct_index():
            # A page with a bad record may have bad neighbours that only a write would find.
            _log.warning("the index is damaged; it is set aside and written anew")
            self._rewrite(self._records_kept())
        return Recovered(
            generation=self._generation,
            blocks=len(columns),
            dropped=len(self._stale) - len(orphans),
            rebuilt=self._rebuilt,
            from_snapshot=self._from_snapshot,
            newer=len(self._newer),
            troubles=tuple(self._directory.troubles),
        )

    def _tell_missing(self, found: BlockColumns) -> None:
        """Blocks that are dropped because something else is missing could come back with it, so
        the index that names them is kept."""
        missing = ~np.isin(found.segments, list(self._segments))
        texts = []
        if missing.any():
            numbers = np.unique(found.segments[missing]).tolist()
            names = ", ".join(map(segment_name, numbers[:5])) + (" ..." if numbers[5:] else "")
            texts.append(f"{len(numbers)} segments are missing or damaged ({names})")
        if self._unknown:
            names = ", ".join(sorted(each.hex() for each in self._unknown)[:5])
            texts.append(f"{len(self._unknown)} namespaces are not known any more ({names})")
        if texts:
            text = (
                f"{'; '.join(texts)}: their blocks are dropped; the index that names them is kept "
                f"in {self._directory.path / ASIDE_NAME}"
            )
            _log.warning("%s", text)
            self._directory.troubles.append(text)
            self._suspect = True

    def _key(self, columns: BlockColumns, at: int) -> bytes:
        entry = self._catalog.numbered(int(columns.namespaces[at]))
        return entry.id + columns.hashes[at, : int(columns.hash_bytes[at])].tobytes()

    def _adopt_segments(self, columns: BlockColumns, ssd: SsdTier) -> None:
        order = np.argsort(columns.segments, kind="stable")
        slots, segments = columns.slots[order], columns.segments[order]
        for number in sorted(self._segments):
            found = self._segments[number]
            first, end = np.searchsorted(segments, [number, number + 1])
            ssd.adopt(number, found.geometry, found.file, slots[first:end])
        for number, nbytes in self._damaged.items():
            ssd.skip(number, nbytes)

    def _records_kept(self) -> list[tuple[bytes, bytes]]:
        """What the index tells of the blocks that were taken, and those it was not told of."""
        left_out = {key for key, _ in self._stale} | self._newer.keys()
        kept: list[tuple[bytes, bytes]] = []
        try:
            for key, value in self.index.records():
                if key not in left_out:
                    kept.append((key, value))
        except Corrupt as error:
            _log.warning("%s; the blocks behind it are lost with the next crash", error)
        return kept + list(self._newer.items())

    @property
    def _is_told(self) -> bool:
        """Whether the index reaches all headers that there are, so that none counts any more that
        was not taken now."""
        reached = self.index.generation
        return reached is not None and (self._from_snapshot or reached >= self._generation)

    def _correct_index(self) -> bool:
        """Have it tell what was taken, no more and no less; False if it refuses. Must be done
        before any slot is written again."""
        if self._newer:
            _log.info("%d blocks are newer than the index", len(self._newer))
        if self._stale:
            _log.warning("%d records were damaged, orphaned or stale: dropped", len(self._stale))
        elif not self._newer and self._is_told:
            return True
        try:
            self.index.apply(self._stale, list(self._newer.items()), self._generation)
        except OSError as error:
            _log.warning("%s", error)
            return False
        return True

    # Sources

    def _from_clean_close(self) -> BlockColumns | None:
        """The snapshot; None if there is none that can be trusted."""
        if self._directory.snapshot_crc is None:
            return None
        path = self._directory.snapshot_path
        try:
            snapshot = read_snapshot(path, self._directory.snapshot_crc, self._snapshot_state())
            numbers = self._numbers(snapshot.namespace_ids)
        except (Corrupt, OSError) as error:
            _log.warning("the snapshot is not used, the index is read instead: %s", error)
            return None
        finally:
            path.unlink(missing_ok=True)
        columns = snapshot.columns
        self._generation, self._from_snapshot = snapshot.generation, True
        return replace(columns, namespaces=numbers[columns.namespaces])

    def _snapshot_state(self) -> SnapshotState:
        return SnapshotState(
            self._directory.store_id,
            self.index.last_txn,
            tuple(
                (number, found.geometry.slot_bytes, found.geometry.slots)
                for number, found in sorted(self._segments.items())
            ),
        )

    def _numbers(self, namespace_ids: Sequence[bytes]) -> NDArray[np.int32]:
        """Their numbers in the catalog. Raises Corrupt if one is unknown."""
        entries = [self._catalog.find(namespace_id) for namespace_id in namespace_ids]
        if None in entries:
            raise Corrupt("a namespace of the snapshot is not there any more")
        return np.array([entry.index for entry in entries if entry is not None], np.int32)

    def _from_index(self, index: DurableIndex) -> BlockColumns:
        # No generation that it has reached may be given out again, nor one of any header.
        reached = index.generation
        if reached is None:
            found = self._segments.values()
            reached = max([0, *(highest_generation(each.file, each.geometry) for each in found)])
        self._generation = max(self._generation, reached)
        if not self._newer:
            return self._decoded(index.records())
        told = (entry for entry in index.records() if entry[0] not in self._newer)
        return self._decoded(itertools.chain(told, self._newer.items()))

    def _by_headers(self, newer_than: int = -1) -> dict[bytes, bytes]:
        """Records by key of blocks that their headers tell of, verified."""
        layouts = {entry.id: entry.layout for entry in self._catalog.entries()}
        scanned = scan_headers(self._segments, layouts, newer_than)
        self._generation = max(self._generation, scanned.generation)
        found = flushed(scanned.records, self._segments, layouts, again=newer_than >= 0)
        # What is newer than an index is newer than all that was invalidated, unless a crash came
        # while it was rebuilt: it reaches nothing then.
        if newer_than <= 0 or not self.cuts.damage:
            found = self.cuts.left(found)
        return {key: record.to_bytes() for key, record in found.items()}

    def _decoded(self, records: Iterable[tuple[bytes, bytes]]) -> BlockColumns:
        decoder = RecordColumns(
            {
                entry.id: NamespaceShape(
                    entry.index, entry.layout.block_bytes, entry.layout.chunk_count
                )
                for entry in self._catalog.entries()
            }
        )
        iterator = iter(records)
        while batch := list(itertools.islice(iterator, _DECODED_AT_ONCE)):
            decoder.add([key for key, _ in batch], [value for _, value in batch])
        self._stale += [(key, -1) for key in decoder.refused]
        if not decoder.damaged:
            ids = {key[:NAMESPACE_ID_BYTES] for key in decoder.refused}
            self._unknown |= {each for each in ids if self._catalog.find(each) is None}
        self._suspect = self._suspect or decoder.damaged
        return decoder.finish()

    def _fitting(self, columns: BlockColumns) -> NDArray[np.bool_]:
        """True for blocks whose segment is there and has slots of their size."""
        if not self._segments:
            return np.zeros(len(columns), np.bool_)
        numbers = sorted(self._segments)
        geometry = [self._segments[number].geometry for number in numbers]
        at = np.searchsorted(numbers, columns.segments).clip(max=len(numbers) - 1)
        wanted = np.zeros(self._catalog.numbers, np.int64)
        for entry in self._catalog.entries():
            wanted[entry.index] = entry.layout.slot_bytes
        fits: NDArray[np.bool_] = np.array(numbers)[at] == columns.segments
        fits &= (columns.slots >= 0) & (columns.slots < np.array([g.slots for g in geometry])[at])
        fits &= wanted[columns.namespaces] == np.array([g.slot_bytes for g in geometry])[at]
        return fits

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
                self._damaged[segment] = 0
                continue
            try:
                geometry = read_superblock(file, segment, name)
            except (Corrupt, OSError) as error:
                _log.warning("%s; the segment is left alone and its blocks are dropped", error)
                self._damaged[segment] = file.nbytes
                file.close()
                continue
            except BaseException:
                file.close()
                self.close()
                raise
            self._segments[segment] = OpenSegment(geometry, file)

    def close(self) -> None:
        """Give everything back after a failure."""
        if self._index is not None:
            self._index.close()
        for found in self._segments.values():
            found.file.close()
        self._segments.clear()
