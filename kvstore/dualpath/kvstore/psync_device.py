"""The reference device: files of a directory, moved by preadv and pwritev.

Uses O_DIRECT where the file system takes it; else falls back to buffered I/O and says why in
`description`. Owns no buffer, and the threads that move batches: none until the first batch.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dualpath.kvstore.device import ALIGN_BYTES, check_aligned
from dualpath.kvstore.thread_progress import ThreadProgress
from dualpath.kvstore.transfer_batch import TransferBatch, check_batch, read_one, write_one

_IOV_MAX = 512
_STALLS_MAX = 16
"""Transfers in a row that may make no progress before it is an I/O error."""
_PROBE_NAME = ".probe"
THREADS = 8
"""Transfers of batches that run at the same time, of all batches together."""


class PsyncFile:
    """An open file; see DeviceFile."""

    __slots__ = ("_fd", "_nbytes")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._nbytes = os.fstat(fd).st_size

    @property
    def nbytes(self) -> int:
        """See DeviceFile."""
        return self._nbytes

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        check_aligned(offset, buffers, self._nbytes)
        self._move(offset, buffers, reading=True)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        check_aligned(offset, buffers, self._nbytes)
        self._move(offset, buffers, reading=False)

    def _move(self, offset: int, buffers: Sequence[memoryview], *, reading: bool) -> None:
        """Transfer everything; a short transfer goes on from its last whole 4 KiB."""
        left = list(buffers)
        stalls = 0
        while left:
            batch = left[:_IOV_MAX]
            # PEP 475: the interpreter itself repeats calls that a signal interrupted.
            if reading:
                moved = os.preadv(self._fd, batch, offset)
                if moved == 0:
                    raise OSError(errno.EIO, f"end of file at {offset} of {self._nbytes} bytes")
            else:
                moved = os.pwritev(self._fd, batch, offset)
            whole = moved - moved % ALIGN_BYTES
            stalls = 0 if whole else stalls + 1
            if stalls > _STALLS_MAX:
                raise OSError(errno.EIO, f"no progress at {offset}: {moved} bytes a call")
            offset += whole
            left = _rest(left, whole)

    def sync(self) -> None:
        """See DeviceFile."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """See DeviceFile."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []


class PsyncDevice:
    """Files under one directory; see Device."""

    in_files = True

    def __init__(self, path: str | Path, *, direct: bool = True, read_only: bool = False) -> None:
        """With `read_only` the directory is another's, and must be there. Raises OSError."""
        self._path = Path(path)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dualpath-psync")
        self._flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        if read_only:
            self._path.stat()
        else:
            self._path.mkdir(parents=True, exist_ok=True)
        if not direct:
            self._description = "psync, buffered (O_DIRECT is off in the configuration)"
            return
        refusal = _reading_refusal(self._path) if read_only else _direct_refusal(self._path)
        if refusal is None:
            self._flags |= os.O_DIRECT
            self._description = "psync, O_DIRECT"
        else:
            self._description = f"psync, buffered (the file system refuses O_DIRECT: {refusal})"

    @property
    def description(self) -> str:
        """See Device."""
        return self._description

    def create(self, name: str, nbytes: int) -> PsyncFile:
        """See Device."""
        fd = os.open(self._path / name, self._flags | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            os.fsync(fd)
            sync_directory(self._path)
        except BaseException:
            os.close(fd)
            self.remove(name)
            raise
        return PsyncFile(fd)

    def open(self, name: str) -> PsyncFile:
        """See Device."""
        return PsyncFile(os.open(self._path / name, self._flags))

    def remove(self, name: str) -> None:
        """See Device."""
        (self._path / name).unlink(missing_ok=True)

    def names(self) -> tuple[str, ...]:
        """See Device."""
        return tuple(sorted(p.name for p in self._path.iterdir() if p.name != _PROBE_NAME))

    def close(self) -> None:
        """See Device."""
        self._threads.shutdown(wait=False)

    def read_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        check_batch(batch, ALIGN_BYTES)
        return ThreadProgress(batch, read_one, self._threads, THREADS)

    def write_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        check_batch(batch, ALIGN_BYTES)
        return ThreadProgress(batch, write_one, self._threads, THREADS)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _direct_refusal(path: Path) -> str | None:
    """Why O_DIRECT cannot be used under `path`; None if a write and a read succeed."""
    probe = path / _PROBE_NAME
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT
    try:
        fd = os.open(probe, flags, 0o600)
    except OSError as error:
        return f"open: {error.strerror}"
    try:
        with mmap.mmap(-1, ALIGN_BYTES) as page:
            os.pwritev(fd, [page], 0)
            os.preadv(fd, [page], 0)
    except OSError as error:
        # A full disk refuses the probe for another reason; direct reads still work there.
        return None if error.errno == errno.ENOSPC else f"transfer: {error.strerror}"
    finally:
        os.close(fd)
        probe.unlink(missing_ok=True)
    return None


def _reading_refusal(path: Path) -> str | None:
    """Why files under `path` cannot be opened with O_DIRECT, judged by one that is there."""
    for entry in os.scandir(path):
        if entry.is_file():
            try:
                os.close(os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
            except OSError as error:
                return f"open: {error.strerror}"
            break
    return None
