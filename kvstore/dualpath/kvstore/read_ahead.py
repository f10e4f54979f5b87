"""Read-ahead: once the first blocks of a leased prefix are fetched from SSD, the rest follows.

One thread brings the next blocks of the lease into DRAM, through the same fetches as everybody,
whenever the device has nothing else to do. Bounded: so many bytes beyond the furthest block that
was asked for, and so many leases that are remembered, the latest first. Ends with the lease, or
where DRAM has no slot to give: it displaces colder copies only, like any promotion. Never fails a
reader: what it cannot do is left to the fetch itself.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.io_order import IoClass
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import DualPathError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dualpath.kvstore.chunk_fetcher import ChunkFetcher

LEASES_MAX = 64
DRAM_SHARE_OF = 8
"""At most one of so many bytes of DRAM slots is filled ahead of a lease."""
_STEP_BYTES = 4 << 20
"""Bytes of one read: what a load that comes meanwhile has to wait for."""
_QUIET_S = 0.2
_LOOK_S = 0.02
"""How often a read is looked at for its lease having ended."""
_log = logging.getLogger(__name__)


def start_read_ahead(state: StoreState, fetcher: ChunkFetcher) -> ReadAhead | None:
    """Start as configured; None if nothing is to be read ahead."""
    config = state.config
    if not (config.promote and config.read_ahead_bytes):
        return None
    # What is brought ahead must not push itself out again.
    ahead_bytes = min(config.read_ahead_bytes, config.dram_bytes // DRAM_SHARE_OF)
    fetcher.ahead = ReadAhead(state, fetcher, ahead_bytes)
    fetcher.ahead.start()
    return fetcher.ahead


class ReadAhead:
    """See the module docstring. `ahead_bytes` beyond the furthest block of a lease."""

    def __init__(self, state: StoreState, fetcher: ChunkFetcher, ahead_bytes: int) -> None:
        self._state = state
        self._fetcher = fetcher
        self._gate = state.io
        self._ahead_bytes = ahead_bytes
        self._wake = threading.Condition()
        # Lease -> (the next block to look at, the furthest that was asked for).
        self._wanted: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dualpath-ahead", daemon=True)
        self.read_bytes = 0
        """Bytes brought ahead so far."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, wait_s: float) -> None:
        """Stop after the read at hand."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(wait_s)

    def asked(self, lease_id: int, block: int) -> None:
        """A fetch has read from SSD; `block` is the last that it asked for. Cheap."""
        with self._wake:
            following, furthest = self._wanted.get(lease_id, (0, -1))
            self._wanted[lease_id] = max(following, block + 1), max(furthest, block)
            self._wanted.move_to_end(lease_id)
            if len(self._wanted) > LEASES_MAX:
                self._wanted.popitem(last=False)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._wanted or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return
                lease_id, (following, furthest) = self._wanted.popitem()
            try:
                following = self._step(lease_id, following, furthest)
            except DualPathError:
                continue  # the lease or the store has ended, or there is no room
            except Exception:  # noqa: BLE001 - the thread must outlive any surprise
                _log.exception("reading ahead failed")
                continue
            with self._wake:
                if following and not self._stopping:
                    later, asked = self._wanted.get(lease_id, (0, -1))
                    self._wanted[lease_id] = max(following, later), max(furthest, asked)

    def _step(self, lease_id: int, following: int, furthest: int) -> int:
        """Bring a few blocks; return the next one to look at, 0 when it is done."""
        if not self._gate.await_quiet(_QUIET_S):
            return following  # others come first: ask again
        blocks, chunks, nbytes = self._next(lease_id, following, furthest)
        if not len(blocks):
            return 0
        batch = self._fetcher.fetch_batch(
            lease_id, blocks, chunks, wait=False, kind=IoClass.BACKGROUND
        )
        try:
            brought = 0
            while brought < len(batch):
                items = batch.arrived(_LOOK_S)
                brought += len(items)
                if not len(items) and not self._goes_on(lease_id):
                    return 0
        finally:
            batch.release()
        if len(batch) < len(blocks) or not self._kept(lease_id, blocks):
            return 0  # DRAM has no room for it: it went past it
        self.read_bytes += nbytes
        return int(blocks[-1]) + 1

    def _next(
        self, lease_id: int, following: int, furthest: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """(blocks, chunks, bytes) of the next blocks that are on SSD only. Raises LeaseExpired."""
        state, table = self._state, self._state.table
        with state.lock:
            state.check_open()
            rows = state.leases.find(lease_id, state.clock()).rows
            if not len(rows):
                return _NONE, _NONE, 0
            layout = state.catalog.entry_of(int(rows[0])).layout
            end = min(len(rows), furthest + 1 + self._ahead_bytes // layout.slot_bytes)
            within = np.arange(min(following, end), end, dtype=np.int32)
            cold = (table.state[rows[within]] == RowState.PRESENT) & ~table.resident[rows[within]]
            blocks = within[cold][: max(1, _STEP_BYTES // layout.slot_bytes)]
        chunks = np.tile(np.arange(layout.chunk_count, dtype=np.int32), len(blocks))
        return np.repeat(blocks, layout.chunk_count), chunks, len(blocks) * layout.block_bytes

    def _goes_on(self, lease_id: int) -> bool:
        state = self._state
        if self._stopping:
            return False
        with state.lock:
            state.leases.find(lease_id, state.clock())
        return True

    def _kept(self, lease_id: int, blocks: NDArray[np.int32]) -> bool:
        """Whether the last of the blocks has a copy in DRAM now."""
        state = self._state
        with state.lock:
            rows = state.leases.find(lease_id, state.clock()).rows
            return bool(state.table.resident[rows[int(blocks[-1])]])


_NONE: NDArray[np.int32] = np.zeros(0, np.int32)
