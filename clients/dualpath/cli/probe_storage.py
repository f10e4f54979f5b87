"""What the kernel and the data directory offer for reading and writing blocks.

Each probe tries the thing itself and undoes it; none leaves anything behind.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import secrets
import shutil
from pathlib import Path

from dualpath.cli.finding import Finding, Status
from dualpath.cli.sizes import format_bytes

_IO_URING_SETUP = 425
_IO_URING_PARAMS_BYTES = 120
_IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_PAGE = 4096


def storage_findings(data: Path) -> list[Finding]:
    """io_uring, and of the data directory: writable, O_DIRECT, space."""
    return [io_uring(), *_data_directory(data)]


def io_uring() -> Finding:
    """Set up a ring of one entry and close it again."""
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_IO_URING_SETUP, 1, params)
    code = ctypes.get_errno()
    if ring >= 0:
        os.close(ring)
        return Finding(name="io_uring", status=Status.OK, detail="a ring could be set up")
    return Finding(
        name="io_uring",
        status=Status.ABSENT,
        detail=_ring_refused(code),
        cost="nothing in this version: the store reads by preadv in threads (psync)",
        remedy="Linux >= 5.6, sysctl kernel.io_uring_disabled=0, and in a container a seccomp "
        "profile that allows io_uring_setup",
    )


def _ring_refused(code: int) -> str:
    if code == errno.ENOSYS:
        return f"Linux {platform.release()} has no io_uring, or a seccomp profile hides it"
    if code == errno.EPERM:
        try:
            disabled = _IO_URING_DISABLED.read_text().strip()
        except OSError:
            disabled = "0"
        if disabled != "0":
            return f"refused: sysctl kernel.io_uring_disabled is {disabled}"
        return "refused (EPERM): a seccomp profile or a security module forbids it"
    return f"io_uring_setup failed: {os.strerror(code)}"


def _data_directory(data: Path) -> list[Finding]:
    existing = data.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [
            Finding(
                name="data directory",
                status=Status.ABSENT,
                detail=f"{existing} is not a directory that this user may write to",
                cost="`dualpath serve` cannot keep anything",
                remedy="name another with --data, or change its owner",
                required=True,
            )
        ]
    usage = shutil.disk_usage(existing)
    free = f"{existing}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    return [
        Finding(name="data directory", status=Status.OK, detail=free, required=True),
        _direct(existing),
    ]


def _direct(directory: Path) -> Finding:
    """Write and read one page with O_DIRECT."""
    path = directory / f".dualpath-doctor-{secrets.token_hex(8)}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            with mmap.mmap(-1, _PAGE) as page:
                os.pwrite(fd, page, 0)
                os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return Finding(
            name="O_DIRECT",
            status=Status.ABSENT,
            detail=f"{directory}: {error.strerror}",
            cost="reads and writes go through the page cache: one more copy, and memory that "
            "other programs would use",
            remedy="put the data on ext4 or xfs (tmpfs and some network file systems refuse)",
        )
    finally:
        path.unlink(missing_ok=True)
    return Finding(name="O_DIRECT", status=Status.OK, detail=f"{directory} takes it")
