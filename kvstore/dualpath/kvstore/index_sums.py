"""What the durable index must hold, in two numbers: how many records, and the sum of their hashes;
and how far it reaches.

LMDB checksums nothing. A record has its own CRC, but a damaged page can hide records without a
trace, or bring old ones back. The sums lie in the index itself and change with each transaction,
so whoever walks all records knows whether these are all, and the right ones. Blocks of a later
generation than `generation` are durable by their headers alone until the index is told. Pure.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import xxhash
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import HASH_BYTES_MIN

SUMS_KEY = b"sums"
"""Shorter than the key of any record."""

_SUMS = struct.Struct("<4sQQQ")
_SUMS_1 = struct.Struct("<4sQQ")
_CRC = struct.Struct("<I")
_MAGIC = b"dps2"
_MAGIC_1 = b"dps1"
"""Of format 2: without a generation."""

assert len(SUMS_KEY) < NAMESPACE_ID_BYTES + HASH_BYTES_MIN


def is_record_key(key: bytes) -> bool:
    """Whether an entry of the index is a record of a block."""
    return len(key) >= NAMESPACE_ID_BYTES + HASH_BYTES_MIN


@dataclass(slots=True)
class IndexSums:
    """`total` is the sum of the xxh3-64 of all records, modulo 2**64: the order does not matter,
    and a record that is there twice shows. `generation` None: the index tells of every block, as
    it did up to format 2."""

    records: int = 0
    total: int = 0
    generation: int | None = None

    def add(self, value: bytes) -> None:
        """A record came."""
        self.records += 1
        self.total = self.total + xxhash.xxh3_64_intdigest(value) & 0xFFFF_FFFF_FFFF_FFFF

    def remove(self, value: bytes) -> None:
        """A record left."""
        self.records -= 1
        self.total = self.total - xxhash.xxh3_64_intdigest(value) & 0xFFFF_FFFF_FFFF_FFFF

    def copy(self) -> IndexSums:
        """A copy that goes its own way."""
        return IndexSums(self.records, self.total, self.generation)

    def holds(self, found: IndexSums) -> bool:
        """Whether these are the sums of the records that were found."""
        return (self.records, self.total) == (found.records, found.total)

    def to_bytes(self) -> bytes:
        """The entry under SUMS_KEY."""
        if self.generation is None:
            body = _SUMS_1.pack(_MAGIC_1, self.records, self.total)
        else:
            body = _SUMS.pack(_MAGIC, self.records, self.total, self.generation)
        return body + _CRC.pack(zlib.crc32(body))

    @staticmethod
    def from_bytes(data: bytes) -> IndexSums | None:
        """Inverse; None if it is damaged."""
        for form, wanted in ((_SUMS, _MAGIC), (_SUMS_1, _MAGIC_1)):
            if len(data) == form.size + _CRC.size:
                body, (crc,) = data[: form.size], _CRC.unpack_from(data, form.size)
                magic, *numbers = form.unpack(body)
                return IndexSums(*numbers) if magic == wanted and crc == zlib.crc32(body) else None
        return None
