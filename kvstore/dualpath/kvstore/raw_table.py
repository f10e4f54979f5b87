"""Which file lies where on a raw device: a small table, stored twice. Pure: bytes in, bytes out.

    0        copy A (1 MiB): one page of header, then entries
    1 MiB    copy B
    2 MiB    extents, each 1 MiB-aligned

A change is written to one copy, synced, and then to the other, under the next generation: a crash
leaves one that is whole, and later one of them may rot. The CRC covers the header and the entries
in use.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.transfer.errors import InvalidRequest

RAW_FORMAT = 1
COPIES = 2
COPY_BYTES = 1 << 20
EXTENT_ALIGN_BYTES = 1 << 20
DATA_OFFSET = COPIES * COPY_BYTES
NAME_BYTES_MAX = 48
OWNER_BYTES_MAX = 32

_MAGIC = b"dprawtb\0"
_HEADER = struct.Struct("<8sIIQQ32s")
_ENTRY = struct.Struct("<48sQQ")
_CRC = struct.Struct("<I")
ENTRIES_MAX = (COPY_BYTES - ALIGN_BYTES) // _ENTRY.size

assert _HEADER.size + _CRC.size <= ALIGN_BYTES
assert ALIGN_BYTES % _ENTRY.size == 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a file's bytes are on the device."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RawTable:
    """One generation of the table. `owner` names the store that uses the device."""

    owner: str
    device_bytes: int
    generation: int
    files: dict[str, Extent]

    def to_bytes(self) -> bytes:
        """A copy, padded to whole pages."""
        entries = b"".join(
            _ENTRY.pack(name.encode(), extent.offset, extent.nbytes)
            for name, extent in sorted(self.files.items())
        )
        header = _HEADER.pack(
            _MAGIC,
            RAW_FORMAT,
            len(self.files),
            self.generation,
            self.device_bytes,
            self.owner.encode(),
        )
        crc = _CRC.pack(zlib.crc32(entries, zlib.crc32(header)))
        whole = (header + crc).ljust(ALIGN_BYTES, b"\0") + entries
        return whole.ljust(-(-len(whole) // ALIGN_BYTES) * ALIGN_BYTES, b"\0")

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> RawTable | None:
        """Inverse of `to_bytes`; None if it is damaged or of something else. Raises
        InvalidRequest (`newer_format`)."""
        magic, version, count, generation, device_bytes, owner = _HEADER.unpack_from(data)
        if magic != _MAGIC or count > ENTRIES_MAX:
            return None
        end = ALIGN_BYTES + count * _ENTRY.size
        (crc,) = _CRC.unpack_from(data, _HEADER.size)
        found = zlib.crc32(data[ALIGN_BYTES:end], zlib.crc32(data[: _HEADER.size]))
        if len(data) < end or crc != found:
            return None
        if version > RAW_FORMAT:
            raise InvalidRequest(
                f"the raw device has format {version}, this version reads up to {RAW_FORMAT}; "
                "upgrade dualpath or use another device",
                reason="newer_format",
            )
        files = {}
        for name, offset, nbytes in _ENTRY.iter_unpack(data[ALIGN_BYTES:end]):
            files[name.rstrip(b"\0").decode()] = Extent(offset, nbytes)
        return RawTable(owner.rstrip(b"\0").decode(), device_bytes, generation, files)


def free_offset(used: Iterable[Extent], nbytes: int, device_bytes: int) -> int:
    """The lowest place for `nbytes`; -1 if there is none."""
    at = DATA_OFFSET
    for extent in sorted(used, key=lambda extent: extent.offset):
        if extent.offset - at >= nbytes:
            break
        end = extent.offset + extent.nbytes
        at = max(at, -(-end // EXTENT_ALIGN_BYTES) * EXTENT_ALIGN_BYTES)
    return at if nbytes <= device_bytes - at else -1
