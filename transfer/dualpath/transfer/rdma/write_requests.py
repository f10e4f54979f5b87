"""From slices to work requests: which bytes of the source go where in the peer's memory. Pure.

A request writes one contiguous range of the target; its bytes are gathered from as many pieces of
the source as the device takes. Nothing is copied, and requests are bytes (work_rows.py): there are
too many of them for objects.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from dualpath.transfer.outbox import PendingWrite
from dualpath.transfer.rdma.messages import Grant
from dualpath.transfer.rdma.verbs import Piece
from dualpath.transfer.rdma.work_rows import with_immediate, write_rows
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import WriteBatch


def skips(grant: Grant, index: int) -> bool:
    """Whether part `index` of a batch is not to be written."""
    return bool(grant.skip[index >> 3] & (1 << (index & 7)))


def parts_of(
    pending: PendingWrite, offset: int, nbytes: int
) -> Iterator[tuple[int, Slices, Slices]]:
    """Bytes [offset, offset + nbytes) of a write or batch, part by part: which part, and where
    the bytes are in the source and in the target."""
    write = pending.write
    if not isinstance(write, WriteBatch):
        yield (
            0,
            write.source_slices.part(offset, nbytes),
            write.target_slices.part(offset, nbytes),
        )
        return
    assert pending.reader is not None
    ends = pending.reader.ends
    index = bisect_right(ends, offset)
    inside = offset - (ends[index - 1] if index else 0)
    while nbytes:
        take = min(write.source_table.sizes[index] - inside, nbytes)
        yield (
            index,
            write.source_table.part(index).part(inside, take),
            write.target_table.part(index).part(inside, take),
        )
        nbytes -= take
        index, inside = index + 1, 0


def requests_of(
    pending: PendingWrite, offset: int, nbytes: int, grant: Grant, source: Piece, pieces_max: int
) -> Iterator[bytes]:
    """The writes of these bytes, each as its rows, the last with the grant's slot as immediate.
    `source` is the whole source region."""
    last = b""
    for index, from_, to in parts_of(pending, offset, nbytes):
        if skips(grant, index):
            continue
        for at, pieces in _gathered(from_, to, source.address, pieces_max):
            if last:
                yield last
            last = write_rows(pieces, source.lkey, grant.address + at, grant.rkey)
    if last:
        yield with_immediate(last, grant.slot)


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
