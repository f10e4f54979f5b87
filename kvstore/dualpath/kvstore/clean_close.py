"""What a clean close leaves for the next opening to be fast: the snapshot of the index.

It is only for speed: where it cannot be written, the next opening reads the durable index.
"""

from __future__ import annotations

import logging

from dualpath.kvstore.committer import Committer
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.index_snapshot import IndexSnapshot, SnapshotState, write_snapshot
from dualpath.kvstore.store_state import StoreState
from dualpath.kvstore.table_image import columns_of

_log = logging.getLogger(__name__)


def leave_snapshot(
    directory: DataDirectory, state: StoreState, index: DurableIndex, committer: Committer
) -> int | None:
    """Write the snapshot of a store that nobody uses any more; its CRC, for the clean flag. None
    if it could not be written, or if the durable index tells other things than the table."""
    if not committer.settled:
        return None
    belongs_to = SnapshotState(directory.store_id, index.last_txn, state.ssd.segments())
    namespace_ids, columns = columns_of(state.table, state.catalog)
    snapshot = IndexSnapshot(belongs_to, state.generation, namespace_ids, columns)
    try:
        return write_snapshot(directory.snapshot_path, snapshot)
    except OSError as error:
        _log.warning("the snapshot of the index could not be written: %s", error)
        return None
