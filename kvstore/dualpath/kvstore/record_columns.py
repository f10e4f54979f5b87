"""Records of the durable index, decoded in bulk: a million in seconds, not a minute.

Owns the packed decoding of what `record.BlockRecord` writes, thousands of records at once and
without an object for each. Guarantees that a record is taken only if its CRC holds, its key is
the one it lies under, and its namespace and geometry are those that were opened. Knows no files.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.block_table import GONE, NO_ROW
from dualpath.kvstore.key_index import new_key_index
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.record import RECORD_FIELDS, RECORD_MAGIC
from dualpath.kvstore.store_api import HASH_BYTES_MAX
from numpy.typing import NDArray

_HEAD_BYTES = 8
"""Magic and the four lengths: records with the same head have the same layout."""
_CRC_BYTES = 4
_CRC_RESIDUE = 0x2144DF1C
"""CRC-32 of anything that is followed by its own CRC-32."""

assert zlib.crc32(b"any" + zlib.crc32(b"any").to_bytes(4, "little")) == _CRC_RESIDUE


@dataclass(frozen=True, slots=True)
class NamespaceShape:
    """What a record must agree with: its namespace's number and the geometry of its blocks."""

    number: int
    block_bytes: int
    chunks: int


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Columns of some records; parents by their hashes."""

    namespaces: NDArray[np.int32]
    hashes: NDArray[np.uint8]
    hash_bytes: NDArray[np.uint8]
    parent_hashes: NDArray[np.uint8]
    parent_bytes: NDArray[np.uint8]
    segments: NDArray[np.int32]
    slots: NDArray[np.int32]
    generations: NDArray[np.int64]
    chunks: NDArray[np.int32]
    checksums: NDArray[np.uint64]


class RecordColumns:
    """See the module docstring. `add` batches, then `finish`."""

    def __init__(self, namespaces: Mapping[bytes, NamespaceShape]) -> None:
        self._namespaces = namespaces
        self._parts: list[_Part] = []
        self.refused: list[bytes] = []
        """Keys of records that were not taken."""
        self.damaged = False
        """Whether one of them was damaged, not only unknown."""

    def add(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Decode a batch."""
        by_layout: dict[tuple[int, bytes], list[int]] = {}
        for index, value in enumerate(values):
            by_layout.setdefault((len(value), value[:_HEAD_BYTES]), []).append(index)
        for (nbytes, head), members in by_layout.items():
            taken = np.zeros(len(members), np.bool_)
            if _fits_layout(nbytes, head):
                data = [values[index] for index in members]
                part_keys = [keys[index] for index in members]
                taken = self._add_alike(part_keys, data, head)
            else:
                self.damaged = True
            self.refused += [keys[members[at]] for at in np.flatnonzero(~taken).tolist()]

    def _add_alike(
        self, keys: Sequence[bytes], values: Sequence[bytes], head: bytes
    ) -> NDArray[np.bool_]:
        """Decode records of one layout; True for those that were taken."""
        count = len(values)
        hash_bytes, parent_bytes, writer_bytes, chunks = head[4:]
        rows = np.frombuffer(b"".join(values), np.uint8).reshape(count, -1)
        fixed = np.ascontiguousarray(rows[:, : RECORD_FIELDS.itemsize]).view(RECORD_FIELDS)[:, 0]
        at = RECORD_FIELDS.itemsize
        parent_at = at + hash_bytes
        checksums_at = parent_at + parent_bytes + writer_bytes
        end = checksums_at + 8 * chunks
        checks = np.fromiter(map(zlib.crc32, values), np.uint32, count)
        whole = checks == _CRC_RESIDUE
        self.damaged |= not whole.all()
        key_bytes = NAMESPACE_ID_BYTES + hash_bytes
        at_key = [key if len(key) == key_bytes else bytes(key_bytes) for key in keys]
        stored = np.frombuffer(b"".join(at_key), np.uint8).reshape(count, -1)
        ids = np.ascontiguousarray(stored[:, :NAMESPACE_ID_BYTES]).view("<u8")
        taken = whole & (ids == fixed["namespace"]).all(axis=1)
        taken &= (stored[:, NAMESPACE_ID_BYTES:] == rows[:, at:parent_at]).all(axis=1)
        numbers = self._numbers(fixed, chunks, taken)
        taken = numbers >= 0
        self._parts.append(
            _Part(
                namespaces=numbers[taken],
                hashes=_widened(rows[taken, at:parent_at]),
                hash_bytes=np.full(int(taken.sum()), hash_bytes, np.uint8),
                parent_hashes=_widened(rows[taken, parent_at : parent_at + parent_bytes]),
                parent_bytes=np.full(int(taken.sum()), parent_bytes, np.uint8),
                segments=fixed["segment"][taken].astype(np.int32),
                slots=fixed["slot"][taken].astype(np.int32),
                generations=fixed["generation"][taken].astype(np.int64),
                chunks=np.full(int(taken.sum()), chunks, np.int32),
                checksums=np.ascontiguousarray(rows[taken, checksums_at:end])
                .view("<u8")
                .astype(np.uint64)
                .reshape(-1),
            )
        )
        return taken

    def _numbers(
        self, fixed: NDArray[np.void], chunks: int, taken: NDArray[np.bool_]
    ) -> NDArray[np.int32]:
        """The number of each record's namespace; -1 where it does not fit or is not taken."""
        numbers = np.full(len(fixed), -1, np.int32)
        words = fixed["namespace"]
        left = np.flatnonzero(taken)
        while len(left):
            first = words[left[0]]
            same = (words[left] == first).all(axis=1)
            shape = self._namespaces.get(first.tobytes())
            if shape is not None and shape.chunks == chunks:
                fits = left[same & (fixed["length"][left] == shape.block_bytes)]
                numbers[fits] = shape.number
            left = left[~same]
        return numbers

    def finish(self) -> BlockColumns:
        """All blocks in the order of their seals, each with its parent."""
        parts = self._parts or [_NO_PART]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in _Part.__slots__
        }
        self._parts.clear()
        hashes, hash_bytes = joined["hashes"], joined["hash_bytes"]
        rows = len(hash_bytes)
        parents = np.full(rows, NO_ROW, np.int32)
        if rows:
            index = new_key_index()
            index.bind(joined["namespaces"], hashes, hash_bytes, parents)
            index.put_first(rows)
            found = np.empty(rows, np.int32)
            index.find_parents(joined["parent_hashes"], joined["parent_bytes"], found)
            child = joined["parent_bytes"] > 0
            parents = np.where(child, np.where(found < 0, GONE, found), NO_ROW).astype(np.int32)
        columns = BlockColumns(
            namespaces=joined["namespaces"],
            hashes=hashes,
            hash_bytes=hash_bytes,
            parents=parents,
            segments=joined["segments"],
            slots=joined["slots"],
            generations=joined["generations"],
            used=joined["generations"],
            chunks=joined["chunks"],
            checksums=joined["checksums"],
        )
        return columns.take(np.argsort(columns.generations, kind="stable"))


def _fits_layout(nbytes: int, head: bytes) -> bool:
    if len(head) < _HEAD_BYTES or head[:4] != RECORD_MAGIC:
        return False
    hash_bytes, parent_bytes, writer_bytes, chunks = head[4:]
    wanted = RECORD_FIELDS.itemsize + hash_bytes + parent_bytes + writer_bytes + 8 * chunks
    return max(hash_bytes, parent_bytes) <= HASH_BYTES_MAX and wanted + _CRC_BYTES == nbytes


def _widened(hashes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wide = np.zeros((len(hashes), HASH_BYTES_MAX), np.uint8)
    wide[:, : hashes.shape[1]] = hashes
    return wide


_NO_PART = _Part(
    namespaces=np.empty(0, np.int32),
    hashes=np.empty((0, HASH_BYTES_MAX), np.uint8),
    hash_bytes=np.empty(0, np.uint8),
    parent_hashes=np.empty((0, HASH_BYTES_MAX), np.uint8),
    parent_bytes=np.empty(0, np.uint8),
    segments=np.empty(0, np.int32),
    slots=np.empty(0, np.int32),
    generations=np.empty(0, np.int64),
    chunks=np.empty(0, np.int32),
    checksums=np.empty(0, np.uint64),
)
