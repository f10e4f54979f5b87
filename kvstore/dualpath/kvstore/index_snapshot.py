"""The snapshot of the index: how a million blocks are known again within a second or two.

Written at a clean close, beside the durable index, which stays the truth: a snapshot is taken only
if it was written by the close that marked the directory clean, for the same store, the same last
transaction of the index and the same segments, and if every checksum in it holds. Anything else
means to read the index. Owns the format of the file:

    8 bytes   "dpsnap1\\n"
    u32, u32  bytes of the header, CRC-32 of the header
    header    JSON: format, store, last_txn, generation, blocks, namespaces (ids in hex), segments
              ([number, slot_bytes, slots]), columns ([name, type, items, offset, nbytes, xxh3-64])
    columns   little endian, each at a multiple of 64 bytes from the start of the file
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.psync_device import sync_directory
from dualpath.kvstore.regular_file import open_regular
from dualpath.kvstore.store_api import HASH_BYTES_MAX
from dualpath.transfer.errors import Corrupt
from numpy.typing import NDArray

SNAPSHOT_FORMAT = 1
SNAPSHOT_NAME = "index.snapshot"

_MAGIC = b"dpsnap1\n"
_LENGTHS = struct.Struct("<II")
_ALIGN_BYTES = 64
_HEADER_BYTES_MAX = 64 << 20

_TYPES: dict[str, str] = {
    "namespaces": "<i4",
    "hashes": "|u1",
    "hash_bytes": "|u1",
    "parents": "<i4",
    "segments": "<i4",
    "slots": "<i4",
    "generations": "<i8",
    "used": "<i8",
    "chunks": "<i4",
    "checksums": "<u8",
}
assert list(_TYPES) == [field.name for field in fields(BlockColumns)]


@dataclass(frozen=True, slots=True)
class SnapshotState:
    """What a snapshot belongs to. `segments` is (number, slot_bytes, slots), in order."""

    store_id: str
    last_txn: int
    segments: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class IndexSnapshot:
    """`columns.namespaces` are positions in `namespace_ids`. `generation` is the store's last."""

    state: SnapshotState
    generation: int
    namespace_ids: tuple[bytes, ...]
    columns: BlockColumns


def write_snapshot(path: Path, snapshot: IndexSnapshot) -> int:
    """Write durably in place of the former one; return the CRC-32 of its header, by which the
    clean flag names it. Raises OSError."""
    columns = [
        np.ascontiguousarray(getattr(snapshot.columns, name), kind) for name, kind in _TYPES.items()
    ]
    header, offsets = _header(snapshot, columns)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(_MAGIC + _LENGTHS.pack(len(header), zlib.crc32(header)) + header)
        for column, offset in zip(columns, offsets, strict=True):
            file.seek(offset)
            file.write(_bytes_of(column))
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_directory(path.parent)
    return zlib.crc32(header)


def _header(snapshot: IndexSnapshot, columns: Sequence[NDArray[Any]]) -> tuple[bytes, list[int]]:
    """The encoded header, padded to a fixed length, and the offset of each column."""
    state = snapshot.state
    content: dict[str, Any] = {
        "format": SNAPSHOT_FORMAT,
        "store": state.store_id,
        "last_txn": state.last_txn,
        "generation": snapshot.generation,
        "blocks": len(snapshot.columns),
        "namespaces": [namespace_id.hex() for namespace_id in snapshot.namespace_ids],
        "segments": state.segments,
        "columns": [
            [
                name,
                column.dtype.str,
                column.size,
                0,
                column.nbytes,
                f"{xxh3_64(_bytes_of(column)):016x}",
            ]
            for name, column in zip(_TYPES, columns, strict=True)
        ],
    }
    # Offsets depend on the header's length, so it is padded to one that is known before.
    nbytes = len(json.dumps(content)) + 20 * len(columns)
    at = _aligned(len(_MAGIC) + _LENGTHS.size + nbytes)
    offsets = []
    for entry in content["columns"]:
        entry[3] = at
        offsets.append(at)
        at = _aligned(at + entry[4])
    return json.dumps(content).encode().ljust(nbytes), offsets


def _bytes_of(column: NDArray[Any]) -> memoryview:
    return column.reshape(-1).view(np.uint8).data


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN_BYTES) * _ALIGN_BYTES


def read_snapshot(path: Path, header_crc: int, state: SnapshotState) -> IndexSnapshot:
    """Read and check. Raises Corrupt, also where it is another's; OSError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        header = _read_header(file, path, header_crc)
        found = SnapshotState(
            str(header.get("store")),
            int(header.get("last_txn", -1)),
            tuple((int(a), int(b), int(c)) for a, b, c in header.get("segments", ())),
        )
        if header.get("format") != SNAPSHOT_FORMAT or found != state:
            raise Corrupt(f"{path} does not belong to this state of the index")
        try:
            columns = {entry[0]: _read_column(file, path, entry) for entry in header["columns"]}
            namespace_ids = tuple(bytes.fromhex(text) for text in header["namespaces"])
            blocks, generation = int(header["blocks"]), int(header["generation"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Corrupt(f"{path}: the header makes no sense: {error}") from error
    return IndexSnapshot(
        state, generation, namespace_ids, _columns(path, columns, blocks, len(namespace_ids))
    )


def check_snapshot(path: Path, header_crc: int | None = None) -> int:
    """Verify every byte of a snapshot; return how many blocks it has. For a check of files that
    nobody uses; with `header_crc` it must be that one. Raises Corrupt, OSError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        header = _read_header(file, path, header_crc)
        end = file.tell()
        for entry in header.get("columns", ()):
            file.seek(end)
            if any(file.read(max(0, entry[3] - end))):
                raise Corrupt(f"{path}: bytes between the columns are not zero")
            _read_column(file, path, entry)
            end = entry[3] + entry[4]
        if file.seek(0, os.SEEK_END) > end:
            raise Corrupt(f"{path} is longer than its columns")
    return int(header.get("blocks", 0))


def store_id_of(path: Path) -> str:
    """The id of the store that wrote it, by a header whose CRC holds. Raises Corrupt, OSError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        return str(_read_header(file, path, None).get("store", ""))


def _read_header(file: BinaryIO, path: Path, header_crc: int | None) -> dict[str, Any]:
    start = file.read(len(_MAGIC) + _LENGTHS.size)
    if len(start) < len(_MAGIC) + _LENGTHS.size or not start.startswith(_MAGIC):
        raise Corrupt(f"{path} is not a snapshot of this version")
    nbytes, crc = _LENGTHS.unpack_from(start, len(_MAGIC))
    if header_crc not in (None, crc) or nbytes > _HEADER_BYTES_MAX:
        raise Corrupt(f"{path} is not the snapshot of the last clean close")
    data = file.read(nbytes)
    if len(data) != nbytes or zlib.crc32(data) != crc:
        raise Corrupt(f"{path}: the CRC of the header does not match")
    header = json.loads(data)
    if not isinstance(header, dict):
        raise Corrupt(f"{path}: the header is no object")
    return header


def _read_column(file: BinaryIO, path: Path, entry: Sequence[Any]) -> NDArray[Any]:
    name, kind, items, offset, nbytes, checksum = entry
    dtype = np.dtype(_TYPES[name])
    if dtype.str != np.dtype(kind).str or items * dtype.itemsize != nbytes:
        raise Corrupt(f"{path}: column {name} is of type {kind}, {nbytes} bytes")
    if nbytes > os.fstat(file.fileno()).st_size:
        raise Corrupt(f"{path} is cut: column {name} has {nbytes} bytes")
    column = np.empty(items, dtype)
    view = _bytes_of(column)
    file.seek(offset)
    if file.readinto(view) != nbytes:  # type: ignore[attr-defined]
        raise Corrupt(f"{path} is cut in column {name}")
    if f"{xxh3_64(view):016x}" != checksum:
        raise Corrupt(f"{path}: the checksum of column {name} does not match")
    return column.astype(dtype.newbyteorder("="), copy=False)


def _columns(
    path: Path, found: Mapping[str, NDArray[Any]], blocks: int, namespaces: int
) -> BlockColumns:
    """The columns, if they fit each other."""
    if set(found) != set(_TYPES):
        raise Corrupt(f"{path} has the columns {sorted(found)}")
    single = {name: column for name, column in found.items() if name not in ("hashes", "checksums")}
    fits = all(len(column) == blocks for column in single.values())
    if not fits or found["hashes"].size != blocks * HASH_BYTES_MAX:
        raise Corrupt(f"{path}: not all columns have {blocks} blocks")
    inside = (
        ((found["namespaces"] >= 0) & (found["namespaces"] < namespaces)).all()
        and ((found["parents"] >= -1) & (found["parents"] < blocks)).all()
        and (found["hash_bytes"] <= HASH_BYTES_MAX).all()
        and (found["chunks"] >= 0).all()
        and int(found["chunks"].sum()) == len(found["checksums"])
    )
    if not inside:
        raise Corrupt(f"{path}: the columns do not fit each other")
    return BlockColumns(**{**found, "hashes": found["hashes"].reshape(blocks, HASH_BYTES_MAX)})
