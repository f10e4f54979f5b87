"""What huge pages this machine has to give, what a mapping really got, and how much memory is left.

Reads the kernel's files at each call; changes nothing.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from dualpath.transfer.region import HUGE_PAGE_BYTES

_THP = Path("/sys/kernel/mm/transparent_hugepage")
SHMEM_ENABLED = _THP / "shmem_enabled"
_HUGETLB = Path("/sys/kernel/mm/hugepages")
_CGROUP = Path("/sys/fs/cgroup")
_HUGE_FIELDS = frozenset(("AnonHugePages", "ShmemPmdMapped", "Shared_Hugetlb", "Private_Hugetlb"))


def transparent_choice(name: str, root: Path = _THP) -> str:
    """The value in brackets of `enabled` or `shmem_enabled`, that of 2 MiB pages where it has one
    of its own; `absent` if the kernel has no such setting."""
    own = _chosen(root / f"hugepages-{HUGE_PAGE_BYTES >> 10}kB" / name)
    return _chosen(root / name) if own in ("absent", "inherit") else own


def reserved_bytes(root: Path = _HUGETLB) -> int:
    """Free bytes in the kernel's pool of 2 MiB pages (vm.nr_hugepages), less those promised."""
    pool = root / f"hugepages-{HUGE_PAGE_BYTES >> 10}kB"
    try:
        free = int((pool / "free_hugepages").read_text())
        promised = int((pool / "resv_hugepages").read_text())
    except (OSError, ValueError):
        return 0
    return max(0, free - promised) * HUGE_PAGE_BYTES


def obtained_bytes(view: memoryview) -> int:
    """Bytes of huge pages in the mapping that holds `view`'s middle, by the kernel's account."""
    # The middle: a mapping may start below a huge page's boundary.
    address = ctypes.addressof(ctypes.c_char.from_buffer(view)) + view.nbytes // 2
    total, inside = 0, False
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if not line[0].isupper():  # the head of a mapping, not one of its fields
            start, _, end = line.split(maxsplit=1)[0].partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and line.partition(":")[0] in _HUGE_FIELDS:
            total += int(line.split()[1]) << 10
    return total


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that this process can still take without swapping or being killed: what the machine
    has left, or its control group if that is less."""
    left = 1 << 62
    try:
        if match := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE):
            left = int(match.group(1)) << 10
    except OSError:
        pass
    for folder in _own_groups(cgroup):
        left = min(left, _left_in(folder))
    return left


def _own_groups(root: Path) -> list[Path]:
    """Our control group and those above it, of version 2."""
    try:
        match = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return []
    folder = root / (match.group(1) if match else "")
    # In a container the path may be one of the host's: the mount then shows our group itself.
    above = [folder, *folder.parents]
    return [path for path in above if path.is_relative_to(root)]


def _left_in(folder: Path) -> int:
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int((folder / "memory.current").read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return 1 << 62
    files = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
    return max(0, int(limit) - used + files)


def _chosen(path: Path) -> str:
    try:
        found = re.search(r"\[(\S+)\]", path.read_text())
    except OSError:
        return "absent"
    return found.group(1) if found else "unknown"
