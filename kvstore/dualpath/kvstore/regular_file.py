"""Opening what must be a file of bytes: that of a pipe would wait for its other end, for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class NotRegularError(OSError):
    """Something else has the name of a file: a directory, a pipe, a socket, a device."""


def open_regular(path: Path, flags: int) -> int:
    """A descriptor. Raises OSError, NotRegularError."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(fd, True)  # io_uring would give up where a read has to wait
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: Path) -> bytes:
    """All bytes of a file. Raises OSError, NotRegularError."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read()
