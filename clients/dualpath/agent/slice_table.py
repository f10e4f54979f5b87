"""Slices of many chunks <-> the protocol's SliceTable.

Owns the two directions and the check of what peers send: parts of equal length, sizes in bounds,
a window that parses. A table's base, skip and nbytes have one element a chunk; the rest is common.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices

GRANT_CHUNKS_MAX = 4096


def table_of(targets: Sequence[Slices]) -> common_pb2.SliceTable:
    """The table of slices that agree in stride, count and length."""
    first = targets[0]
    common = (first.stride, first.count, first.length)
    assert all((s.stride, s.count, s.length) == common for s in targets), "slices differ in shape"
    table = SliceTable(
        *common,
        [slices.base for slices in targets],
        [slices.skip for slices in targets],
        [slices.nbytes for slices in targets],
    )
    return message_of(table)


def message_of(table: SliceTable) -> common_pb2.SliceTable:
    """The protocol's form of a table."""
    return common_pb2.SliceTable(
        stride_bytes=table.stride,
        count=table.count,
        length_bytes=table.length,
        base_bytes=table.bases,
        skip_bytes=table.skips,
        nbytes=table.sizes,
    )


def slices_of(grant: common_pb2.ChunkGrant) -> list[Slices]:
    """The targets of a grant. Raises InvalidRequest on a malformed one."""
    table = grant.target
    count = len(grant.tag)
    parts = (grant.block, grant.chunk, table.base_bytes, table.skip_bytes, table.nbytes)
    if not 1 <= count <= GRANT_CHUNKS_MAX or any(len(part) != count for part in parts):
        raise InvalidRequest(
            f"a grant names 1..{GRANT_CHUNKS_MAX} chunks in parts of equal length, not "
            f"{[count, *(len(part) for part in parts)]}"
        )
    return [
        Slices(base, table.stride_bytes, table.count, table.length_bytes, skip, nbytes)
        for base, skip, nbytes in zip(table.base_bytes, table.skip_bytes, table.nbytes, strict=True)
    ]
