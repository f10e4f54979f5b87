"""What a look-up answers of its rows: tiers, checksums; and the lease that it puts on them.

Natively in one pass over the columns, whose memory is asked for ahead: rows lie anywhere in a large
table, and in numpy each column costs a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from dualpath.kvstore.store_api import TIERS, Tier
from numpy.typing import NDArray

native_gather: Callable[..., int] | None
try:
    from dualpath.kvstore import _native
except ImportError:
    native_gather = None
else:
    native_gather = _native.gather_rows

assert TIERS == (Tier.DRAM, Tier.SSD), "a tier's code is whether the block is not in DRAM"


class Gathered(NamedTuple):
    """Of each row its tier's code and its checksums; `in_dram` of them are in DRAM."""

    tiers: NDArray[np.uint8]
    checksums: NDArray[np.uint64]
    in_dram: int


def gather_rows(
    rows: NDArray[np.int32],
    leases: NDArray[np.int32],
    resident: NDArray[np.bool_],
    checksum_rows: NDArray[np.int32],
    values: NDArray[np.uint64],
    *,
    lease: bool,
) -> Gathered:
    """Gather from the columns; with `lease` count one more on each row. Rows are all different."""
    if native_gather is None:
        return _gather_in_numpy(rows, leases, resident, checksum_rows, values, lease=lease)
    chunks = values.shape[1]
    tiers = np.empty(len(rows), np.uint8)
    checksums = np.empty((len(rows), chunks), np.uint64)
    in_dram = native_gather(
        rows, leases, resident, checksum_rows, values, tiers, checksums, chunks, lease
    )
    return Gathered(tiers, checksums, in_dram)


def _gather_in_numpy(
    rows: NDArray[np.int32],
    leases: NDArray[np.int32],
    resident: NDArray[np.bool_],
    checksum_rows: NDArray[np.int32],
    values: NDArray[np.uint64],
    *,
    lease: bool,
) -> Gathered:
    # Numpy indexes by its own integers twice as fast as by shorter ones.
    at = rows.astype(np.intp)
    found = resident.take(at)
    checksums = values.take(checksum_rows.take(at), axis=0)
    if lease:
        leases[at] += 1
    return Gathered(np.logical_not(found).view(np.uint8), checksums, int(np.count_nonzero(found)))
