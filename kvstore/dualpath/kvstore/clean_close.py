"""The end of a clean close: what the next opening needs to be fast.

Writes the snapshot of the index and then marks the directory clean. Both are only for speed: where
either fails, the next opening reads the durable index.
"""

from __future__ import annotations

import logging

from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.index_snapshot import IndexSnapshot, SnapshotState, write_snapshot
from dualpath.kvstore.store_state import StoreState
from dualpath.kvstore.table_image import columns_of

_log = logging.getLogger(__name__)


def leave_clean(
    directory: DataDirectory, state: StoreState, last_txn: int, *, settled: bool
) -> None:
    """Call it when nobody uses the store any more and the durable index is closed. `last_txn` is
    its last transaction; `settled` tells whether it says the same as the table in memory."""
    crc = _write_snapshot(directory, state, last_txn) if settled else None
    try:
        directory.mark_clean(crc)
    except OSError as error:
        _log.warning("the shutdown could not be marked clean: %s", error)


def _write_snapshot(directory: DataDirectory, state: StoreState, last_txn: int) -> int | None:
    belongs_to = SnapshotState(directory.store_id, last_txn, state.ssd.segments())
    namespace_ids, columns = columns_of(state.table, state.catalog)
    snapshot = IndexSnapshot(belongs_to, state.generation, namespace_ids, columns)
    try:
        return write_snapshot(directory.snapshot_path, snapshot)
    except OSError as error:
        _log.warning("the snapshot of the index could not be written: %s", error)
        return None
