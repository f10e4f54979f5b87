"""From slices to work requests: which bytes of the source go where in the peer's memory. Pure.

A request writes one contiguous range of the target; its bytes are gathered from as many pieces of
the source as the device takes. Nothing is copied, and requests are bytes (work_rows.py), made a
post at a time: there are too many of them for objects, or for a call each.

`rows_of(sizes, source_at, target_at, offset, end, skip, source, target, pieces_max, most,
immediate)`, native where it was built, makes the requests of bytes [offset, end) of a batch whose
parts have `sizes` and lie at (stride, length, bases, skips) in each memory; parts whose bit in
`skip` is set are left out. `source` is (address of the region, lkey), `target` (address, rkey). It
returns the rows of at most `most` requests, how many these are, where in the rows the last begins,
and up to which byte they go; if that is `end`, the last one tells `immediate`, unless negative.
Raises ValueError for bytes that are not there.
"""

from __future__ import annotations

from dualpath.transfer.outbox import PendingWrite
from dualpath.transfer.rdma import write_requests_twin
from dualpath.transfer.rdma.messages import Grant
from dualpath.transfer.rdma.verbs import Piece
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import WriteBatch

try:
    from dualpath.transfer._native import rows_of
except ImportError:
    rows_of = write_requests_twin.rows_of

__all__ = ["WriteRequests", "rows_of"]


class WriteRequests:
    """The requests of bytes [offset, offset + nbytes) of a write or batch, taken a post at a time.

    `source` is the whole source region. The last one tells the grant's slot, if `tell` is set.
    """

    __slots__ = ("_at", "_end", "_fixed", "_immediate", "_keys", "_pieces_max")

    def __init__(
        self,
        pending: PendingWrite,
        offset: int,
        nbytes: int,
        grant: Grant,
        source: Piece,
        pieces_max: int,
        *,
        tell: bool = True,
    ) -> None:
        write = pending.write
        if isinstance(write, WriteBatch):
            from_, to = write.source_table, write.target_table
        else:
            from_, to = SliceTable.of(write.source_slices), SliceTable.of(write.target_slices)
        self._fixed = (from_.sizes, from_.places, to.places)
        self._at = offset
        self._end = offset + nbytes
        self._keys = (grant.skip, (source.address, source.lkey), (grant.address, grant.rkey))
        self._pieces_max = pieces_max
        self._immediate = grant.slot if tell else -1

    @property
    def exhausted(self) -> bool:
        """Whether all have been taken."""
        return self._at == self._end

    def take(self, most: int) -> tuple[bytearray, int, int]:
        """At most `most` more requests: their rows, how many they are, and where in the rows the
        last of them begins."""
        rows, count, last_at, self._at = rows_of(
            *self._fixed,
            self._at,
            self._end,
            *self._keys,
            self._pieces_max,
            most,
            self._immediate,
        )
        return rows, count, last_at
