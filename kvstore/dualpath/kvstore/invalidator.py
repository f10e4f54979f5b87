"""Invalidation: blocks that must not be used any more leave, by namespace, prefix or writer.

Guarantees, once it has answered: no lookup finds them, and they do not come back after a crash, not
even if the index is lost and rebuilt from headers. Who reads a block already keeps its memory as it
is until he releases it. Descendants leave with their ancestors. Blocks that are sealed while it
runs may or may not go; those of a namespace or prefix that were reserved before can not be sealed
any more. Holds the store's lock for a few blocks at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.block_table import NO_ROW, RowState
from dualpath.kvstore.block_writer import BlockWriter
from dualpath.kvstore.catalog import NamespaceEntry
from dualpath.kvstore.committer import Committer
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.invalidation_cuts import InvalidationCuts
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.record import BlockRecord, recorded_writer
from dualpath.kvstore.store_api import Invalidation, InvalidationScope, MissReason
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import Corrupt, Unavailable
from numpy.typing import NDArray

_DROPPED_AT_ONCE = 16
"""Blocks between two chances for others to take the lock."""
_SCANNED_AT_ONCE = 4096
"""Records between two chances for the committer to take the index."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Rows that are to go, children before parents."""

    rows: NDArray[np.int64]
    generations: NDArray[np.int64]
    born_until: int
    """Generation up to which one event has told of all of them; -1: each has its own."""
    chosen_at: int
    """The highest generation at that moment."""
    scopes: list[InvalidationScope]
    """All of them, for who has only headers."""


@dataclass(slots=True)
class _Count:
    blocks: int = 0
    nbytes: int = 0
    leased_blocks: int = 0


class Invalidator:
    """See the module docstring."""

    def __init__(
        self,
        state: StoreState,
        writer: BlockWriter,
        committer: Committer,
        index: DurableIndex,
        cuts: InvalidationCuts,
    ) -> None:
        self._state = state
        self._writer = writer
        self._committer = committer
        self._index = index
        self._cuts = cuts
        self._cutting = threading.Lock()

    def run(self, scope: InvalidationScope, *, dry_run: bool) -> Invalidation:
        """See Store.invalidate."""
        state = self._state
        with state.lock:
            state.check_open()
            entry = state.catalog.entry(scope.namespace_id) if scope.namespace_id else None
            born_before = state.generation
        if scope.writer:
            # What was written a moment ago stands in no index yet.
            self._writer.flush()
            trouble = self._committer.await_told(state.config.commit_wait_s)
            if trouble:
                raise Unavailable(f"not all blocks of a writer are known: {trouble}; try again")
        found = self._find(scope, entry, dry_run=dry_run)
        rows, generations, count = found.rows, found.generations, _Count()
        for start in range(0, len(rows), _DROPPED_AT_ONCE):
            end = start + _DROPPED_AT_ONCE
            with state.lock:
                state.check_open()
                pairs = zip(rows[start:end].tolist(), generations[start:end].tolist(), strict=True)
                for row, generation in pairs:
                    self._take(row, generation, found.born_until, count, dry_run=dry_run)
                state.room.notify_all()
        if not dry_run:
            self._await_durable()
            # What came later may have stayed; of a writer, whatever came later.
            self._cut(found.scopes, born_before if scope.writer else found.chosen_at)
        return Invalidation(count.blocks, count.nbytes, count.leased_blocks)

    def _find(
        self, scope: InvalidationScope, entry: NamespaceEntry | None, *, dry_run: bool
    ) -> _Found:
        state = self._state
        written = self._written_by(scope) if scope.writer else ()
        with state.lock:
            table, born_until = state.table, -1
            mask = table.state == RowState.PRESENT
            if entry is not None:
                mask &= table.namespace == entry.index
            if scope.writer:
                roots = [
                    row
                    for record in written
                    if (row := self._row_of(record.namespace_id, record.hash)) != NO_ROW
                    and table.generation[row] == record.generation
                ]
            elif scope.hash:
                assert entry is not None
                roots = [row for row in (state.catalog.row_of(entry, scope.hash),) if row != NO_ROW]
                if not dry_run:
                    self._forbid(entry, scope.hash)
            else:
                assert entry is not None
                roots = []
                if not dry_run:
                    self._forbid(entry, b"")
                    born_until = state.generation
                    state.events.cleared(entry.id, MissReason.INVALIDATED)
            chosen_at, rows = state.generation, np.flatnonzero(mask)
            parents, generations = table.parent[rows], table.generation[rows]
        # A child's generation is higher than its parent's.
        order = np.argsort(generations, kind="stable")
        rows, parents, generations = rows[order], parents[order], generations[order]
        if scope.writer or scope.hash:
            chosen = _with_descendants(rows, parents, roots)
            rows, parents, generations = rows[chosen], parents[chosen], generations[chosen]
        scopes = [scope]
        if scope.writer:
            scopes += self._of_others(rows, parents, generations, set(roots))
        return _Found(rows[::-1], generations[::-1], born_until, chosen_at, scopes)

    def _of_others(
        self,
        rows: NDArray[np.int64],
        parents: NDArray[np.int32],
        generations: NDArray[np.int64],
        roots: set[int],
    ) -> list[InvalidationScope]:
        """What others have built on a writer's blocks goes with them, and no header says so."""
        state, scopes = self._state, []
        triples = zip(rows.tolist(), parents.tolist(), generations.tolist(), strict=True)
        with state.lock:
            for row, parent, generation in triples:
                still = state.table.generation[row] == generation
                if parent in roots and row not in roots and still:
                    entry, block_hash = state.catalog.entry_of(row), state.table.hash_of(row)
                    scopes.append(InvalidationScope(entry.id, block_hash))
        return scopes

    def _written_by(self, scope: InvalidationScope) -> list[BlockRecord]:
        """Durable records of a writer, scanned beside the committer."""
        found = []
        name = recorded_writer(scope.writer)
        encoded = name.encode()
        for key, value in self._records(scope.namespace_id):
            if not key.startswith(scope.namespace_id):
                break
            if encoded not in value:  # most records, and cheaper than decoding them
                continue
            try:
                record = BlockRecord.from_bytes(value)
            except Corrupt:
                continue
            if record.writer == name:
                found.append(record)
        return found

    def _records(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        after = start
        while page := self._index.page(after, _SCANNED_AT_ONCE):
            yield from page
            after = page[-1][0] + b"\0"

    def _row_of(self, namespace_id: bytes, block_hash: bytes) -> int:
        entry = self._state.catalog.find(namespace_id[:NAMESPACE_ID_BYTES])
        return NO_ROW if entry is None else self._state.catalog.row_of(entry, block_hash)

    def _forbid(self, entry: NamespaceEntry, block_hash: bytes) -> None:
        """What is being written now can not be sealed: all of a namespace, or one block."""
        table = self._state.table
        if block_hash:
            pending = entry.pending.get(block_hash, NO_ROW)
            rows = [] if pending == NO_ROW else [pending]
        else:
            mask = (table.state == RowState.PENDING) | (table.state == RowState.SEALING)
            rows = np.flatnonzero(mask & (table.namespace == entry.index)).tolist()
        for row in rows:
            self._state.residency.orphan(row)

    def _take(
        self, row: int, generation: int, born_until: int, count: _Count, *, dry_run: bool
    ) -> None:
        """Count one row and let it go, with what was sealed below it meanwhile."""
        state, table = self._state, self._state.table
        if table.state[row] != RowState.PRESENT or table.generation[row] != generation:
            return
        nbytes = state.catalog.entry_of(row).layout.block_bytes
        used = bool(table.leases[row] or table.pins[row])
        blocks = 1
        if not dry_run:
            blocks = state.residency.drop(row, MissReason.INVALIDATED, told_until=born_until)
        count.blocks += blocks
        count.nbytes += blocks * nbytes
        count.leased_blocks += used

    def _await_durable(self) -> None:
        """Wait until the deletes have committed, those of blocks that were on their way to the
        SSD included. Raises Unavailable."""
        self._writer.flush()
        wait_s = self._state.config.commit_wait_s
        trouble = self._committer.await_told(wait_s)
        if trouble:
            raise Unavailable(
                f"the blocks are hidden, but may be back after a crash: {trouble}; invalidate again"
            )

    def _cut(self, scopes: Sequence[InvalidationScope], generation: int) -> None:
        """Nothing of this may come back by its header either, whenever it has left. The index
        tells of all up to this generation by now."""
        try:
            with self._cutting:
                self._cuts.add(scopes, generation)
        except OSError as error:
            raise Unavailable(
                f"the blocks are gone, but could be back if the index were lost: {error}; "
                "invalidate again"
            ) from error


def _with_descendants(
    rows: NDArray[np.int64], parents: NDArray[np.int32], roots: list[int]
) -> NDArray[np.bool_]:
    """Which of `rows` (parents before children) are roots or below one."""
    taken = set(roots)
    chosen = np.zeros(len(rows), np.bool_)
    if not taken:
        return chosen
    for index, (row, parent) in enumerate(zip(rows.tolist(), parents.tolist(), strict=True)):
        if row in taken or parent in taken:
            taken.add(row)
            chosen[index] = True
    return chosen
