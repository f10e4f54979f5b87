"""From slices to work requests: which bytes of the source go where in the peer's memory. Pure.

A request writes one contiguous range of the target; its bytes are gathered from as many pieces of
the source as the device takes. Nothing is copied.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from dualpath.transfer.outbox import PendingWrite
from dualpath.transfer.rdma.messages import Grant
from dualpath.transfer.rdma.verbs import Opcode, Piece, WorkRequest
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
) -> Iterator[WorkRequest]:
    """The writes of these bytes, the last with the grant's slot as immediate. `source` is the
    whole source region."""
    last: WorkRequest | None = None
    for index, from_, to in parts_of(pending, offset, nbytes):
        if skips(grant, index):
            continue
        for at, pieces in _gathered(from_, to, source, pieces_max):
            if last is not None:
                yield last
            last = WorkRequest(0, Opcode.WRITE, False, pieces, grant.address + at, grant.rkey)
    if last is not None:
        yield WorkRequest(
            0,
            Opcode.WRITE_IMM,
            True,
            last.pieces,
            last.remote_address,
            last.rkey,
            immediate=grant.slot,
        )


def _gathered(
    from_: Slices, to: Slices, source: Piece, pieces_max: int
) -> Iterator[tuple[int, list[Piece]]]:
    """Yield (target offset, pieces of the source that go there one after another)."""
    sources = from_.pieces()
    at = have = 0
    for offset, length in to.pieces():
        start, filled, pieces = offset, 0, list[Piece]()
        while filled < length:
            if not have:
                at, have = next(sources)
            take = min(length - filled, have)
            pieces.append(Piece(source.address + at, take, source.lkey))
            at, have, filled = at + take, have - take, filled + take
            if len(pieces) == pieces_max and filled < length:
                yield start, pieces
                start, pieces = offset + filled, []
        yield start, pieces
