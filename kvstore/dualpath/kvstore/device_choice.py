"""Which device a store reads and writes by, and why not a better one.

`auto` takes io_uring where there is the native module and the kernel allows it, else psync, whose
description then tells the reason and the remedy.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

from dualpath.kvstore.io_mode import IO_DEPTH, IoMode, check_io
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.raw_device import RawDevice
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
    """The device over the files of a directory, or with `raw` over that block device or file,
    which is then marked as the store `owner`'s.

    Raises Unavailable (`no_io_uring`) where io_uring was asked for and cannot be had, OSError, and
    what RawDevice raises.
    """
    check_io(io, depth)
    inner: PsyncDevice | RawDevice
    if raw:
        inner = RawDevice(raw, owner=owner, direct=direct)
    else:
        inner = PsyncDevice(path, direct=direct, read_only=read_only)
    if io == IoMode.PSYNC.value:
        return inner
    refusal = ring_refusal()
    if not refusal:
        assert make_ring is not None
        try:
            return RingDevice(inner, make_ring, depth=depth)
        except OSError as error:
            refusal = _reason(error)
    if io == IoMode.IO_URING.value:
        inner.close()
        raise Unavailable(f"io is io_uring, but {refusal}; or set io to auto", reason="no_io_uring")
    inner.remark = f"no io_uring: {refusal}"
    _log.info("%s", inner.description)
    return inner


def ring_refusal() -> str:
    """Why this machine cannot use io_uring, with the remedy; "" if it can."""
    if make_ring is None:
        return "the native module is not installed (install again where there is a C compiler)"
    try:
        make_ring(1).close()
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return "the kernel has none, or one that is too old (5.11 or later is needed)"
    if error.errno in (errno.EPERM, errno.EACCES):
        try:
            disabled = _DISABLED.read_text().strip()
        except OSError:
            disabled = "0"
        if disabled != "0":
            return f"kernel.io_uring_disabled is {disabled} (sysctl kernel.io_uring_disabled=0)"
        return "this process may not use it (allow io_uring_setup, _enter, _register in seccomp)"
    if error.errno == errno.ENOMEM:
        return "locked memory is short (raise `ulimit -l`, LimitMEMLOCK= of the unit)"
    return f"the kernel refuses it: {error.strerror}"
