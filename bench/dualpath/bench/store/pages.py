"""What kind of pages memory lies on, as the kernel tells it, and memory of a given kind.

Huge pages in the destination of a read or a copy are worth up to twice the speed, so a limit is
only fair on the same kind of pages. The kind is not what was asked for but what /proc says.
"""

from __future__ import annotations

import enum
import mmap
from pathlib import Path

import numpy as np

HUGE_PAGE_BYTES = 2 << 20
_MAP_HUGETLB = 0x40000


class PageKind(enum.Enum):
    """By the size and the making of pages."""

    SMALL = "4k"
    TRANSPARENT_HUGE = "thp"
    RESERVED_HUGE = "hugetlb"


def kind_of(memory: memoryview) -> PageKind:
    """Of memory of this process that has been touched: what most of its mapping lies on."""
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    inside = False
    size = {"Rss": 0, "AnonHugePages": 0, "ShmemPmdMapped": 0, "KernelPageSize": 4}
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split(" ", 1)[0] and name not in size:
            start, _, end = line.split(" ", 1)[0].partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and name in size:
            size[name] = int(value.split()[0])
    if size["KernelPageSize"] > 4:
        return PageKind.RESERVED_HUGE
    huge = size["AnonHugePages"] + size["ShmemPmdMapped"]
    return PageKind.TRANSPARENT_HUGE if huge > size["Rss"] // 2 else PageKind.SMALL


def memory_of(kind: PageKind, nbytes: int) -> mmap.mmap:
    """Private memory on pages of a kind, every page touched. OSError without reserved pages."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    nbytes = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    if kind is PageKind.RESERVED_HUGE:
        memory = mmap.mmap(-1, nbytes, flags=flags | _MAP_HUGETLB)
    else:
        memory = mmap.mmap(-1, nbytes, flags=flags)
        huge = kind is PageKind.TRANSPARENT_HUGE
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    return memory
