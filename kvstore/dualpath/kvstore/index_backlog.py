"""What the durable index has still to be told: blocks that are on the medium, and blocks that left.

A stored block is durable by its header; the index only has to know of it before the store may
forget that it does not (`LAG_S`, `LAG_JOBS` and `LAG_BYTES` bound what an opening has to find by
headers). A delete must have committed before the block's slot is written again, and `is_held` says
which slots that is. One transaction tells everything. While the index refuses, nothing is
taken on trust: the blocks of a group fail unless it answers.

Any thread may `delete` and wait; the rest is for the one that writes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.durable_index import DurableIndex

LAG_S = 0.1
LAG_JOBS = 4096
LAG_BYTES = 1 << 30
_RETRY_S = 1.0
"""Pause after the index has refused, unless there is something to store."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Delete:
    key: bytes
    generation: int
    place: tuple[int, int]


class IndexBacklog:
    """See the module docstring. `wake` is notified whenever the writing thread should look;
    `answered` is called without it, with why a transaction was refused, or "" if it was not."""

    def __init__(
        self,
        wake: threading.Condition,
        index: DurableIndex,
        answered: Callable[[str], None],
    ) -> None:
        self._wake = wake
        self._index = index
        self._answered = answered
        self._puts: list[CommitJob] = []
        self._put_bytes = 0
        self._reached = -1
        self._deletes: list[_Delete] = []
        self._held: set[tuple[int, int]] = set()
        self._due_at = math.inf
        # What was ever added, and what of it is told.
        self._added = 0
        self._told = 0
        self.refused = False
        """Whether the last transaction was refused."""

    # Any thread

    def delete(self, key: bytes, generation: int, place: tuple[int, int]) -> None:
        """A block has left: its record must go before `place` is written again."""
        with self._wake:
            self._deletes.append(_Delete(key, generation, place))
            self._held.add(place)
            self._add(1)
            self._wake.notify_all()

    def await_told(self, wait_s: float) -> str:
        """Wait until the index knows all that was added so far. Why it does not, else ""."""
        with self._wake:
            wanted = self._added
            if self._told < wanted:
                self._due_at = -math.inf
                self._wake.notify_all()
            if not self._wake.wait_for(lambda: self._told >= wanted, wait_s):
                return f"the index has not taken what it was told within {wait_s:g} s"
            return ""

    @property
    def is_empty(self) -> bool:
        """Whether the index tells all that has happened."""
        with self._wake:
            return self._told == self._added

    # With the condition held

    def seconds_left(self) -> float:
        """Until it should be told; 0 if it is time, infinite if there is nothing to tell."""
        return max(0.0, self._due_at - time.monotonic())

    def is_held(self, place: tuple[int, int]) -> bool:
        """Whether the delete of a slot's former block has still to commit."""
        return place in self._held

    # The thread that writes

    def add(self, group: Sequence[CommitJob]) -> None:
        """A group is over: what did not fail is durable. Groups come in order of generations. Of
        one that failed as a whole, too, the index is told: headers that it left are void then."""
        stored = [job for job in group if not job.failure]
        with self._wake:
            self._puts += stored
            self._put_bytes += sum(job.nbytes for job in stored)
            self._reached = max([self._reached, *(job.record.generation for job in group)])
            self._add(len(group))
            if len(self._puts) >= LAG_JOBS or self._put_bytes >= LAG_BYTES:
                self._due_at = -math.inf

    def _add(self, count: int) -> None:
        self._added += count
        if count and self._due_at == math.inf:
            self._due_at = time.monotonic() + LAG_S

    def tell(self, group: Sequence[CommitJob] = ()) -> str:
        """One transaction of all there is, and of a group that is durable only if it commits.
        Return why it was refused, or ""; then all but the group is kept for the next one."""
        with self._wake:
            deletes, self._deletes = self._deletes, []
            self._due_at = math.inf
            upto = self._added
            if self._told == upto and not group:
                return ""
        gone = {(delete.key, delete.generation) for delete in deletes}
        new = [job for job in group if not job.failure]
        kept = [job for job in self._puts if (job.record.key, job.record.generation) not in gone]
        reached = max([self._reached, *(job.record.generation for job in group)])
        try:
            self._index.apply(
                list(gone),
                [(job.record.key, job.encoded) for job in kept + new],
                reached if reached >= 0 else None,
            )
        except OSError as error:
            _log.warning("the index refused %d blocks: %s", len(kept) + len(new), error)
            self._refuse(deletes)
            self._answered(str(error))
            return f"index: {error}"
        except BaseException:
            self._refuse(deletes)
            raise
        self._answered("")
        self._reached = reached
        self._forget(deletes, upto)
        return ""

    def _refuse(self, deletes: list[_Delete]) -> None:
        with self._wake:
            self.refused = True
            self._deletes = deletes + self._deletes
            if self._told < self._added:
                self._due_at = time.monotonic() + _RETRY_S

    def _forget(self, deletes: list[_Delete], upto: int) -> None:
        """These deletes and all puts are told."""
        with self._wake:
            self.refused = False
            later = {delete.place for delete in self._deletes}
            self._held -= {delete.place for delete in deletes} - later
            self._told = upto
            self._puts.clear()
            self._put_bytes = 0
            self._wake.notify_all()
