"""Parts of tables copied in Python: what `_native` does where it could be built.

`copy_parts` has the same arguments, answers and limits as that of transfer/native/copy.c; what it
means is said in table_copy.py. It copies first and hashes what is in the target then.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TypeAlias

import xxhash
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_io_twin import HASHED_BYTES_MIN

PARTS_MAX = 1024
_STEP_BYTES = 256 << 10
_STRIPE_BYTES = 64

Buffer = bytes | bytearray | memoryview
Places: TypeAlias = "tuple[int, int, array[int], array[int]]"


def copy_parts(
    sizes: array[int],
    target: Buffer,
    target_at: Places,
    source: Buffer,
    source_at: Places,
    interrupt: Buffer,
    hashed: bool,
    /,
) -> list[int]:
    """See table_copy.copy_parts."""
    if not 1 <= len(sizes) <= PARTS_MAX:
        raise ValueError(f"1 to {PARTS_MAX} parts at once, not {len(sizes)}")
    if not len(interrupt):
        raise ValueError("no interrupt")
    to, at = memoryview(target).cast("B"), memoryview(source).cast("B")
    targets, sources = _slices(target_at, sizes, len(to)), _slices(source_at, sizes, len(at))
    digests: list[int] = []
    for there, here in zip(targets, sources, strict=True):
        for offset in range(0, there.nbytes, _STEP_BYTES):
            if interrupt[0]:
                return digests
            size = min(_STEP_BYTES, there.nbytes - offset)
            copy_slices(to, there.part(offset, size), at, here.part(offset, size))
        digests.append(_digest(to, there, here) if hashed else 0)
    return digests


def _slices(places: Places, sizes: array[int], nbytes: int) -> list[Slices]:
    stride, length, bases, skips = places
    if not len(bases) == len(skips) == len(sizes):
        raise ValueError("bases, skips and sizes must be as many")
    if length < 1 or stride < length:
        raise ValueError("the slices of a table are empty or overlap")
    found = []
    for base, skip, size in zip(bases, skips, sizes, strict=True):
        if min(base, skip, size - 1) < 0:
            raise ValueError(f"a part of {size} bytes, {skip} bytes behind {base}")
        each = Slices(base, stride, -(-(skip + size) // length), length, skip, size)
        if each.end > nbytes:
            raise ValueError(f"a part ends at {each.end} of {nbytes} bytes")
        found.append(each)
    return found


def _digest(target: memoryview, there: Slices, here: Slices) -> int:
    """The part's xxh3-64, or 0 where the native function does not know it either."""
    if there.nbytes < HASHED_BYTES_MIN:
        return 0
    cuts = sorted({*_ends(there), *_ends(here)})
    sizes = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    if sizes[-1] < _STRIPE_BYTES or any(size % _STRIPE_BYTES for size in sizes[:-1]):
        return 0
    state = xxhash.xxh3_64()
    for at, nbytes in there.pieces():
        state.update(target[at : at + nbytes])
    return state.intdigest()


def _ends(slices: Slices) -> Iterator[int]:
    end = 0
    for _, nbytes in slices.pieces():
        end += nbytes
        yield end
