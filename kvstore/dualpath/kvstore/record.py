"""The durable facts of one block, as bytes.

The same encoding is the value in the index and, padded to HEADER_BYTES, the header beside the
data; so the index can be rebuilt from the headers. Little endian, ends with a CRC-32 of all that
precedes it. Knows nothing of files.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.layout import CHUNKS_PER_BLOCK_MAX
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import HASH_BYTES_MAX
from dualpath.transfer.errors import Corrupt

HEADER_BYTES = 1024
WRITER_BYTES_MAX = 96

RECORD_MAGIC = b"dpb1"
_FIXED = struct.Struct("<4sBBBBIIIQd16s")
RECORD_FIELDS = np.dtype(
    [
        ("magic", "V4"),
        ("hash_bytes", "u1"),
        ("parent_bytes", "u1"),
        ("writer_bytes", "u1"),
        ("chunks", "u1"),
        ("length", "<u4"),
        ("segment", "<u4"),
        ("slot", "<u4"),
        ("generation", "<u8"),
        ("sealed_unix_s", "<f8"),
        ("namespace", "<u8", 2),
    ]
)
"""The fixed part of a record, for decoding many at once; hash, parent, writer, checksums follow."""
_CRC = struct.Struct("<I")

assert RECORD_FIELDS.itemsize == _FIXED.size
assert (
    _FIXED.size + 2 * HASH_BYTES_MAX + WRITER_BYTES_MAX + 8 * CHUNKS_PER_BLOCK_MAX + _CRC.size
    <= HEADER_BYTES
)


def recorded_writer(writer: str) -> str:
    """What a record keeps of a writer's name."""
    return writer.encode()[:WRITER_BYTES_MAX].decode(errors="ignore")


def encoded_length(data: bytes) -> int:
    """How many bytes of a header the record in it has, if it is one at all."""
    hash_len, parent_len, writer_len, chunks = data[4:8]
    return _FIXED.size + hash_len + parent_len + writer_len + 8 * chunks + _CRC.size


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """Where a sealed block lies and what its bytes are.

    `length` is the bytes of the Full Block; `generation` rises with every seal of the store;
    `sealed_unix_s` is for people; `writer` is the owner who sealed it, cut at WRITER_BYTES_MAX.
    """

    namespace_id: bytes
    hash: bytes
    parent: bytes
    length: int
    segment: int
    slot: int
    generation: int
    checksums: tuple[int, ...]
    writer: str
    sealed_unix_s: float

    @property
    def key(self) -> bytes:
        """The store key: namespace id, then hash."""
        return self.namespace_id + self.hash

    def to_bytes(self) -> bytes:
        """The encoding, with its CRC."""
        writer = recorded_writer(self.writer).encode()
        body = b"".join(
            (
                _FIXED.pack(
                    RECORD_MAGIC,
                    len(self.hash),
                    len(self.parent),
                    len(writer),
                    len(self.checksums),
                    self.length,
                    self.segment,
                    self.slot,
                    self.generation,
                    self.sealed_unix_s,
                    self.namespace_id,
                ),
                self.hash,
                self.parent,
                writer,
                struct.pack(f"<{len(self.checksums)}Q", *self.checksums),
            )
        )
        return body + _CRC.pack(zlib.crc32(body))

    def to_header(self) -> bytes:
        """The encoding, padded with zeros to HEADER_BYTES."""
        return self.to_bytes().ljust(HEADER_BYTES, b"\0")

    @staticmethod
    def from_bytes(data: bytes) -> BlockRecord:
        """Inverse of both; what follows the CRC is ignored. Raises Corrupt."""
        if len(data) < _FIXED.size + _CRC.size or data[:4] != RECORD_MAGIC:
            raise Corrupt(f"not a block record of this version: {data[:8]!r}")
        fixed = _FIXED.unpack_from(data)
        _, hash_len, parent_len, writer_len, chunks = fixed[:5]
        end = _FIXED.size + hash_len + parent_len + writer_len + 8 * chunks
        if end + _CRC.size > len(data):
            raise Corrupt(f"block record of {end + _CRC.size} bytes is cut at {len(data)}")
        (crc,) = _CRC.unpack_from(data, end)
        if crc != zlib.crc32(data[:end]):
            raise Corrupt("block record: the CRC does not match")
        at = _FIXED.size
        hash_end, parent_end = at + hash_len, at + hash_len + parent_len
        writer_end = parent_end + writer_len
        return BlockRecord(
            namespace_id=fixed[10][:NAMESPACE_ID_BYTES],
            hash=data[at:hash_end],
            parent=data[hash_end:parent_end],
            length=fixed[5],
            segment=fixed[6],
            slot=fixed[7],
            generation=fixed[8],
            checksums=struct.unpack_from(f"<{chunks}Q", data, writer_end),
            writer=data[parent_end:writer_end].decode(errors="replace"),
            sealed_unix_s=fixed[9],
        )
