"""The reference device: files of a directory, moved by preadv and pwritev.

Uses O_DIRECT where the file system takes it; else falls back to buffered I/O and says why in
`description`. Owns no buffer, and the threads that move batches: none until the first batch.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.regular_file import open_regular
from dualpath.kvstore.thread_progress import BatchThreads, ThreadProgress
from dualpath.kvstore.transfer_batch import TransferBatch

_PROBE_NAME = ".probe"


class PsyncDevice:
    """Files under one directory; see Device."""

    in_files = True

    def __init__(self, path: str | Path, *, direct: bool = True, read_only: bool = False) -> None:
        """With `read_only` the directory is another's, and must be there. Raises OSError."""
        self._path = Path(path)
        self.remark = ""
        """What `description` says besides."""
        self._threads = BatchThreads()
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
        return f"{self._description}; {self.remark}" if self.remark else self._description

    def create(self, name: str, nbytes: int) -> FdFile:
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
        return FdFile(fd)

    def open(self, name: str) -> FdFile:
        """See Device."""
        return FdFile(open_regular(self._path / name, self._flags))

    def remove(self, name: str) -> None:
        """See Device."""
        (self._path / name).unlink(missing_ok=True)

    def names(self) -> tuple[str, ...]:
        """See Device."""
        return tuple(sorted(p.name for p in self._path.iterdir() if p.name != _PROBE_NAME))

    def close(self) -> None:
        """See Device."""
        self._threads.close()

    def read_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        return self._threads.read(batch)

    def write_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        return self._threads.write(batch)


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
        if entry.is_file(follow_symlinks=False):
            try:
                os.close(os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
            except OSError as error:
                return f"open: {error.strerror}"
            break
    return None
