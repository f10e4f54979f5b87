"""The frame of a file stored as blocks: a fixed head, the file's bytes, zeros up to a full block.

The head names length and SHA-256, so that the file comes back identical or not at all, and two
files under one name are told apart by their first block.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

from dualpath.transfer.errors import Corrupt

FRAMED_FORMAT = "dualpath-file-1"
"""Engine format of namespaces that hold framed files."""
_HEAD = struct.Struct("<8sQ32s")
_MAGIC = b"dpfile01"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileFrame:
    """Length in bytes and SHA-256 of the file."""

    nbytes: int
    sha256: bytes

    HEAD_BYTES = _HEAD.size

    @staticmethod
    def of(file: BinaryIO) -> FileFrame:
        """Read `file` from its start to its end."""
        digest, nbytes = hashlib.sha256(), 0
        file.seek(0)
        while data := file.read(_READ_BYTES):
            digest.update(data)
            nbytes += len(data)
        return FileFrame(nbytes, digest.digest())

    @property
    def framed_bytes(self) -> int:
        """Head and file."""
        return _HEAD.size + self.nbytes

    def head(self) -> bytes:
        """The first HEAD_BYTES of the first block."""
        return _HEAD.pack(_MAGIC, self.nbytes, self.sha256)

    @staticmethod
    def from_head(data: bytes | memoryview) -> FileFrame:
        """Inverse of `head`. Raises Corrupt."""
        magic, nbytes, sha256 = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise Corrupt(f"the first block does not start with a file's head: {magic!r}")
        return FileFrame(nbytes, sha256)
