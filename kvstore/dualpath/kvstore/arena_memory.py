"""The memory of an arena: the largest pages that this machine gives, all of them at once.

Private memory asks for transparent huge pages. Shared memory takes reserved huge pages if there
are enough, else transparent ones where the kernel allows them for shared memory, else 4 KiB; it is
sealed, so that whoever gets the descriptor can neither write nor change its size. Pages come from
one NUMA node and are there before the first use: a machine without the memory says so at the
start. `description` tells what was got; `remedy` how to get better, "" where there is no better.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from dualpath.kvstore import numa
from dualpath.transfer import huge_pages
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.region import HUGE_PAGE_BYTES, Region

native_populate: Callable[[memoryview], None] | None
try:
    from dualpath.kvstore import _native
except ImportError:
    native_populate = None
else:
    native_populate = _native.populate

_SLICE_BYTES = 64 << 20
_THREADS_MAX = 8
_PROGRESS_S = 1.0
_SPARE_BYTES = 64 << 20
"""Left to everybody else on the machine."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArenaMemory:
    """See the module docstring. `huge_bytes` of `region.nbytes` lie on huge pages."""

    region: Region
    huge_bytes: int
    description: str
    remedy: str


def open_arena_memory(
    name: str,
    nbytes: int,
    *,
    shared: bool,
    numa_node: int = numa.ANY_NODE,
    prefault: bool = True,
) -> ArenaMemory:
    """At least `nbytes`. Raises Unavailable (`no_memory`), InvalidRequest (no such node)."""
    wanted = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    region, kind, remedy = _shared(name, wanted) if shared else _private(wanted)
    try:
        where = numa.bind(region.view, numa_node)
        if prefault:
            _have_all(region)
        if shared:
            region.forbid_new_writers()
        huge = huge_pages.obtained_bytes(region.view) if prefault else 0
    except BaseException:
        region.close()
        raise
    if prefault and huge >= wanted - HUGE_PAGE_BYTES:
        remedy = ""
    got = f"{huge >> 20} of {wanted >> 20} MiB on huge pages" if prefault else "not prefaulted"
    description = f"{kind}: {got}, {where}"
    _log.info("%s: %s%s", name, description, f"; for better: {remedy}" if remedy else "")
    return ArenaMemory(region, huge, description, remedy)


def _private(nbytes: int) -> tuple[Region, str, str]:
    _check_available(nbytes)
    choice = huge_pages.transparent_choice("enabled")
    remedy = ""
    if choice not in ("always", "madvise"):
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    else:
        remedy = "free memory: there were not enough whole huge pages"
    return Region.anonymous(nbytes), f"private, transparent huge pages {choice}", remedy


def _shared(name: str, nbytes: int) -> tuple[Region, str, str]:
    pages = nbytes // HUGE_PAGE_BYTES
    reserve = f"sysctl vm.nr_hugepages={pages} (more if others use them)"
    free = huge_pages.reserved_bytes()
    if free >= nbytes:
        try:
            return Region.memfd(name, nbytes, reserved_huge_pages=True), "shared, reserved", ""
        except (OSError, Unavailable) as error:
            _log.info("no reserved huge pages though %d bytes are free: %s", free, error)
    _check_available(nbytes)
    choice = huge_pages.transparent_choice("shmem_enabled")
    region = Region.memfd(name, nbytes)
    if choice in ("advise", "always", "within_size"):
        region.ask_huge_pages()
        remedy = "free memory: there were not enough whole huge pages; or " + reserve
    else:
        remedy = f"echo advise > {huge_pages.SHMEM_ENABLED}; or {reserve}"
    return region, f"shared, transparent huge pages {choice}", remedy


def _check_available(nbytes: int) -> None:
    left = huge_pages.available_bytes()
    if nbytes + _SPARE_BYTES > left:
        raise Unavailable(
            f"the arena needs {nbytes} bytes of memory, and this machine or its control group has "
            f"{left} left: lower dram_bytes, or free some",
            reason="no_memory",
        )


def _have_all(region: Region) -> None:
    """Have every page, in slices, on as many threads as help; tell how far it is."""
    starts = range(0, region.nbytes, _SLICE_BYTES)
    threads = max(1, min(_THREADS_MAX, len(os.sched_getaffinity(0)), len(starts)))
    told = time.monotonic()
    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="arena") as pool:
        try:
            for nbytes in pool.map(partial(_populate, region), starts):
                done += nbytes
                if time.monotonic() - told >= _PROGRESS_S:
                    told = time.monotonic()
                    _log.info("arena: %d of %d MiB are there", done >> 20, region.nbytes >> 20)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _populate(region: Region, start: int) -> int:
    nbytes = min(_SLICE_BYTES, region.nbytes - start)
    try:
        if native_populate is None:
            region.prefault(start, nbytes)
            return nbytes
        try:
            with region.view[start : start + nbytes] as view:
                native_populate(view)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            region.prefault(start, nbytes)
    except OSError as error:
        raise Unavailable(
            f"memory ran out while the arena was filled: {error.strerror}; lower dram_bytes",
            reason="no_memory",
        ) from error
    return nbytes
