"""What the kernel and the data directory offer for reading and writing blocks.

Each probe tries the thing itself and undoes it; none leaves anything behind.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
from pathlib import Path

from dualpath.cli.finding import Finding, Status
from dualpath.cli.sizes import format_bytes
from dualpath.kvstore.device_choice import ring_refusal

_PAGE = 4096


def storage_findings(data: Path) -> list[Finding]:
    """io_uring, and of the data directory: writable, O_DIRECT, space."""
    return [io_uring(), *_data_directory(data)]


def io_uring() -> Finding:
    """Set up a ring of one entry and close it again."""
    refusal = ring_refusal()
    if refusal is None:
        return Finding(name="io_uring", status=Status.OK, detail="a ring could be set up")
    return Finding(
        name="io_uring",
        status=Status.ABSENT,
        detail=refusal.reason,
        cost="the store reads by preadv in threads (psync), at more CPU a byte",
        remedy=refusal.remedy,
    )


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
