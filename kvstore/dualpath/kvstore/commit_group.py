"""Which blocks become durable together: the rule by which a queue is cut into groups. Pure.

One flush makes a group durable, and costs as much for a block as for many. So a group takes what
there is, with two exceptions: it ends where somebody waits for it, once it is worth a flush, so
that he comes back with more while the next group is written; and it is held open for a moment
where somebody is about to bring the rest of what he waits for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.data_pump import DataWrite

GROUP_JOBS_MAX = 1024
GROUP_BYTES_MAX = 128 << 20
WORTH_BYTES = 16 << 20
"""Writing so much takes several times as long as a flush."""
HELD_BYTES = 32 << 20
"""From so many bytes on it does not wait for the rest."""


@dataclass(slots=True)
class CommitGroup:
    """Jobs in order of their generations; the first `begun` are on their way."""

    jobs: list[CommitJob] = field(default_factory=list)
    nbytes: int = 0
    writes: list[DataWrite] = field(default_factory=list)
    begun: int = 0
    recorded: bool = False
    """It is durable: whatever happens now, that stays."""
    in_turn: bool = False
    """Something is in the way: no more of it is written before its turn."""

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs."""
        if len(self.jobs) >= GROUP_JOBS_MAX or self.nbytes >= GROUP_BYTES_MAX:
            return True
        return bool(self.jobs) and self.jobs[-1].ends_put and self.nbytes >= WORTH_BYTES

    @property
    def expects_more(self) -> bool:
        """Whether it should be held open for a moment."""
        return bool(self.jobs) and self.jobs[-1].has_more and self.nbytes < HELD_BYTES

    def take(self, queue: deque[CommitJob]) -> int:
        """Take jobs until it is closed; how many there are now that have not begun."""
        while queue and not self.is_closed:
            job = queue.popleft()
            self.jobs.append(job)
            self.nbytes += job.nbytes
        return len(self.jobs) - self.begun
