"""Reads a chain of blocks by batches, two at a time, so that the device never runs dry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from dualpath.kvstore.fetched_batch import FetchedBatch, FetchStatus
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.store_api import Store
from dualpath.transfer.errors import Corrupt, Unavailable
from numpy.typing import NDArray

BATCHES = 2
ARRIVAL_S_MAX = 60.0

Visit = Callable[[FetchedBatch, int, NDArray[np.int32]], None]
"""Called with a batch, the number of its first chunk in the whole reading, and the indices of its
chunks that have arrived, verified."""


class BatchReader:
    """Fetches every chunk of the leading blocks of a lease, verified by the store."""

    def __init__(
        self, store: Store, layout: KVLayout, batch_bytes: int, *, verify: bool = True
    ) -> None:
        self._store = store
        self._verify = verify
        self._chunk_count = layout.chunk_count
        self._step = max(1, batch_bytes // layout.chunk_bytes)

    def read(self, lease_id: int, blocks: int, visit: Visit | None = None) -> None:
        """Bring all into memory, in order of blocks. Raises Corrupt, Unavailable."""
        total = blocks * self._chunk_count
        items = np.arange(total, dtype=np.int32)
        block_of, chunk_of = np.divmod(items, np.int32(self._chunk_count))
        under_way: deque[tuple[int, FetchedBatch]] = deque()
        start = 0
        try:
            while start < total or under_way:
                while start < total and len(under_way) < BATCHES:
                    # The first is half as long: so one batch is in its middle when another ends.
                    step = self._step if start else max(1, self._step // BATCHES)
                    part = slice(start, start + step)
                    batch = self._store.fetch_batch(
                        lease_id, block_of[part], chunk_of[part], verify=self._verify, wait=False
                    )
                    under_way.append((start, batch))
                    start += len(batch)
                self._drive(*under_way[0], visit)
                under_way.popleft()[1].release()
        finally:
            for _, batch in under_way:
                batch.release()

    @staticmethod
    def _drive(first: int, batch: FetchedBatch, visit: Visit | None) -> None:
        left = len(batch)
        while left:
            items = batch.arrived(ARRIVAL_S_MAX)
            if not len(items):
                raise Unavailable(f"{left} chunks did not arrive within {ARRIVAL_S_MAX:g} s")
            if visit is not None:
                visit(batch, first, items)
            left -= len(items)
        if not batch.ok:
            bad = int(np.count_nonzero(batch.status != FetchStatus.OK))
            raise Corrupt(f"{bad} of {len(batch)} chunks were not read or are wrong")
