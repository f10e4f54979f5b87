"""Which device a store reads and writes by, and why not a better one.

`auto` takes io_uring where there is the native module and the kernel allows it, else psync, whose
description then tells the reason and the remedy.
"""

from __future__ import annotations

import errno
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualpath.kvstore.io_mode import IO_DEPTH, IoMode, check_io
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.raw_device import RawDevice
from dualpath.kvstore.raw_marker import check_raw_device, mark_raw_device
from dualpath.kvstore.ring_device import RingDevice
from dualpath.kvstore.ring_pool import NativeRing
from dualpath.transfer.errors import Unavailable

make_ring: Callable[[int], NativeRing] | None
try:
    from dualpath.kvstore._native import Ring
except ImportError:
    make_ring = None
else:
    make_ring = Ring

_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_log = logging.getLogger(__name__)


def open_device(
    path: str | Path,
    *,
    io: str = IoMode.AUTO.value,
    depth: int = IO_DEPTH,
    direct: bool = True,
    read_only: bool = False,
    raw: str = "",
    owner: str = "",
) -> RingDevice | PsyncDevice | RawDevice:
    """The device over the files of `path`, the folder `segments` of a data directory, or with
    `raw` over that block device or file, which is then marked as the store `owner`'s.

    Raises Unavailable (`no_io_uring`) where io_uring was asked for and cannot be had, OSError, and
    what RawDevice raises.
    """
    check_io(io, depth)
    check_raw_device(Path(path).parent, Path(path), raw)
    inner: PsyncDevice | RawDevice
    if raw:
        inner = RawDevice(raw, owner=owner, direct=direct, read_only=read_only)
        if not read_only:
            mark_raw_device(Path(path).parent, raw)
    else:
        inner = PsyncDevice(path, direct=direct, read_only=read_only)
    if io == IoMode.PSYNC.value:
        return inner
    refusal = ring_refusal()
    if refusal is None:
        assert make_ring is not None
        try:
            return RingDevice(inner, make_ring, depth=depth)
        except OSError as error:
            refusal = refusal_of(error)
    if io == IoMode.IO_URING.value:
        inner.close()
        raise Unavailable(
            f"io is io_uring, but {refusal.reason}: {refusal.remedy}, or set io to auto",
            reason="no_io_uring",
        )
    inner.remark = f"no io_uring, as {refusal.reason} ({refusal.remedy})"
    _log.info("%s", inner.description)
    return inner


@dataclass(frozen=True, slots=True)
class RingRefusal:
    """Why there is no io_uring here, and what to do about it."""

    reason: str
    remedy: str


def ring_refusal() -> RingRefusal | None:
    """Why this process cannot use io_uring; None if it can. Makes a ring, to see."""
    if make_ring is None:
        return RingRefusal(
            "the native module is not installed", "install dualpath where there is a C compiler"
        )
    try:
        make_ring(1).close()
    except OSError as error:
        return refusal_of(error)
    return None


def refusal_of(error: OSError) -> RingRefusal:
    """What an error of io_uring_setup means."""
    if error.errno == errno.ENOSYS:
        return RingRefusal(
            f"Linux {platform.release()} has none or is too old, or a seccomp profile hides it",
            "use Linux 5.11 or later, and a profile that allows io_uring_setup, _enter, _register",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        try:
            disabled = _DISABLED.read_text().strip()
        except OSError:
            disabled = "0"
        if disabled != "0":
            return RingRefusal(
                f"kernel.io_uring_disabled is {disabled}", "sysctl kernel.io_uring_disabled=0"
            )
        return RingRefusal(
            "a seccomp profile or a security module forbids it",
            "allow io_uring_setup, io_uring_enter and io_uring_register",
        )
    if error.errno == errno.ENOMEM:
        return RingRefusal("locked memory is short", "raise `ulimit -l`, LimitMEMLOCK= of the unit")
    return RingRefusal(f"the kernel refuses it: {error.strerror}", "see the kernel's log")
