"""Parts of a table copied inside of one machine, hashed on the way; native where it was built.

`copy_parts(sizes, target, target_at, source, source_at, interrupt, hashed)` copies part after
part, `sizes[i]` bytes each. Where they lie in each memory: (stride, length, bases, skips), as in a
SliceTable. Returns the digest of each part that is whole, in order: with `hashed` the xxh3-64 of
what it stored, 0 for a part that is too short or in pieces that are no multiple of 64 bytes. It
ends early, before a part is whole, once `interrupt[0]` was set by another thread. Raises ValueError
for parts that leave their memory. The native one lets other threads run all the while.

`land_some` brings the parts of a write to where they belong by it, under the rules of windows.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualpath.transfer import table_copy_twin
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.table_copy_twin import PARTS_MAX, Places
from dualpath.transfer.window import Landing, LandingLock

try:
    from dualpath.transfer._native import copy_parts
except ImportError:
    copy_parts = table_copy_twin.copy_parts

__all__ = ["PARTS_MAX", "STEP_BYTES", "Places", "copy_parts", "land_some"]

STEP_BYTES = 4 << 20
"""From so many bytes on what has been copied is told, before the next parts are."""


def land_some(
    landings: Sequence[Landing | None],
    lock: LandingLock,
    targets: SliceTable,
    source: memoryview,
    sources: SliceTable,
    first: int,
) -> tuple[int, list[int]]:
    """Copy parts from `first` on, about STEP_BYTES of them, and say up to which, and their digests.

    Parts that may not land, or no longer, are passed over. It may end without a single part, when
    somebody fences: call again. `lock` is that of all landings; at most as long as one step takes
    is it held, and no longer than a moment after it was asked for.
    """
    with lock:
        last = first + 1
        opened = _is_open(landings[first])
        nbytes = targets.sizes[first]
        while last < len(landings) and nbytes < STEP_BYTES and _is_open(landings[last]) == opened:
            nbytes += targets.sizes[last]
            last += 1
        landing = landings[first]
        if landing is None or not opened:
            return last, [0] * (last - first)
        digests = copy_parts(
            targets.sizes[first:last],
            landing.region.view,
            _places(targets, first, last),
            source,
            _places(sources, first, last),
            lock.interrupt,
            landing.hashed,
        )
    return first + len(digests), digests


def _is_open(landing: Landing | None) -> bool:
    return landing is not None and landing.open


def _places(table: SliceTable, first: int, last: int) -> Places:
    bases, skips = table.bases[first:last], table.skips[first:last]
    if table.solid:
        return 1, 1, bases, skips
    return table.stride, table.length, bases, skips
