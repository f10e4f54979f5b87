"""The work requests of a write in Python: what `_native` does where it could be built.

`rows_of` has the same arguments, answers and limits as that of transfer/native/rows.c; what it
means is said in write_requests.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate

from dualpath.transfer.rdma.verbs import POST_MAX
from dualpath.transfer.rdma.work_rows import ROW, WRITE_IMM, write_rows
from dualpath.transfer.slices import Slices
from dualpath.transfer.table_copy_twin import Places

PIECES_MAX = 16


def rows_of(
    sizes: array[int],
    source_at: Places,
    target_at: Places,
    offset: int,
    end: int,
    skip: bytes,
    source: tuple[int, int],
    target: tuple[int, int],
    pieces_max: int,
    most: int,
    immediate: int,
    /,
) -> tuple[bytearray, int, int, int]:
    """See write_requests.rows_of."""
    if not 0 <= offset <= end <= sum(sizes) or len(skip) * 8 < len(sizes):
        raise ValueError("bytes that a write does not have")
    if not 1 <= most <= POST_MAX or not 1 <= pieces_max <= PIECES_MAX:
        raise ValueError("too many requests, or pieces, at once")
    rows, count, last_at = bytearray(), 0, 0
    for index, (whole, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        stop = min(whole, end)
        if offset >= stop:
            continue
        if skip[index >> 3] & (1 << (index & 7)):
            offset = stop
            continue
        inside = offset - (whole - size)
        from_, to = (
            _slices(places, index, size).part(inside, stop - offset)
            for places in (source_at, target_at)
        )
        for at, pieces in _gathered(from_, to, source[0], pieces_max):
            if count == most:
                return rows, count, last_at, offset
            last_at = len(rows)
            rows += write_rows(pieces, source[1], target[0] + at, target[1])
            count += 1
            offset += sum(nbytes for _, nbytes in pieces)
    if count and offset == end and immediate >= 0:
        head = list(ROW.unpack_from(rows, last_at))
        head[6:8] = immediate, WRITE_IMM
        ROW.pack_into(rows, last_at, *head)
    return rows, count, last_at, offset


def _slices(places: Places, index: int, size: int) -> Slices:
    stride, length, bases, skips = places
    if length < 1 or stride < length or not len(bases) == len(skips) > index:
        raise ValueError("the slices of a table are empty or overlap, or not as many")
    skip = skips[index]
    return Slices(bases[index], stride, -(-(skip + size) // length), length, skip, size)


def _gathered(
    from_: Slices, to: Slices, start: int, pieces_max: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (target offset, pieces of the source, which begins at `start`, that go there one after
    another)."""
    sources = from_.pieces()
    at = have = 0
    for offset, length in to.pieces():
        first, filled, pieces = offset, 0, list[tuple[int, int]]()
        while filled < length:
            if not have:
                at, have = next(sources)
            take = min(length - filled, have)
            pieces.append((start + at, take))
            at, have, filled = at + take, have - take, filled + take
            if len(pieces) == pieces_max and filled < length:
                yield first, pieces
                first, pieces = offset + filled, []
        yield first, pieces
