"""What the store does when a medium fails: takes segments out of use, finds other places, says so.

Owns the consequences: a segment that keeps failing gives out no slots, and if it is reads that
fail, its blocks leave, so that one sick segment does not fail request after request. A block that
could not be written is given another place, once. A full disk makes the store keep within what it
has. Each of these is a trouble on the health board until it is over. Takes the store's lock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.segment_breaker import PAUSE_S
from dualpath.kvstore.store_api import MissReason
from dualpath.kvstore.store_health import Trouble
from dualpath.kvstore.store_state import StoreState

FULL_DISK_S = 30.0
"""How long a store whose disk was full does not try to grow."""
_SHOWN_S = 600.0
"""How long something that was lost marks the store as degraded."""
_TOLD_MAX = 8
"""Most findings of an opening that are told in one trouble; all are in the log."""
_log = logging.getLogger(__name__)


class MediaTroubles:
    """See the module docstring. Implements CommitTroubles. `recovered` is what the opening found,
    one sentence each."""

    def __init__(self, state: StoreState, recovered: Sequence[str]) -> None:
        self._state = state
        self._grow_again_at = math.inf
        if recovered:
            self._note(Trouble.RECOVERY, "; ".join(recovered[:_TOLD_MAX]))

    # Segments

    def read_failed(self, row: int, why: str) -> None:
        """A stored block cannot be read: it leaves, and with it all that its segment holds, once
        the segment has failed often enough."""
        state, table = self._state, self._state.table
        with state.lock:
            segment = int(table.segment[row])
            if not self._drop_rotten(row, why):
                return
            if state.breaker.failed(segment, state.clock()):
                self._take_out(segment, f"reads fail: {why}", empty=True)
            state.room.notify_all()

    def rotten(self, row: int, why: str) -> None:
        """A block was read and has wrong bytes: it leaves, its segment stays."""
        with self._state.lock:
            self._drop_rotten(row, why)
            self._state.room.notify_all()

    def _drop_rotten(self, row: int, why: str) -> bool:
        """False if it had left already."""
        state, table = self._state, self._state.table
        if table.state[row] != RowState.PRESENT:
            return False
        where = f"segment {int(table.segment[row])} slot {int(table.slot[row])}"
        dropped = state.residency.drop(row, MissReason.CORRUPT)
        self._note(Trouble.ROT, f"{where}: {why}; it was dropped")
        _log.warning("%d blocks are dropped, %s: %s", dropped, where, why)
        return True

    def write_failed(self, segment: int, why: str) -> None:
        """See CommitTroubles."""
        state = self._state
        with state.lock:
            if state.breaker.failed(segment, state.clock()):
                self._take_out(segment, f"writes fail: {why}", empty=False)

    def _take_out(self, segment: int, why: str, *, empty: bool) -> None:
        """No slot of it is given out any more; with `empty` its blocks leave."""
        state, table = self._state, self._state.table
        state.ssd.suspend(segment)
        dropped = 0
        if empty:
            there = (table.segment == segment) & (table.state == RowState.PRESENT) & ~table.dirty
            for row in np.flatnonzero(there).tolist():
                if table.state[row] == RowState.PRESENT and table.segment[row] == segment:
                    dropped += state.residency.drop(row, MissReason.CORRUPT)
        _log.error(
            "segment %d is out of use, %d blocks are dropped: %s; it is tried again later",
            segment,
            dropped,
            why,
        )
        self._show_segments()

    def _resume(self, segment: int) -> None:
        """Its slots are given out again, and its blocks may make way."""
        state = self._state
        state.ssd.resume(segment)
        rows = np.flatnonzero(state.table.segment == segment)
        state.residency.settle_all(rows[state.table.state[rows] == RowState.PRESENT])

    def _show_segments(self) -> None:
        out = self._state.breaker.out
        if out:
            names = ", ".join(map(str, out[:10]))
            text = f"{len(out)} segments keep failing and are out of use: {names}"
            self._state.health.note(Trouble.SEGMENT, text)
        else:
            self._state.health.clear(Trouble.SEGMENT)

    def relocate(self, jobs: Sequence[CommitJob]) -> list[CommitJob]:
        """See CommitTroubles."""
        state, table = self._state, self._state.table
        moved = []
        with state.lock:
            sick = {job.record.segment for job in jobs}
            for segment in sick:
                state.ssd.suspend(segment)
            for job in jobs:
                place = None
                if table.state[job.row] in (RowState.SEALING, RowState.PRESENT):
                    place = state.residency.relocate(job.row)
                if place is not None:
                    job.record = replace(job.record, segment=place[0], slot=place[1])
                    job.failure, job.sick = "", False
                    moved.append(job)
            for segment in sick - set(state.breaker.out):
                self._resume(segment)
            state.room.notify_all()
        if moved:
            _log.warning("%d blocks are written elsewhere", len(moved))
        return moved

    # Space, the index, what was lost

    def no_space(self, segment: int) -> None:
        """See CommitTroubles."""
        state = self._state
        with state.lock:
            state.ssd.shrink(segment)
            text = (
                f"the store keeps within {state.ssd.capacity_bytes} bytes; free some space, or "
                "lower disk_bytes"
            )
            self._grow_again_at = state.clock() + FULL_DISK_S
            # A little longer than until the next try: it goes away only if that succeeds.
            state.health.note(Trouble.DISK_FULL, text, until=self._grow_again_at + FULL_DISK_S)
        _log.warning("the disk is full: %s", text)

    def index_answered(self, failure: str) -> None:
        """See CommitTroubles."""
        with self._state.lock:
            if failure:
                text = f"{failure}; nothing more becomes durable, what is stored is served"
                self._state.health.note(Trouble.INDEX, text)
            else:
                self._state.health.clear(Trouble.INDEX)

    def lost_write_back(self, blocks: int, why: str) -> None:
        """Blocks that were visible and never reached the medium have left. Needs the lock."""
        self._state.counters.lost_write_backs += blocks
        lost = self._state.counters.lost_write_backs
        self._note(Trouble.WRITE_BACK, f"{lost} blocks since the start, the last for: {why}")
        _log.warning("write-back failed, %d blocks dropped: %s", blocks, why)

    def chores(self) -> None:
        """Try again what was given up for a while. Needs the lock."""
        state = self._state
        now = state.clock()
        if now >= self._grow_again_at:
            self._grow_again_at = math.inf
            state.ssd.restore_budget()
        due = state.breaker.due(now)
        for segment in due:
            if state.ssd.has(segment):
                _log.warning("segment %d is tried again", segment)
                self._resume(segment)
            else:
                state.breaker.forget(segment)
        if due:
            self._show_segments()

    def _note(self, trouble: Trouble, text: str) -> None:
        self._state.health.note(trouble, text, until=self._state.clock() + _SHOWN_S)


assert PAUSE_S <= _SHOWN_S
