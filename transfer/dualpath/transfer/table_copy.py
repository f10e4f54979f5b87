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

from dualpath.transfer import table_copy_twin
from dualpath.transfer.landing import OPEN, Landing
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.table_copy_twin import PARTS_MAX, Places

try:
    from dualpath.transfer._native import copy_parts
except ImportError:
    copy_parts = table_copy_twin.copy_parts

__all__ = ["PARTS_MAX", "STEP_BYTES", "Places", "copy_parts", "land_some"]

STEP_BYTES = 4 << 20
"""From so many bytes on what has been copied is told, before the next parts are."""


def land_some(
    landing: Landing | None, source: memoryview, sources: SliceTable, first: int
) -> tuple[int, list[int]]:
    """Copy parts from `first` on, about STEP_BYTES of them, and say up to which, and their digests.

    Parts that may not land, or no longer, are passed over. It may end without a single part, when
    somebody fences: call again. At most as long as one step takes is the landing's lock held, and
    no longer than a moment after it was asked for.
    """
    if landing is None:
        return len(sources), [0] * (len(sources) - first)
    targets, lock = landing.table, landing.lock
    with lock:
        last, opened = _run(landing, first)
        if not opened:
            return last, [0] * (last - first)
        digests = copy_parts(
            targets.sizes[first:last],
            landing.view,
            _places(targets, first, last),
            source,
            _places(sources, first, last),
            lock.interrupt,
            landing.hashed,
        )
    return first + len(digests), digests


def _run(landing: Landing, first: int) -> tuple[int, bool]:
    """Up to which part all are open, or none is, and have no more than STEP_BYTES but for the
    last; and which of the two."""
    table, states = landing.table, landing.states
    count = len(states)
    if table.nbytes <= STEP_BYTES and states.count(OPEN, first) == count - first:
        return count, True
    opened = landing.is_open(first)
    last, nbytes = first + 1, table.sizes[first]
    while last < count and nbytes < STEP_BYTES and landing.is_open(last) == opened:
        nbytes += table.sizes[last]
        last += 1
    return last, opened


def _places(table: SliceTable, first: int, last: int) -> Places:
    stride, length, bases, skips = table.places
    return stride, length, bases[first:last], skips[first:last]
