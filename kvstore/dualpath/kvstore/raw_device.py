"""Files on a raw block device, or in one large file that stands for it: extents and a table.

No file system between: nothing to fragment, no metadata to sync. Owns the descriptor, a lock that
keeps other processes out, and the table (raw_table.py), which is written before a change of it
counts. An extent is used again only after its file was removed and closed. Refuses a device that
is neither blank nor its store's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from dataclasses import replace
from pathlib import Path

from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.raw_table import (
    COPIES,
    COPY_BYTES,
    DATA_OFFSET,
    ENTRIES_MAX,
    NAME_BYTES_MAX,
    Extent,
    RawTable,
    free_offset,
)
from dualpath.kvstore.segment import page_buffer
from dualpath.kvstore.thread_progress import BatchThreads, ThreadProgress
from dualpath.kvstore.transfer_batch import TransferBatch
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable

_BLKZEROOUT = 0x127F
_ZERO_BYTES = 1 << 20


class RawDevice:
    """See the module docstring, and Device."""

    def __init__(
        self, path: str | Path, *, owner: str, direct: bool = True, read_only: bool = False
    ) -> None:
        """`owner` is the id of the store. With `read_only` nothing is ever written. Raises
        OSError, InvalidRequest (not blank, another store's, too small), Unavailable (in use),
        Corrupt (truncated, or read-only and blank)."""
        self._path = Path(path)
        self.remark = ""
        self._threads = BatchThreads()
        self._lock = threading.Lock()
        self._fd, self._is_block, how = _opened(self._path, direct=direct, read_only=read_only)
        self._description = f"psync on {'block device' if self._is_block else 'file'}, {how}"
        self._open: dict[int, int] = {}
        """Open handles, by the offset of their extent."""
        self._removed: set[Extent] = set()
        try:
            self._nbytes = os.lseek(self._fd, 0, os.SEEK_END)
            if self._nbytes < DATA_OFFSET + COPY_BYTES:
                raise InvalidRequest(
                    f"{self._path} has {self._nbytes} bytes; a raw device needs at least "
                    f"{DATA_OFFSET + COPY_BYTES}"
                )
            self._table = self._load(owner, read_only=read_only)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def description(self) -> str:
        """See Device."""
        return f"{self._description}; {self.remark}" if self.remark else self._description

    @property
    def in_files(self) -> bool:
        """See Device."""
        return False

    @property
    def capacity_bytes(self) -> int:
        """Bytes for files, all together."""
        return self._nbytes - DATA_OFFSET

    def create(self, name: str, nbytes: int) -> FdFile:
        """See Device."""
        if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, f"names have 1..{NAME_BYTES_MAX} bytes", name)
        with self._lock:
            files = self._table.files
            if name in files:
                raise FileExistsError(errno.EEXIST, "file exists", name)
            used = [*files.values(), *self._removed]
            offset = free_offset(used, nbytes, self._nbytes)
            if offset < 0 or len(files) >= ENTRIES_MAX:
                raise OSError(
                    errno.ENOSPC, f"no {nbytes} bytes in one piece are free on {self._path}", name
                )
            extent = Extent(offset, nbytes)
            self._clear(extent)
            self._store({**files, name: extent})
            return self._handle(extent)

    def open(self, name: str) -> FdFile:
        """See Device."""
        with self._lock:
            extent = self._table.files.get(name)
            if extent is None:
                raise FileNotFoundError(errno.ENOENT, "no such file", name)
            return self._handle(extent)

    def remove(self, name: str) -> None:
        """See Device."""
        with self._lock:
            files = dict(self._table.files)
            extent = files.pop(name, None)
            if extent is None:
                return
            self._store(files)
            if self._open.get(extent.offset):
                self._removed.add(extent)

    def names(self) -> tuple[str, ...]:
        """See Device."""
        with self._lock:
            return tuple(sorted(self._table.files))

    def close(self) -> None:
        """See Device. Lets other processes use the device once all files are closed too."""
        self._threads.close()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def read_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        return self._threads.read(batch)

    def write_batch(self, batch: TransferBatch) -> ThreadProgress:
        """See Device."""
        return self._threads.write(batch)

    def _handle(self, extent: Extent) -> FdFile:
        self._open[extent.offset] = self._open.get(extent.offset, 0) + 1
        return FdFile(
            os.dup(self._fd), extent.offset, extent.nbytes, on_closed=lambda: self._closed(extent)
        )

    def _closed(self, extent: Extent) -> None:
        with self._lock:
            self._open[extent.offset] -= 1
            if self._open[extent.offset] == 0:
                del self._open[extent.offset]
                self._removed.discard(extent)

    def _load(self, owner: str, *, read_only: bool) -> RawTable:
        copies: list[RawTable | None] = []
        blank = True
        for number in range(COPIES):
            buffer = page_buffer(COPY_BYTES)
            self._move(number * COPY_BYTES, buffer, reading=True)
            blank = blank and not any(buffer[:ALIGN_BYTES])
            copies.append(RawTable.from_bytes(buffer))
        found = [table for table in copies if table is not None]
        if not found:
            if read_only and blank:
                raise Corrupt(f"{self._path} is blank; name the device of store {owner}")
            return self._format(owner, blank=blank)
        table = max(found, key=lambda table: table.generation)
        if table.owner != owner:
            raise InvalidRequest(
                f"{self._path} belongs to store {table.owner}, not to {owner}; name the right "
                "device, or wipe it (`blkdiscard`, or zeros over its first 2 MiB)"
            )
        if table.device_bytes > self._nbytes:
            raise Corrupt(
                f"{self._path} has {self._nbytes} bytes, its table was written for "
                f"{table.device_bytes}: it was truncated"
            )
        return table

    def _format(self, owner: str, *, blank: bool) -> RawTable:
        if not blank:
            raise InvalidRequest(
                f"{self._path} is neither blank nor a device of a store: if nothing on it is "
                "needed, wipe it (`blkdiscard`, or zeros over its first 2 MiB)"
            )
        self._table = RawTable(owner, self._nbytes, 0, {})
        self._store({})
        return self._table

    def _store(self, files: dict[str, Extent]) -> None:
        old = self._table
        new = RawTable(old.owner, self._nbytes, old.generation + 1, files)
        data = new.to_bytes()
        buffer = page_buffer(len(data))
        buffer[:] = data
        # One copy is whole at any time; in the end both are, so that one of them may rot.
        for number in range(new.generation, new.generation + COPIES):
            try:
                self._move(number % COPIES * COPY_BYTES, buffer, reading=False)
                os.fdatasync(self._fd)
            except OSError:
                if number > new.generation:
                    # The next change begins with this copy: the other one is whole.
                    self._table = replace(old, generation=new.generation)
                raise
        self._table = new

    def _clear(self, extent: Extent) -> None:
        """Zeros over an extent, durable."""
        if self._is_block and self._zeroed(extent):
            return
        zeros = page_buffer(_ZERO_BYTES)
        for start in range(0, extent.nbytes, _ZERO_BYTES):
            part = zeros[: min(_ZERO_BYTES, extent.nbytes - start)]
            self._move(extent.offset + start, part, reading=False)
        os.fdatasync(self._fd)

    def _move(self, offset: int, buffer: memoryview, *, reading: bool) -> None:
        file = FdFile(os.dup(self._fd), 0, self._nbytes)
        try:
            (file.read if reading else file.write)(offset, [buffer])
        finally:
            file.close()

    def _zeroed(self, extent: Extent) -> bool:
        try:
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", extent.offset, extent.nbytes))
            os.fsync(self._fd)
        except OSError:
            return False
        return True


def owner_of(path: str | Path) -> tuple[str, int]:
    """(the id of the store that a raw device belongs to, how many copies of its table are damaged);
    "" if it is blank. Raises OSError, Corrupt (no copy is whole)."""
    with open(path, "rb") as file:
        copies = [file.read(COPY_BYTES) for _ in range(COPIES)]
    found = [table for copy in copies if (table := RawTable.from_bytes(copy)) is not None]
    used = sum(any(copy[:ALIGN_BYTES]) for copy in copies)
    if not used:
        return "", 0
    if not found:
        raise Corrupt(f"{path} is not the raw device of a store, or its table is damaged")
    return max(found, key=lambda table: table.generation).owner, used - len(found)


def _opened(path: Path, *, direct: bool, read_only: bool) -> tuple[int, bool, str]:
    """(descriptor, whether it is a block device, how it is opened), locked."""
    is_block = stat.S_ISBLK(path.stat().st_mode)
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    flags |= os.O_EXCL if is_block else 0
    how = "O_DIRECT" if direct else "buffered (O_DIRECT is off in the configuration)"
    try:
        try:
            fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            how = "buffered (the file system refuses O_DIRECT)"
            fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Unavailable(
                f"{path} is in use: mounted, or another store's; name another device",
                reason="locked",
            ) from error
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable(
            f"{path} is in use by another process; stop it or name another device", reason="locked"
        ) from error
    return fd, is_block, how
