"""Huge pages as really obtained, locked memory, and sealed shared memory."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
from pathlib import Path

from dualpath.cli.finding import Finding, Status
from dualpath.cli.sizes import format_bytes
from dualpath.transfer.region import HUGE_PAGE_BYTES, Region

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_PROBE_BYTES = 8 * HUGE_PAGE_BYTES
_MEMLOCK_WANTED = 1 << 30


def memory_findings() -> list[Finding]:
    """Private huge pages, shared huge pages, memlock, sealing."""
    return [_private_huge_pages(), _shared_huge_pages(), _memlock(), _sealed_memory()]


def _choice(name: str) -> str:
    """The value in brackets of a file such as `always [madvise] never`."""
    try:
        found = re.search(r"\[(\S+)\]", (_THP / name).read_text())
    except OSError:
        return "absent"
    return found.group(1) if found else "unknown"


def _obtained_bytes(field: str, view: memoryview) -> int:
    """Bytes of huge pages in the mapping that holds `view`, by the kernel's own account."""
    address = _address(view)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match.group(1), 16) <= address < int(match.group(2), 16)
        elif inside and line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def _address(view: memoryview) -> int:
    # The aligned middle: a mapping may start below a huge page's boundary.
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) + view.nbytes // 2


def _private_huge_pages() -> Finding:
    obtained = _obtained(Region.anonymous(_PROBE_BYTES), "AnonHugePages")
    detail = f"{_shown(obtained)} (enabled: {_choice('enabled')})"
    if obtained:
        return Finding(name="huge pages, private", status=Status.OK, detail=detail)
    return Finding(
        name="huge pages, private",
        status=Status.ABSENT,
        detail=detail,
        cost="reads into 4 KiB pages: about 1.7 times slower where it was measured",
        remedy="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; free memory",
    )


def _shared_huge_pages() -> Finding:
    try:
        obtained = _obtained(Region.memfd("dualpath-doctor", _PROBE_BYTES), "ShmemPmdMapped")
    except OSError as error:
        obtained, refused = 0, f"; no memfd: {error.strerror}"
    else:
        refused = ""
    detail = f"{_shown(obtained)} (shmem_enabled: {_choice('shmem_enabled')}){refused}"
    if obtained:
        return Finding(name="huge pages, shared", status=Status.OK, detail=detail)
    return Finding(
        name="huge pages, shared",
        status=Status.ABSENT,
        detail=detail,
        cost="memory shared between engines, agent and daemon uses 4 KiB pages",
        remedy="echo always > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )


def _obtained(region: Region, field: str) -> int:
    try:
        region.prefault()
        return _obtained_bytes(field, region.view)
    finally:
        region.close()


def _shown(obtained: int) -> str:
    return f"got {format_bytes(obtained)} of {format_bytes(_PROBE_BYTES)}"


def _memlock() -> Finding:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= _MEMLOCK_WANTED:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
        return Finding(name="memlock", status=Status.OK, detail=shown)
    return Finding(
        name="memlock",
        status=Status.PARTIAL,
        detail=format_bytes(soft),
        cost="RDMA can register no more memory than that; TCP and shared memory do not care",
        remedy="ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit",
    )


def _sealed_memory() -> Finding:
    try:
        region = Region.memfd("dualpath-doctor", mmap.PAGESIZE)
    except (OSError, AttributeError) as error:
        return Finding(
            name="sealed shared memory",
            status=Status.ABSENT,
            detail=str(error),
            cost="engines cannot share memory with their agent: only embedded use works",
            remedy="Linux >= 3.17, and in a container a seccomp profile that allows memfd_create",
        )
    try:
        region.forbid_new_writers()
    except OSError as error:
        return Finding(
            name="sealed shared memory",
            status=Status.PARTIAL,
            detail=f"F_SEAL_FUTURE_WRITE: {error.strerror}",
            cost="the daemon's arena cannot be shared read-only: its data goes over TCP",
            remedy="Linux >= 5.1",
        )
    finally:
        region.close()
    return Finding(name="sealed shared memory", status=Status.OK, detail="memfd with seals")
