"""A data directory that indexes a million blocks, made in seconds and without their bytes.

Chains of random hashes in one namespace of blocks of two chunks. Namespace, segments and records
are written by the store's own code, as a daemon that was killed would have left them. The blocks'
bytes are zeros in sparse files, with the checksums of zeros: a reader finds every block intact.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dualpath.kvstore.block_store import StoreConfig
from dualpath.kvstore.checksum import of_block
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.layout import ALIGN_BYTES, CHUNK_BYTES_MIN, KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.record import RECORD_FIELDS, RECORD_MAGIC
from dualpath.kvstore.segment import SegmentGeometry, write_superblock
from dualpath.kvstore.ssd_tier import segment_name
from numpy.typing import NDArray

CHAIN_BLOCKS = 1000
DRAM_BYTES = 32 << 20
_TURN_BLOCKS = 40
"""Chains grow in turns of so many blocks, as those of many clients at once do."""
_SLOTS = 1 << 14
"""Slots of a segment."""
_LAYOUT = KVLayout(
    layers=1, block_tokens=16, layer_bytes=CHUNK_BYTES_MIN + ALIGN_BYTES, dtype="bfloat16"
)
_PUTS = 1 << 16
_HASH_BYTES = 32
_SEED = 20261122


@dataclass(frozen=True, slots=True)
class IndexFixture:
    """What was made. `hashes` has one row a block, chain after chain."""

    path: Path
    namespace: Namespace
    hashes: NDArray[np.uint8]
    disk_bytes: int

    @property
    def chains(self) -> int:
        """How many chains there are, of CHAIN_BLOCKS each."""
        return len(self.hashes) // CHAIN_BLOCKS

    @property
    def config(self) -> StoreConfig:
        """With which to open it in this process."""
        return StoreConfig(disk_bytes=self.disk_bytes, dram_bytes=DRAM_BYTES, prefault=False)

    def chain(self, number: int) -> bytes:
        """The packed hashes of a chain."""
        start = number * CHAIN_BLOCKS
        return self.hashes[start : start + CHAIN_BLOCKS].tobytes()


def make_index(path: Path, blocks: int) -> IndexFixture:
    """Make the directory; `blocks` is a multiple of CHAIN_BLOCKS."""
    assert blocks % CHAIN_BLOCKS == 0, blocks
    namespace = Namespace(model="bench-index", layout=_LAYOUT)
    hashes = np.random.default_rng(_SEED).integers(0, 256, (blocks, _HASH_BYTES), np.uint8)
    directory = DataDirectory(path)
    try:
        directory.save_namespace(namespace)
        geometry = SegmentGeometry(_LAYOUT.slot_bytes, _SLOTS)
        segments = -(-blocks // geometry.slots)
        for number in range(segments):
            _make_segment(directory.segments_path, number, geometry)
        _write_records(directory.index_path, namespace, hashes, geometry.slots)
    finally:
        directory.close()
    return IndexFixture(path, namespace, hashes, (segments + 1) * geometry.file_bytes)


def _make_segment(folder: Path, number: int, geometry: SegmentGeometry) -> None:
    name = segment_name(number)
    with (folder / name).open("wb") as sparse:
        sparse.truncate(geometry.file_bytes)
    device = PsyncDevice(folder, direct=False)
    file = device.open(name)
    try:
        write_superblock(file, number, geometry)
    finally:
        file.close()
        device.close()


def _write_records(path: Path, namespace: Namespace, hashes: NDArray[np.uint8], slots: int) -> None:
    blocks = len(hashes)
    # Sealed in turns: block i of the order of seals is `sealed[i]`.
    chain, inside = np.divmod(np.arange(blocks), CHAIN_BLOCKS)
    sealed = np.lexsort((inside, chain, inside // _TURN_BLOCKS))
    place = np.empty(blocks, np.int64)
    place[sealed] = np.arange(blocks)
    records: list[tuple[bytes, bytes]] = []
    for is_root in (True, False):
        chosen = np.flatnonzero((inside == 0) == is_root)
        records += _encoded(namespace, hashes, chosen, place[chosen], slots, is_root=is_root)
    records.sort()
    index = DurableIndex(path)
    try:
        for start in range(0, blocks, _PUTS):
            index.apply([], records[start : start + _PUTS], blocks)
    finally:
        index.close()


def _encoded(
    namespace: Namespace,
    hashes: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    place: NDArray[np.int64],
    slots: int,
    *,
    is_root: bool,
) -> list[tuple[bytes, bytes]]:
    """Records as `BlockRecord.to_bytes` makes them, and their keys."""
    sums = of_block(bytes(namespace.layout.slot_bytes), namespace.layout)
    fixed = np.zeros(len(chosen), RECORD_FIELDS)
    fixed["magic"] = np.void(RECORD_MAGIC)
    fixed["hash_bytes"] = _HASH_BYTES
    fixed["parent_bytes"] = 0 if is_root else _HASH_BYTES
    fixed["chunks"] = len(sums)
    fixed["length"] = namespace.layout.block_bytes
    fixed["segment"], fixed["slot"] = place // slots, place % slots
    fixed["generation"] = place + 1
    fixed["namespace"] = np.frombuffer(namespace.id, "<u8")
    parts = [fixed.view(np.uint8).reshape(len(chosen), -1), hashes[chosen]]
    if not is_root:
        parts.append(hashes[chosen - 1])
    parts.append(
        np.tile(np.frombuffer(np.array(sums, "<u8").tobytes(), np.uint8), (len(chosen), 1))
    )
    data = np.hstack(parts)
    size = data.shape[1]
    body, namespace_id = data.tobytes(), namespace.id
    keys = hashes[chosen].tobytes()
    records = []
    for at in range(len(chosen)):
        value = body[at * size : (at + 1) * size]
        key = namespace_id + keys[at * _HASH_BYTES : (at + 1) * _HASH_BYTES]
        records.append((key, value + zlib.crc32(value).to_bytes(4, "little")))
    return records
