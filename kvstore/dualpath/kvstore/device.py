"""The device port: where bytes live (`Device`) and how they move (`DeviceFile`).

Contract, held by every implementation and by `check_device` (device_conformance.py)

Who may call
    Any thread. Reads and writes of one file may run at the same time; the caller keeps ranges
    that are being written apart from ranges that are being read.
Alignment
    Offsets, lengths and the addresses of buffers are multiples of ALIGN_BYTES.
Completeness
    `read` fills every buffer or raises; `write` stores every byte or raises. Short transfers
    and interrupted calls are continued inside. Buffers are the caller's again on return.
Durability
    Bytes written survive power loss once a later `sync` of the file has returned. Until then
    any 512-byte sector of them may be old or new. A `sync` that fails says nothing about what
    was written before it, and no later one does: it must be written again. (Linux tells of
    pages that it could not write once, and takes them for clean.) A file is durable, with its
    size, once `create` has returned; its content is zero until written.
Failure
    Everything raises OSError with the errno of the medium (EIO, ENOSPC, ENOENT, EEXIST); an
    end of file inside a read is EIO. In a batch each item fails by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from dualpath.kvstore.transfer_batch import (
    BatchProgress,
    SerialProgress,
    TransferBatch,
    check_batch,
    read_one,
    write_one,
)

ALIGN_BYTES = 4096


class DeviceFile(Protocol):
    """How the bytes of one open file move. See the module docstring."""

    @property
    def nbytes(self) -> int:
        """Size of the file, fixed at its creation."""

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after another, from `offset`."""

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Store the buffers, one after another, at `offset`."""

    def sync(self) -> None:
        """Return once everything written before survives power loss."""

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""


class Device(Protocol):
    """Where bytes live: named, preallocated files. See the module docstring."""

    @property
    def description(self) -> str:
        """How bytes are moved and, after a fallback, why: `psync, O_DIRECT`, ..."""

    @property
    def in_files(self) -> bool:
        """Whether a file of this device is one of a directory, that others may open there."""

    def create(self, name: str, nbytes: int) -> DeviceFile:
        """Make a file of `nbytes`, space allocated, all zero."""

    def open(self, name: str) -> DeviceFile:
        """Open an existing file."""

    def remove(self, name: str) -> None:
        """Forget a file; a missing one is ignored."""

    def names(self) -> tuple[str, ...]:
        """All files, sorted."""

    def close(self) -> None:
        """End the threads and rings that move batches; none may be under way. Idempotent."""

    def read_batch(self, batch: TransferBatch) -> BatchProgress:
        """Start many reads, of files of this device. Raises OSError (EINVAL)."""

    def write_batch(self, batch: TransferBatch) -> BatchProgress:
        """Start many writes, of files of this device. Raises OSError (EINVAL)."""


def check_aligned(offset: int, buffers: Sequence[memoryview], file_bytes: int) -> int:
    """Return the length of a transfer. Raises OSError (EINVAL) if the contract is broken."""
    nbytes = sum(buffer.nbytes for buffer in buffers)
    if offset % ALIGN_BYTES or any(buffer.nbytes % ALIGN_BYTES for buffer in buffers):
        raise OSError(errno.EINVAL, f"transfer at {offset} of {nbytes} bytes is not 4 KiB-aligned")
    if offset < 0 or offset + nbytes > file_bytes:
        raise OSError(errno.EINVAL, f"transfer [{offset}, {offset + nbytes}) of {file_bytes} bytes")
    return nbytes


class MemoryFile:
    """A file of a `MemoryDevice`."""

    __slots__ = ("_data",)

    def __init__(self, data: bytearray) -> None:
        self._data = data

    @property
    def nbytes(self) -> int:
        """See DeviceFile."""
        return len(self._data)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        check_aligned(offset, buffers, len(self._data))
        for buffer in buffers:
            buffer[:] = self._data[offset : offset + buffer.nbytes]
            offset += buffer.nbytes

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        check_aligned(offset, buffers, len(self._data))
        for buffer in buffers:
            self._data[offset : offset + buffer.nbytes] = buffer
            offset += buffer.nbytes

    def sync(self) -> None:
        """See DeviceFile: memory has nothing to wait for."""

    def close(self) -> None:
        """See DeviceFile."""


class MemoryDevice:
    """Files in memory, for tests. `files` may be looked at and damaged."""

    in_files = False

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}

    @property
    def description(self) -> str:
        """See Device."""
        return "memory"

    def create(self, name: str, nbytes: int) -> MemoryFile:
        """See Device."""
        if name in self.files:
            raise FileExistsError(errno.EEXIST, "file exists", name)
        self.files[name] = bytearray(nbytes)
        return MemoryFile(self.files[name])

    def open(self, name: str) -> MemoryFile:
        """See Device."""
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return MemoryFile(self.files[name])

    def remove(self, name: str) -> None:
        """See Device."""
        self.files.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """See Device."""
        return tuple(sorted(self.files))

    def close(self) -> None:
        """See Device: memory has nothing to end."""

    def read_batch(self, batch: TransferBatch) -> SerialProgress:
        """See Device."""
        check_batch(batch, ALIGN_BYTES)
        return SerialProgress(batch, read_one)

    def write_batch(self, batch: TransferBatch) -> SerialProgress:
        """See Device."""
        check_batch(batch, ALIGN_BYTES)
        return SerialProgress(batch, write_one)
