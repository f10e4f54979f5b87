"""One block on its way to SSD: where it lies in memory, where it goes, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.record import BlockRecord


@dataclass(slots=True)
class CommitJob:
    """Write one block. Its slot in the arena, `nbytes` from `at` on, is unchanged until `settle`
    (see CommitHost)."""

    row: int
    parent_row: int
    record: BlockRecord
    namespace: Namespace
    at: int
    nbytes: int
    encoded: bytes = b""
    """The record as it is written; b"" until it is."""
    failure: str = ""
    """Why it could not be stored; "" while all is well."""
    sick: bool = False
    """It is the place that failed: another one may do."""
    failed_flushes: int = 0
    """How many flushes of its place had failed before it was written there."""
    ends_put: bool = False
    """Somebody waits for the blocks up to this one."""
    has_more: bool = False
    """Somebody waits for this and for more, which he is about to bring."""

    @property
    def place(self) -> tuple[int, int]:
        """(segment, slot)."""
        return self.record.segment, self.record.slot
