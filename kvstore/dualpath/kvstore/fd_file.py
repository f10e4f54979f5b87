"""A file of a device that is an open descriptor, or an extent of one, moved by preadv and pwritev.

`hold` keeps the descriptor open for transfers that others do with it (threads, a ring): its
number can not come to mean another file while they are under way.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence

from dualpath.kvstore.device import ALIGN_BYTES, check_aligned

_IOV_MAX = 512
_STALLS_MAX = 16
"""Transfers in a row that may make no progress before it is an I/O error."""


class FdFile:
    """See DeviceFile. Owns `fd`; its bytes are [base, base + nbytes) of what that names."""

    __slots__ = ("_closing", "_fd", "_holders", "_lock", "_nbytes", "_on_closed", "base")

    def __init__(
        self,
        fd: int,
        base: int = 0,
        nbytes: int | None = None,
        *,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        """By default all of the file that `fd` names. `on_closed` is called once, when the
        descriptor is closed."""
        self._on_closed = on_closed
        self._fd = fd
        self.base = base
        self._nbytes = os.fstat(fd).st_size if nbytes is None else nbytes
        self._lock = threading.Lock()
        self._holders = 0
        self._closing = False

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

    def sync(self) -> None:
        """See DeviceFile."""
        fd = self.hold()
        try:
            os.fdatasync(fd)
        finally:
            self.let_go()

    def close(self) -> None:
        """See DeviceFile. Waits for nobody: the last holder closes."""
        with self._lock:
            self._closing = True
            self._close_if_free()

    def hold(self) -> int:
        """The descriptor, open until `let_go`. Raises OSError (EBADF) after `close`."""
        with self._lock:
            if self._closing:
                raise OSError(errno.EBADF, "the file is closed")
            self._holders += 1
            return self._fd

    def let_go(self) -> None:
        """The end of a `hold`."""
        with self._lock:
            self._holders -= 1
            self._close_if_free()

    def _close_if_free(self) -> None:
        if self._closing and self._holders == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._on_closed is not None:
                self._on_closed()

    def _move(self, offset: int, buffers: Sequence[memoryview], *, reading: bool) -> None:
        """Transfer everything; a short transfer goes on from its last whole 4 KiB."""
        fd = self.hold()
        try:
            self._move_held(fd, offset, list(buffers), reading=reading)
        finally:
            self.let_go()

    def _move_held(self, fd: int, offset: int, left: list[memoryview], *, reading: bool) -> None:
        stalls = 0
        while left:
            batch = left[:_IOV_MAX]
            # PEP 475: the interpreter itself repeats calls that a signal interrupted.
            if reading:
                moved = os.preadv(fd, batch, self.base + offset)
                if moved == 0:
                    raise OSError(errno.EIO, f"end of file at {offset} of {self._nbytes} bytes")
            else:
                moved = os.pwritev(fd, batch, self.base + offset)
            whole = moved - moved % ALIGN_BYTES
            stalls = 0 if whole else stalls + 1
            if stalls > _STALLS_MAX:
                raise OSError(errno.EIO, f"no progress at {offset}: {moved} bytes a call")
            offset += whole
            left = _rest(left, whole)


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []
